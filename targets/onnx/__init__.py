"""A converted model as ONNX files."""
