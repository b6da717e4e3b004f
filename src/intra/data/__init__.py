"""Files → tensors in [0, 1]."""
