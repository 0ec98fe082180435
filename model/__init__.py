"""The model being trained: decoder, Hugging Face names and adapter. A leaf: imports torch and dist.errors only."""
