"""Who I am, who my peers are, what a shard is, and the only door for bytes between ranks."""
