"""Snapshots in the memory of the nodes: taken every step, protected by parity, read back after a failure."""
