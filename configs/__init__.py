"""YAML jobs and model presets, nothing else."""
