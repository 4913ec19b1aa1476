"""Round the linear maps and the experts of a model to 8 or 4 bits.

Shape suffixes: E experts, N rows, K inputs of a row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.quantise import (
    ALPHA,
    SMALLEST,
    Quantised,
    common_group,
    dequantise,
    steps_of,
)
from upcycle.ir.quantise import quantise as quantised
from upcycle.models.moe_layers import MoELayer, moe_layers
from upcycle.targets.compressed import Packed, write_packed

MIN_GROUP = 64
_STACKED = (
    "experts that files of this architecture have in one stack: compressed-tensors has matrices "
    "alone"
)
_ROUTERS = ("router", "gate")  # the child of an MoE layer that chooses


@dataclass(frozen=True)
class Matrix:
    """What rounding did to a matrix.

    Attributes:
        name: of its tensor in the files, without ``.weight``.
        shape: N and K.
        group: inputs that share a scale; all K of a row at most.
        relative: norm of the error over the norm of the matrix.
        steps: the largest error over the step of its group, a half at most but for rounding.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    relative: float
    steps: float


@dataclass(frozen=True)
class Rounded:
    """A model after `quantise`.

    Attributes:
        matrices: one row for each, in the order of the model.
        kept: why a matrix or a stack of them stays as it is, by its name in the model.
    """

    matrices: tuple[Matrix, ...]
    kept: dict[str, str]
    _packed: dict[str, Packed] = field(repr=False)
    _kept_maps: tuple[str, ...] = field(repr=False)

    def write(self, directory: str | Path) -> None:
        """Put the rounded numbers into the files that the model was just saved to."""
        write_packed(Path(directory), self._packed, self._kept_maps)


@torch.no_grad()
def quantise(
    model: Any, bits: int = 8, *, alpha: float = ALPHA, min_group: int = MIN_GROUP
) -> Rounded:
    """Round the weights of the linear maps and of the experts of `model`, in place.

    Symmetric, in groups of inputs, without data. Each linear map has a group size of its own, which
    starts at whole rows and is halved as long as that shrinks the mean range of a group to less
    than `alpha` of it; all experts have one, the smallest that a matrix of theirs asks for, because
    transformers reads one. Routers, norms, embeddings and the head stay. It is not exact: no
    element is off by more than half a step, the largest magnitude of its group over 127 or 7.

    The model keeps floats. To get small files, save it and call `Rounded.write`:

        rounded = quantise(model, bits=4)
        model.save_pretrained(directory)
        rounded.write(directory)

    Args:
        model: of transformers, loaded from a directory, dense or a mixture of experts.
        bits: 8 or 4.
        alpha: 0 keeps whole rows, and 1 makes groups as small as possible.
        min_group: inputs of the smallest group, a power of two from 16 on.

    Raises:
        UsageError: `bits`, `alpha` or `min_group` is out of range.
        UnsupportedError: nothing of the model can be rounded.

    Source:
        Kim et al., "FineQuant", 2023, https://arxiv.org/abs/2308.09723
    """
    _check(bits, alpha, min_group)
    chosen, kept = _chosen(model, min_group if alpha else 1)
    if not chosen:
        reasons = "; ".join(dict.fromkeys(kept.values()))
        raise UnsupportedError(
            f"{type(model).__name__}: nothing of it can be rounded, as it has {reasons} alone"
        )

    def group_of(matrices: Iterator[torch.Tensor]) -> int | None:
        found = common_group(matrices, alpha=alpha, smallest=min_group)
        return None if found is None or found < min_group else found

    experts = [name for name, module in chosen.items() if module is None]
    of_experts = group_of(m for name in experts for m in _in_files(model, name).values())
    packed: dict[str, Packed] = {}
    rows = []
    for name, module in chosen.items():
        weight = model.get_parameter(name)
        block = of_experts if module is None else group_of(iter([weight]))
        for stored, matrix_NK in _in_files(model, name).items():
            found, floats_NK = _rounded(matrix_NK, bits, block)
            rows.append(_row(stored, matrix_NK, found, floats_NK))
            shape = (matrix_NK.shape[0], matrix_NK.shape[1])
            packed[stored] = Packed(shape, _on_cpu(found), module)
        if module is not None:
            weight.copy_(floats_NK)
            continue
        for matrix_NK in weight:  # rows are rounded each by itself, so these are those of the files
            matrix_NK.copy_(_rounded(matrix_NK, bits, block)[1])
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return Rounded(tuple(rows), kept, packed, tuple(sorted(maps - set(chosen.values()))))


def _check(bits: int, alpha: float, min_group: int) -> None:
    if bits not in (8, 4):
        raise UsageError(f"bits: {bits}: choose 8 or 4")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha: {alpha} is no part of a range; choose 0 to 1")
    if min_group < SMALLEST or min_group & (min_group - 1):
        raise UsageError(f"min_group: {min_group}: choose a power of two from {SMALLEST} on")


