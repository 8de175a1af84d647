"""A GPU run without a GPU: the run's own code on a device whose tensors have no numbers (docs/rehearse.md)."""
