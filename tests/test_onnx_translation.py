"""The operation ``upcycle::moe`` through torch's own ONNX exporter."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx_case import bound, exact, moe

from upcycle.targets.onnx.torch_ops.translation import TABLE

TOKENS = {"x": {0: torch.export.Dim("tokens", min=2)}}


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("gelu", True)])
def test_the_operation_is_translated(activation: str, bias: bool, tmp_path: Path) -> None:
    layer = moe(activation, bias=bias).eval()
    program = torch.export.export(layer, (torch.randn(7, 16),), dynamic_shapes=TOKENS)
    assert "upcycle.moe" in str(program.graph)
    path = tmp_path / "model.onnx"
    made = torch.onnx.export(
        program, dynamo=True, custom_translation_table=TABLE, opset_version=21, verbose=False
    )
    assert made is not None
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for tokens in (1, 2, 23):
        x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens))
        y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).double()
        assert (y - exact(layer, x)).abs().max() <= bound(layer, x)
        wrong = exact(layer, x.roll(1, 1))
        assert (y - wrong).abs().max() > bound(layer, x)


def test_without_the_translation_torch_refuses() -> None:
    program = torch.export.export(moe("swiglu").eval(), (torch.randn(7, 16),))
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"upcycle\.moe"):
        torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False)
