"""A decoder with its cache as inputs and outputs, named as optimum names them, is still one."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_onnx_in import convert, located
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")

D, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 50
# As in test_onnx_in.py; keys and values of the first layer go through the second.
TOLERANCE = 1e-5


class Block(nn.Module):
    """Attention that appends its keys and values to those of the past, and a SwiGLU FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.gate, self.up = nn.Linear(D, 64, bias=False), nn.Linear(D, 64, bias=False)
        self.down = nn.Linear(64, D, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, past: Any) -> Any:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = ((q @ k.transpose(2, 3)) * (D // HEADS) ** -0.5 + mask).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), k, v


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, D), nn.Embedding(64, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(D, VOCABULARY)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = self.tokens(ids) + self.positions(positions)
        keys = mask.cumsum(-1)[:, None, None, :] - 1
        hidden = (keys > positions[:, None, :, None]) | (mask[:, None, None, :] == 0)
        bias = hidden.to(x.dtype) * -1e9
        present: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            x, *made = block(x, bias, past[2 * i : 2 * i + 2])
            present += made
        return self.head(x), *present


def export(path: Path) -> Path:
    torch.manual_seed(0)
    model = Decoder().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    past = [f"past_key_values.{i}.{what}" for i in range(LAYERS) for what in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *past]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    line = {0: "batch_size", 1: "sequence_length"}
    longer = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
    axes = {"input_ids": line, "position_ids": line, "attention_mask": longer, "logits": line}
    axes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in past}
    axes |= {name: {0: "batch_size", 2: longer[1]} for name in outputs[1:]}
    ids, cache = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, HEADS, 4, D // HEADS)
    example = (ids, torch.ones(2, 7, dtype=torch.long), ids, *[cache] * len(past))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, example, path, dynamo=False, input_names=names, output_names=outputs,
            dynamic_axes=axes,
        )  # fmt: skip
    return path


def decode(path: Path, tokens: Any, step: int) -> Any:
    """Logits of all positions, `step` tokens at a time, with the cache handed on."""
    session = onnxruntime.InferenceSession(path)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros((len(tokens), shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values")
    }
    logits = []
    for start in range(0, tokens.shape[1], step):
        ids = tokens[:, start : start + step]
        end = start + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), end), np.int64),
            "position_ids": np.arange(start, end)[None].repeat(len(ids), 0),
        }
        names = [value.name for value in session.get_outputs()]
        made = dict(zip(names, session.run(None, feeds | past), strict=True))
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
        logits.append(made["logits"])
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("recipe", ["split-all", "sparse-upcycling"])
def test_it_decodes_step_by_step_as_before(recipe: str, tmp_path: Path) -> None:
    path = export(tmp_path / "dense.onnx")
    assert [ffn.pointwise.name for ffn in located(path).ffns] == ["swiglu"] * LAYERS
    convert(path, tmp_path / "out", recipe, "experts.count=4")
    made = tmp_path / "out" / "model.onnx"
    sessions = [onnxruntime.InferenceSession(file) for file in (path, made)]
    for values in ("get_inputs", "get_outputs"):
        before, after = (
            [(v.name, v.type, v.shape) for v in getattr(s, values)()] for s in sessions
        )
        assert before == after
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 11))
    whole = decode(path, tokens, 11)
    largest = np.abs(whole).max()
    for step in (1, 4, 11):
        assert np.abs(decode(made, tokens, step) - whole).max() <= TOLERANCE * largest
    forgetful = decode(path, tokens[:, 6:], 5)  # the past matters
    assert np.abs(forgetful - whole[:, 6:]).max() > 1e-2 * largest
