"""The tensors of a native checkpoint under their disk names, as other software reads them.

Shape suffixes: E experts, I expert width, D d_model.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedConfig

from upcycle.errors import UsageError
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import ExpertWeights, MoEWeights
from upcycle.targets.files.tensor_file import TensorEntry
from upcycle.targets.native.architecture import FusedTensors, NativeTarget, TensorRule
from upcycle.targets.native.attention import untied
from upcycle.targets.native.fold_layer import (
    folded,
    fuse,
    gate_noise,
    shared_on_disk,
    unfolded,
    unfuse,
)
from upcycle.targets.native.fold_router import fold_of
from upcycle.targets.native.layers import layer_of

_T = TypeVar("_T")


def entries(
    target: NativeTarget,
    dense_tensors: Mapping[str, torch.Tensor],
    plan: Plan,
    moe_weights: Callable[[MoESpec], MoEWeights],
    config: PreTrainedConfig,
) -> Iterator[TensorEntry]:
    """Every tensor of the checkpoint, in the order of the dense one.

    The MoE layer stands where the first tensor of its FFN stood: the router, then gate, up and
    down of all experts, each a stack (see `Stacks.stacked`), then the shared expert.

    Args:
        target: the architecture, as `choose` returns it for `plan` and the dense `config`.
        dense_tensors: the dense checkpoint; only shapes are asked for before an entry is read.
        moe_weights: makes the layer of one spec. Called once per layer if the entries are read in
            order, and one result at a time is kept.

    Raises:
        UsageError: a tensor of a converted FFN is missing in `dense_tensors`.
    """
    source = target.sources[config.model_type]
    rules = [*source.tensors(config), *(untied() if target.untied else ())]
    dtypes: dict[str, torch.dtype] = {}  # by path, of the FFNs whose layer was written

    def tensors(spec: MoESpec) -> dict[str, torch.Tensor]:
        weights = folded(moe_weights(spec), fold_of(target, spec), target, spec)
        on_disk = _on_disk(target, spec, weights, dtypes[spec.ffn.path])
        return {name: tensor for name, tensor, _, _ in on_disk}

    one_layer = OneLayer(tensors)

    def read(spec: MoESpec, name: str, dtype: torch.dtype) -> torch.Tensor:
        return one_layer(spec)[name].to(dtype).contiguous()

    spec_of = {name: spec for spec in plan.specs for name in spec.ffn.parameters}
    for name, spec in spec_of.items():
        if name not in dense_tensors:
            raise UsageError(f"{name}: the checkpoint lacks this tensor of {spec.ffn.path}")
    for name in dense_tensors:
        if name not in spec_of:
            if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints contain
                yield from _dense_entries(name, dense_tensors, rules)
        elif (spec := spec_of[name]).ffn.path not in dtypes:
            dtype = dtypes[spec.ffn.path] = dense_tensors[name].dtype
            shapes = _on_disk(target, spec, _without_numbers(target, spec), dtype)
            for written, empty, kind, stack in shapes:
                read_it = partial(read, spec, written, kind)
                yield TensorEntry(written, tuple(empty.shape), kind, read_it, stack)


class OneLayer(Generic[_T]):
    """Calls `compute` for a spec, and again only after another spec was asked for."""

    def __init__(self, compute: Callable[[MoESpec], _T]) -> None:
        self._compute = compute
        self._last: tuple[MoESpec, _T] | None = None

    def __call__(self, spec: MoESpec) -> _T:
        """What `compute` returned, kept until another spec is asked for."""
        if self._last is None or self._last[0] is not spec:
            self._last = None  # frees the layer before the next one is made
            self._last = (spec, self._compute(spec))
        return self._last[1]


def _dense_entries(
    name: str, tensors: Mapping[str, torch.Tensor], rules: Sequence[TensorRule]
) -> Iterator[TensorEntry]:
    matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
    written = {match.expand(rule.name): rule for rule, match in matches}
    like = torch.empty_like(tensors[name], device="meta")
    for new, rule in (written or {name: TensorRule(name, name)}).items():

        def read(rule: TensorRule = rule) -> torch.Tensor:
            return rule.change(tensors[name])

        made = rule.change(like)
        yield TensorEntry(new, tuple(made.shape), made.dtype, read)


def _without_numbers(target: NativeTarget, spec: MoESpec) -> MoEWeights:
    """The experts as `folded` returns them, on the meta device."""
    count, d_model, width = spec.num_experts, spec.ffn.d_model, spec.width
    with torch.device("meta"):
        up_EGD = torch.empty(count, len(spec.ffn.expansions) * width, d_model)
        down_EOI = torch.empty(count, d_model, width)
    experts = ExpertWeights(up_EGD, None, down_EOI, torch.empty(0))
    weights = MoEWeights(experts, {}, None)
    return replace(weights, shared=shared_on_disk(weights, target, spec))


def _on_disk(
    target: NativeTarget, spec: MoESpec, weights: MoEWeights, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, torch.dtype, str | None]]:
    """Name, content (not yet cast), dtype and stack of each tensor of a layer."""
    (source,) = target.sources.values()
    layer = str(layer_of(spec.ffn, source))
    count, d_model = spec.num_experts, spec.ffn.d_model
    router_dtype = target.router_dtype or dtype
    each = (count,) if target.selection_bias_shape == "E" else (1, count)
    for key, name, shape, kind in (
        ("weight", target.router, (count, d_model), router_dtype),
        ("bias", target.router_bias, (count,), router_dtype),
        ("selection_bias", target.selection_bias, each, torch.float32),
    ):
        if name is not None:
            found = weights.router.get(key)
            tensor = torch.zeros(shape) if found is None else found.reshape(shape)
            yield name.format(layer=layer), tensor, kind, None
    layout, shared = target.experts, target.shared
    if isinstance(layout, FusedTensors):
        for name, tensor in fuse(layout, weights.experts).items():
            yield name.format(layer=layer), tensor, dtype, None
    else:
        matrices = _matrices(weights.experts, len(layout.matrices))
        for word, matrix_E, stack in zip(
            layout.matrices, matrices, layout.stacked(layer), strict=True
        ):
            for expert, matrix in enumerate(matrix_E):
                name = layout.name.format(layer=layer, expert=expert, matrix=word)
                yield name, matrix, dtype, stack
    if shared is None or weights.shared is None:
        return
    matrices = _matrices(weights.shared, len(shared.matrices))
    for name, (matrix,) in zip(shared.matrices, matrices, strict=True):
        yield name.format(layer=layer), matrix, dtype, None
    if shared.gate is not None:
        gate = gate_noise((1, d_model), dtype, spec.generator("gate"))
        yield shared.gate.format(layer=layer), gate, dtype, None


def _matrices(weights: ExpertWeights, count: int) -> tuple[torch.Tensor, ...]:
    """The matrices [E, ...] of experts on disk: `count` - 1 expansions and the contraction."""
    return *weights.up_EGD.chunk(count - 1, dim=1), weights.down_EOI


def read_native(
    target: NativeTarget, spec: MoESpec, read: Callable[[str], torch.Tensor]
) -> MoEWeights:
    """The layer of the recipe out of what `entries` wrote; without its provenance.

    `read` returns a tensor, or a stack of them, by its name in the files.
    """
    (source,) = target.sources.values()
    layer = str(layer_of(spec.ffn, source))

    def tensor(name: str) -> torch.Tensor:
        return read(name.format(layer=layer))

    if isinstance(target.experts, FusedTensors):
        up_EGD, down_EDI = unfuse(target.experts, tensor)
    else:
        *ups, down_EDI = map(read, target.experts.stacked(layer))
        up_EGD = torch.cat(ups, dim=1)
    padding = torch.full((spec.num_experts, spec.width), -1)
    router = {"weight": tensor(target.router).float()}
    if target.router_bias is not None:
        router["bias"] = tensor(target.router_bias).float()
    if target.selection_bias is not None:
        router["selection_bias"] = tensor(target.selection_bias).flatten()
    shared = None
    if target.shared is not None and (size := target.shared.size(spec)):
        *ups, down = (tensor(name) for name in target.shared.matrices)
        none = torch.full((1, size), -1)
        shared = ExpertWeights(torch.cat(ups)[None], None, down[None], none)
    made = MoEWeights(ExpertWeights(up_EGD, None, down_EDI, padding), router, None, shared)
    return unfolded(made, fold_of(target, spec), target, spec)
