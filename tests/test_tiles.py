"""Where the processor has tiles of bfloat16 (AMX) torch's products run it, from 16 tokens on."""

from dataclasses import replace
from typing import Any

import onnx_case
import pytest
import torch

import upcycle.kernels
from upcycle.kernels import torch_cpu
from upcycle.kernels.compiled import library
from upcycle.layers.moe import MoE

WHO = (torch_cpu, upcycle.kernels)


@pytest.mark.skipif(library() is None, reason="no GCC 12 or Clang")
@pytest.mark.parametrize(
    ("has_tiles", "dtype", "tokens", "is_compiled"),
    [
        (True, torch.bfloat16, 16, False),
        (True, torch.bfloat16, 15, True),
        (True, torch.float32, 64, True),
        (False, torch.bfloat16, 64, True),
    ],
)
def test_who_multiplies(
    has_tiles: bool,
    dtype: torch.dtype,
    tokens: int,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def watched(name: str) -> Any:
        run = getattr(torch_cpu, name)
        return lambda *given: (asked.append(name), run(*given))[1]

    calls = {name: watched(name) for name in ("run_compiled", "run_routed")}
    for module in WHO:
        for name, call in calls.items():
            monkeypatch.setattr(module, name, call)
    config = replace(onnx_case.moe("swiglu").config, shared=8)
    layer = MoE(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.normal_(generator=draw).div_(parameter.shape[-1] ** 0.5)
    for part in (layer.experts, layer.shared_expert):
        assert part is not None
        part.to(dtype)
    x_TD = torch.randn(tokens, 16, generator=draw).to(dtype)
    found = {}
    for answer in (has_tiles, False):
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.cpu, "_is_amx_tile_supported", lambda answer=answer: answer, raising=False
            )
            torch_cpu.has_tiles.cache_clear()
            asked.clear()
            found[answer] = layer(x_TD)
        assert bool(asked) is (is_compiled or not answer)
    torch_cpu.has_tiles.cache_clear()
    first, last = found[has_tiles].float(), found[False].float()
    # The hidden layer and each expert are rounded to the dtype in torch's products.
    assert (first - last).abs().max() <= 8 * torch.finfo(dtype).eps * last.abs().max()


def test_a_torch_that_cannot_tell_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    torch_cpu.has_tiles.cache_clear()
    assert not torch_cpu.has_tiles()
    torch_cpu.has_tiles.cache_clear()
