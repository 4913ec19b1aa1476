"""torch_ops."""
