"""A model as one graph: its arguments, its files, and the tensors that it returns by name."""
