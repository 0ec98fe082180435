"""State that outlives a process: captured, persisted, verified, restored. Never imports parallel."""