def _store_experts(model: Any, *, apart: bool) -> None:
    """Let a loaded model save its experts one by one, if its class can read that, or in stacks.

    Saved it is under the names that it was loaded from. Of a quantised model transformers reads
    single matrices that are packed alone, so others have to be in stacks.
    """

    def is_of_experts(conversion: Any) -> bool:
        is_converter = isinstance(conversion, WeightConverter)
        return is_converter and "experts" in conversion.target_patterns[0]

    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        possible = get_model_conversion_mapping(model, add_legacy=False) if apart else []
        others = [conversion for conversion in used if not is_of_experts(conversion)]
        model._weight_conversions = [*others, *filter(is_of_experts, possible)]


def _in_files(model: Any, name: str) -> dict[str, torch.Tensor]:
    """What the files have of a parameter, by the names there."""
    found: dict[str, torch.Tensor] = revert_weight_conversion(
        model, {name: model.get_parameter(name).detach()}
    )
    return found


def _chosen(model: Any, smallest: int) -> tuple[dict[str, str | None], dict[str, str]]:
    """The parameters to round, with the linear map of each or None for experts; and the others.

    The others are all other matrices, with the reason. Experts are rounded all or not at all.
    """
    _store_experts(model, apart=True)
    layers = moe_layers(model)
    chosen: dict[str, str | None] = {}
    kept: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        if parameter.dim() < 2 or own.endswith("bias"):
            continue
        reason = _reason(model, layers, model.get_submodule(path), name, parameter)
        columns = parameter.shape[-1]
        if reason is None and columns > smallest > math.gcd(columns, 2**30):
            reason = f"rows of {columns}, which no group from {smallest} on divides"
        if reason is None:
            chosen[name] = None if parameter.dim() == 3 else path
        else:
            kept[name] = reason
    stacks = [name for layer in layers for name in _stacks(model, layer)]
    reason = next((kept[name] for name in stacks if name in kept), None)
    if reason is not None:
        _store_experts(model, apart=False)
        chosen = {name: module for name, module in chosen.items() if name not in stacks}
        kept |= dict.fromkeys(stacks, reason)
    return chosen, kept


def _stacks(model: Any, layer: MoELayer) -> list[str]:
    """The names of the stacks of matrices of a layer's experts."""
    names = dict(layer.experts.named_parameters(recurse=False))
    path = next(path for path, module in model.named_modules() if module is layer.experts)
    return [f"{path}.{name}" for name, stack in names.items() if stack.dim() == 3]


def _reason(
    model: Any, layers: Sequence[MoELayer], module: nn.Module, name: str, weight: nn.Parameter
) -> str | None:
    """Why a parameter is not rounded; None if it is."""
    stored = _in_files(model, name)
    rows = [(file, t.dim(), t.shape[-1]) for file, t in stored.items()]
    if module in [layer.experts for layer in layers] and weight.dim() == 3:
        are_matrices = all(
            file.endswith(".weight") and dim == 2 and columns == weight.shape[2]
            for file, dim, columns in rows
        )
        return None if are_matrices else _STACKED
    if any(name.startswith(f"{layer.path}.{word}.") for layer in layers for word in _ROUTERS):
        return "a router"
    if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
        return "an embedding or the head"
    if type(module) is not nn.Linear or weight.dim() != 2 or len(rows) != 1:
        return f"a {type(module).__name__}"
    if min(weight.shape) < SMALLEST:
        return f"a map with a side below {SMALLEST}"
    return None


def _rounded(
    matrix_NK: torch.Tensor, bits: int, block: int | None
) -> tuple[Quantised, torch.Tensor]:
    """A matrix in few bits, and in float32 again."""
    (found,) = quantised([matrix_NK[None]], bits, block or "row")
    return found, dequantise(found, matrix_NK.shape[1])[0]


def _on_cpu(found: Quantised) -> Quantised:
    return replace(found, packed=found.packed.cpu(), scale=found.scale.cpu())


def _row(stored: str, matrix_NK: torch.Tensor, found: Quantised, floats_NK: torch.Tensor) -> Matrix:
    rows, columns = matrix_NK.shape
    error_NK = floats_NK - matrix_NK
    steps = (error_NK / steps_of(found, columns)[0]).abs().max()
    return Matrix(
        name=stored.removesuffix(".weight"),
        shape=(rows, columns),
        bits=found.bits,
        group=found.block or columns,
        relative=float(error_NK.norm() / matrix_NK.norm(dtype=torch.float32).clamp(min=1e-30)),
        steps=float(steps),
    )
