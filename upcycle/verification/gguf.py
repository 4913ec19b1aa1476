"""Tier T3 for GGUF files: every tensor of the file, put together again, against the model's."""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import nn

from upcycle.ir.measured import Check
from upcycle.targets.gguf.read import GgufTensors
from upcycle.targets.gguf.write import Written, exactly
from upcycle.util.copies import copy_of
from upcycle.verification.checks import MISNAMED, STEPS, UNEQUAL, check


def verify_gguf(path: Path, content: Written) -> tuple[Check, ...]:
    """The names, the unrounded tensors bit for bit, and the rounded ones to half a step."""
    file = GgufTensors(path)
    names = {name for place in content.places.values() for name in place.names} | set(content.extra)
    misnamed = len(names ^ set(file.by_name))
    checks = [check(MISNAMED, misnamed, 0)]
    if misnamed:
        return tuple(checks)
    unequal = 0
    steps: list[float] = []
    for name, place in content.places.items():
        expected = content.tensors[name].detach().cpu().float()
        found = file.of_model(content, name)
        kind = file.by_name[place.names[0]].tensor_type
        if kind == GGMLQuantizationType.Q8_0:
            step = place.join([file.steps(part) for part in place.names], expected.shape)
            steps.append(_half_steps(found, expected, step))
        elif not torch.equal(found, exactly(expected, kind)):
            unequal += 1
    for name, tensor in content.extra.items():
        kind = file.by_name[name].tensor_type
        if kind != GGMLQuantizationType.Q8_0:
            unequal += not torch.equal(file[name], exactly(tensor.detach().cpu().float(), kind))
        else:
            steps.append(_half_steps(file[name], tensor.detach().cpu().float(), file.steps(name)))
    checks.append(check(UNEQUAL, unequal, 0))
    if steps:
        checks.append(check(STEPS, max(steps), 1.0))
    return tuple(checks)


def _half_steps(found: torch.Tensor, expected: torch.Tensor, step: torch.Tensor) -> float:
    """The largest error over half a step, apart from what the step loses as a float16.

    A block of 32 weights has the scale max / 127 in float32, by which it is rounded, and the file
    has that scale in float16.
    """
    blocks = expected.reshape(-1, 32)
    exact = blocks.abs().amax(-1, keepdim=True) / 127
    lost = 127 * (exact - step.reshape(-1, 32)[:, :1]).abs()
    error = (found.reshape(-1, 32) - blocks).abs()
    allowed = exact / 2 * (1 + 1e-4) + lost  # products are rounded, too
    return float(torch.where(allowed > 0, error / allowed, error).max())


def with_weights_of(path: Path, model: nn.Module, content: Written) -> nn.Module:
    """A copy of `model` with the weights of the file."""
    file, again = GgufTensors(path), copy_of(model)
    state = {n: file.of_model(content, n).to(t.dtype) for n, t in content.tensors.items()}
    again.load_state_dict(state, strict=False)
    return again
