"""Programs of `torch.export` as files."""
