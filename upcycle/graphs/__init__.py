"""Works on any graph of torch.fx: what lies between two nodes, and layers in its place."""
