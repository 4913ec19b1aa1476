"""The tensors of a native checkpoint: one 2-D tensor per expert and matrix, under its disk names.

transformers fuses them on loading, and vLLM, SGLang and llama.cpp read them as they are.

Shape suffixes: E experts, I expert width, D d_model.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from upcycle.errors import UsageError
from upcycle.spec import MoESpec, Plan
from upcycle.targets.native.layers import layer_index
from upcycle.targets.native.native import NativeTarget
from upcycle.targets.tensor_file import TensorEntry
from upcycle.weights import MoEWeights


def entries(
    target: NativeTarget,
    dense_tensors: Mapping[str, torch.Tensor],
    plan: Plan,
    moe_weights: Callable[[MoESpec], MoEWeights],
) -> Iterator[TensorEntry]:
    """Every tensor of the checkpoint, in the order of the dense one.

    The MoE layer stands where the first tensor of its FFN stood: the router, then gate, up and
    down of all experts, each a stack named after its weights without the number of the expert.

    Args:
        target: the architecture.
        dense_tensors: the dense checkpoint; only shapes are asked for before an entry is read.
        plan: what is converted.
        moe_weights: makes the layer of one spec. Called once per layer if the entries are read in
            order, and one result at a time is kept.

    Raises:
        UsageError: a tensor of a converted FFN is missing in `dense_tensors`.
    """
    one_layer = OneLayer(moe_weights)
    spec_of = {name: spec for spec in plan.specs for name in spec.ffn.parameters}
    for name, spec in spec_of.items():
        if name not in dense_tensors:
            raise UsageError(f"{name}: the checkpoint lacks this tensor of {spec.ffn.path}")
    done: set[str] = set()
    for name in dense_tensors:
        if name in spec_of:
            spec = spec_of[name]
            if spec.ffn.path not in done:
                done.add(spec.ffn.path)
                yield from _moe_entries(target, spec, dense_tensors[name].dtype, one_layer)
        elif not name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints contain
            yield _dense_entry(name, dense_tensors)


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


def _dense_entry(name: str, tensors: Mapping[str, torch.Tensor]) -> TensorEntry:
    tensor = tensors[name]
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensors[name])


def _moe_entries(
    target: NativeTarget,
    spec: MoESpec,
    dtype: torch.dtype,
    weights: Callable[[MoESpec], MoEWeights],
) -> Iterator[TensorEntry]:
    layer = layer_index(spec.ffn)
    d_model, width = spec.ffn.d_model, spec.width

    def router() -> torch.Tensor:
        return weights(spec).router["weight"].to(dtype)

    def matrix(role: int, expert: int) -> torch.Tensor:
        experts = weights(spec).experts
        if role == 2:
            return experts.down_EOI[expert].to(dtype)
        return experts.up_EGD[expert, role * width : (role + 1) * width].to(dtype)

    name, *stacks = stack_names(target, layer)
    yield TensorEntry(name, (spec.num_experts, d_model), dtype, router)
    for role, (word, stack) in enumerate(zip(target.matrices, stacks, strict=True)):
        shape = (d_model, width) if role == 2 else (width, d_model)
        for expert in range(spec.num_experts):
            yield TensorEntry(
                name=target.expert.format(layer=layer, expert=expert, matrix=word),
                shape=shape,
                dtype=dtype,
                read=partial(matrix, role, expert),
                stack=stack,
            )


def stack_names(target: NativeTarget, layer: int | None) -> list[str]:
    """Names of the router, and of gate, up and down of all experts as stacks [E, ...]."""
    stacks = [
        target.expert.format(layer=layer, expert="{expert}", matrix=word).replace("{expert}.", "")
        for word in target.matrices
    ]
    return [target.router.format(layer=layer), *stacks]
