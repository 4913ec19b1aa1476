"""locate_onnx."""
