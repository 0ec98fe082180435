"""Pipelines as data: what every rank does, in which order, as lists that can be printed, checked, simulated and run."""
