"""The forms that an MoE layer takes in an ONNX graph."""
