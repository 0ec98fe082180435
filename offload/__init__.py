"""Named tensors across device, host and NVMe under byte budgets. Knows no layers and no ranks."""
