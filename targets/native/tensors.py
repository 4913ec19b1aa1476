"""The tensors of a native checkpoint under their disk names, as other software reads them.

Shape suffixes: E experts, I expert width, D d_model.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from transformers import PreTrainedConfig

from upcycle.errors import UsageError
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import ExpertWeights, MoEWeights
from upcycle.targets.files.tensor_file import TensorEntry
from upcycle.targets.native.architecture import FusedTensors, NativeTarget, TensorRule
from upcycle.targets.native.attention import as_it_is, untied
from upcycle.targets.native.fold_layer import folded, fuse, gate_noise, unfolded, unfuse
from upcycle.targets.native.fold_router import fold_of
from upcycle.targets.native.layers import layer_of


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
        target: the architecture, as `choose` returns it.
        dense_tensors: the dense checkpoint; only shapes are asked for before an entry is read.
        plan: what is converted.
        moe_weights: makes the layer of one spec. Called once per layer if the entries are read in
            order, and one result at a time is kept.
        config: of the dense model.

    Raises:
        UsageError: a tensor of a converted FFN is missing in `dense_tensors`.
    """
    source = target.sources[config.model_type]
    rules = [*source.tensors(config), *(untied() if target.untied else ())]

    def written(spec: MoESpec) -> MoEWeights:
        return folded(moe_weights(spec), fold_of(target, spec), target, spec)

    one_layer = OneLayer(written)
    spec_of = {name: spec for spec in plan.specs for name in spec.ffn.parameters}
    for name, spec in spec_of.items():
        if name not in dense_tensors:
            raise UsageError(f"{name}: the checkpoint lacks this tensor of {spec.ffn.path}")
    done: set[str] = set()
    for name in dense_tensors:
        if name not in spec_of:
            if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints contain
                yield from _dense_entries(name, dense_tensors, rules)
        elif (spec := spec_of[name]).ffn.path not in done:
            done.add(spec.ffn.path)
            layer, dtype = layer_of(spec.ffn, source), dense_tensors[name].dtype
            yield from _moe_entries(target, str(layer), spec, dtype, one_layer)


class OneLayer:
    """Calls `compute` for a spec, and again only after another spec was asked for."""

    def __init__(self, compute: Callable[[MoESpec], MoEWeights]) -> None:
        self._compute = compute
        self._last: tuple[MoESpec, MoEWeights] | None = None

    def __call__(self, spec: MoESpec) -> MoEWeights:
        """The weights of one layer; kept until another is asked for."""
        if self._last is None or self._last[0] is not spec:
            self._last = None  # frees the layer before the next one is made
            self._last = (spec, self._compute(spec))
        return self._last[1]


def _dense_entries(
    name: str, tensors: Mapping[str, torch.Tensor], rules: Sequence[TensorRule]
) -> Iterator[TensorEntry]:
    changes = {
        match.expand(rule.name): rule.change
        for rule in rules
        if (match := re.fullmatch(rule.pattern, name))
    }
    like = torch.empty_like(tensors[name], device="meta")
    for written, change in (changes or {name: as_it_is}).items():

        def read(change: Callable[[torch.Tensor], torch.Tensor] = change) -> torch.Tensor:
            return change(tensors[name])

        made = change(like)
        yield TensorEntry(written, tuple(made.shape), made.dtype, read)


def _moe_entries(
    target: NativeTarget,
    layer: str,
    spec: MoESpec,
    dtype: torch.dtype,
    weights: Callable[[MoESpec], MoEWeights],
) -> Iterator[TensorEntry]:
    count, d_model, width = spec.num_experts, spec.ffn.d_model, spec.width

    def router(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = weights(spec).router.get(name)
        return torch.zeros(shape, dtype=dtype) if found is None else found.to(dtype).reshape(shape)

    router_dtype = target.router_dtype or dtype
    each = (count,) if target.selection_bias_shape == "E" else (1, count)
    tensors: list[tuple[str, str | None, tuple[int, ...], torch.dtype]] = [
        ("weight", target.router, (count, d_model), router_dtype),
        ("bias", target.router_bias, (count,), router_dtype),
        ("selection_bias", target.selection_bias, each, torch.float32),
    ]
    for tensor, name, shape, kind in tensors:
        if name is not None:
            read = partial(router, tensor, shape, kind)
            yield TensorEntry(name.format(layer=layer), shape, kind, read)

    def matrix(role: int, expert: int) -> torch.Tensor:
        experts = weights(spec).experts
        if role == last:
            return experts.down_EOI[expert].to(dtype)
        return experts.up_EGD[expert, role * width : (role + 1) * width].to(dtype)

    def fused(layout: FusedTensors, name: str) -> torch.Tensor:
        return fuse(layout, weights(spec).experts)[name].to(dtype).contiguous()

    arity = len(spec.ffn.expansions)
    layout = target.experts
    if isinstance(layout, FusedTensors):
        with torch.device("meta"):
            empty = ExpertWeights(
                torch.empty(count, arity * width, d_model),
                None,
                torch.empty(count, d_model, width),
                torch.empty(0),
            )
            shapes = {name: tuple(t.shape) for name, t in fuse(layout, empty).items()}
        for name, shape in shapes.items():
            yield TensorEntry(name.format(layer=layer), shape, dtype, partial(fused, layout, name))
    else:
        last = len(layout.matrices) - 1
        for role, stack in enumerate(layout.stacked(layer)):
            shape = (d_model, width) if role == last else (width, d_model)
            for expert in range(count):
                name = layout.name.format(layer=layer, expert=expert, matrix=layout.matrices[role])
                read = partial(matrix, role, expert)
                yield TensorEntry(name, shape, dtype, read, stack)
    yield from _shared_entries(target, layer, spec, dtype, weights)


def _shared_entries(
    target: NativeTarget,
    layer: str,
    spec: MoESpec,
    dtype: torch.dtype,
    weights: Callable[[MoESpec], MoEWeights],
) -> Iterator[TensorEntry]:
    shared = target.shared
    if shared is None or not (shared.always or shared.size(spec)):
        return
    size = shared.size(spec)
    d_model, *up_names, down_name = spec.ffn.d_model, *shared.matrices
    rows = len(spec.ffn.expansions) * size // len(up_names)

    def up(part: int) -> torch.Tensor:
        expert = weights(spec).shared
        if expert is None:
            return torch.empty(rows, d_model, dtype=dtype)
        return expert.up_EGD[0, part * rows : (part + 1) * rows].to(dtype)

    def down() -> torch.Tensor:
        expert = weights(spec).shared
        if expert is None:
            return torch.empty(d_model, 0, dtype=dtype)
        return expert.down_EOI[0].to(dtype)

    def gate() -> torch.Tensor:
        return gate_noise((1, d_model), dtype, spec.generator("gate"))

    for part, name in enumerate(up_names):
        yield TensorEntry(name.format(layer=layer), (rows, d_model), dtype, partial(up, part))
    yield TensorEntry(down_name.format(layer=layer), (d_model, size), dtype, down)
    if shared.gate is not None:
        yield TensorEntry(shared.gate.format(layer=layer), (1, d_model), dtype, gate)


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
