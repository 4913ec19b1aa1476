"""ONNX files of converted models; their weights stay in the safetensors files."""
