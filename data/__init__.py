"""Text and Parquet to tokens to packed batches, with exact resumable state. A leaf: it imports only dist.errors."""
