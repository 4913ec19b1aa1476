"""What rounding did to the matrices of an ONNX file beside the experts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from upcycle.ir.measured import Check, Matrices
from upcycle.onnx.tensors import numbers_of, tensor_of
from upcycle.targets.onnx.forms.int8 import SCALE, SUFFIX, Int8, lift_constants
from upcycle.util.modules import set_within
from upcycle.verification.checks import HALF_STEP, ROUNDED_WEIGHTS, worst_at


def rounded_matrices(path: Path) -> Iterator[tuple[str, Int8]]:
    """The rounded matrices [N, K] of a file by name, one after the other."""
    values = ir.load(path).graph.initializers
    for name, value in values.items():
        if name.endswith(SUFFIX) and len(value.shape or ()) == 2:
            yield (
                name.removesuffix(SUFFIX),
                Int8(numbers_of(value), numbers_of(values[name + SCALE])),
            )


def verify_matrices(
    paths: Sequence[Path], floats: Mapping[str, torch.Tensor]
) -> tuple[Matrices | None, list[Check]]:
    """Facts of the rounded matrices of files, and the check that each is one of `floats`.

    That is: no element is further from it than half a step. Names differ between a graph and a
    model, so the float matrix is the nearest one; that each is in its place shows in the outputs.
    """
    worst: dict[str, float] = {}
    size, before = 0, 0
    for path in paths:
        for name, found in rounded_matrices(path):
            gaps = (_half_steps(found, tensor) for _, tensor in _alike(found, floats))
            worst[name] = min(gaps, default=torch.inf)
            size += found.numbers.nbytes + found.scale.nbytes
            before += found.numbers.numel() * found.scale.element_size()
    if not worst:
        return None, []
    names = sorted(worst, key=worst.__getitem__)
    checks = [worst_at(ROUNDED_WEIGHTS, {name: worst[name] for name in names}, HALF_STEP)]
    return Matrices(len(worst), before, size, worst[names[-1]]), checks


def put_matrices(undo: ExitStack, path: Path, model: nn.Module) -> None:
    """Give `model` the rounded matrices of a file, until `undo` closes."""
    named = matrices_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for _, found in rounded_matrices(path):
        for name, tensor in _alike(found, named):
            if _half_steps(found, tensor) <= HALF_STEP:
                rounded = found.floats()
                rounded = rounded if tensor is named[name] else rounded.T
                set_within(undo, parameters[name], "data", rounded.to(tensor))


def matrices_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its matrices by name; one that is used twice is there once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t.detach() for name, t in tensors.items() if t.dim() == 2}


def graph_matrices(model: ir.Model) -> dict[str, torch.Tensor]:
    """The float matrices of a graph by name."""
    lift_constants(model)
    values = model.graph.initializers.values()
    found = {str(v.name): tensor_of(v) for v in values if v.shape is not None and len(v.shape) == 2}
    return {n: t for n, t in found.items() if t is not None and t.is_floating_point()}


def _alike(found: Int8, floats: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The float matrices of this shape, also transposed, whose first row is near, or all."""
    shape, first = found.numbers.shape, Int8(found.numbers[:1], found.scale[:1])
    same = [
        (name, tensor)
        for name, given in floats.items()
        for tensor in (given, given.T)
        if tensor.shape == shape
    ]
    near = [pair for pair in same if _half_steps(first, pair[1][:1]) <= HALF_STEP]
    yield from near or same


def _half_steps(found: Int8, floats: torch.Tensor) -> float:
    return float((2 * (found.floats() - floats.float()).abs() / found.steps()).max())
