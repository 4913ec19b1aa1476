"""Operations of torch in ONNX, for its own exporter."""
