"""The ONNX files of a model, see `upcycle.targets.traced.parts`."""

from upcycle.targets.traced import parts

MODEL, ENCODER, DECODER = (f"{stem}.onnx" for stem in (parts.MODEL, parts.ENCODER, parts.DECODER))
FILES = (MODEL, ENCODER, DECODER)
