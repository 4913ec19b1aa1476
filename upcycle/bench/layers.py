"""Converted layers and their dense FFNs as functions of tokens, in torch.

Shape suffixes: T tokens, D d_model, O d_out, K chosen experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import outputs_of
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import read_ffn
from upcycle.layers.moe import MoE

Layer = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Pair:
    """A dense FFN and its layer, both as functions of tokens [T, D].

    `visited` counts the experts that at least one of the tokens visits.
    """

    spec: MoESpec
    dense: Layer
    converted: Layer
    visited: Callable[[torch.Tensor], int]

    def calls(self, x_TD: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """Calls that run both on these tokens."""
        return {"dense": lambda: self.dense(x_TD), "converted": lambda: self.converted(x_TD)}


def converted_layer(model: nn.Module, spec: MoESpec) -> nn.Module:
    """The layer in a loaded model: an `MoE`, or the block of a native architecture.

    Raises:
        AttributeError: there is none.
    """
    if spec.ffn.placement != "module":
        return model.get_submodule(spec.ffn.place)
    parent, _, name = spec.ffn.path.rpartition(".")
    beside = dict(model.get_submodule(parent).named_children())
    beside = {name: beside.pop(name), **beside} if name in beside else beside
    for layer in beside.values():  # the name may differ in a native architecture
        if isinstance(layer, MoE) or hasattr(layer, "experts") or hasattr(layer, "router"):
            return layer
    raise AttributeError(f"{spec.ffn.path} has no experts")


def pair(dense: nn.Module, converted: nn.Module, spec: MoESpec) -> Pair:
    """One layer in both models."""
    ffn = read_ffn(spec.ffn, dict(dense.named_parameters(remove_duplicate=False)))
    layer = converted_layer(converted, spec)

    def run(x_TD: torch.Tensor) -> Any:
        if isinstance(layer, MoE):
            layer.router.stand_in(len(x_TD))
            return layer.tokens(x_TD)
        return layer(x_TD[None])

    def visited(x_TD: torch.Tensor) -> int:
        with _visited_experts(layer) as seen:
            run(x_TD)
        return min(spec.num_experts, len(x_TD) * spec.top_k, *seen)

    return Pair(spec, ffn, run, visited)


@contextmanager
def _visited_experts(layer: nn.Module) -> Iterator[list[int]]:
    """How many experts are visited in each run of `layer` within it, where their inputs tell."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor)]
        index = [t for t in given if t.dtype == torch.int64]
        if len(index) == 1:
            weights = [t for t in given if t.is_floating_point() and t.shape == index[0].shape]
            chosen = index[0][weights[0] != 0] if len(weights) == 1 else index[0]
            seen.append(len(set(chosen.flatten().tolist())))

    experts = getattr(layer, "experts", None)
    if not isinstance(experts, nn.Module):
        yield seen
        return
    with experts.register_forward_pre_hook(note, with_kwargs=True):
        yield seen


def inputs_of(
    model: nn.Module, spec: MoESpec, batches: Sequence[ExampleInputs], count: int
) -> torch.Tensor:
    """Tokens [count, D] that the FFN gets in the dense model; repeated if `batches` have fewer."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().movedim(spec.ffn.axis, -1)
        seen.append(x.reshape(-1, x.shape[-1]))

    first = model.get_submodule(spec.ffn.expansions[0].module)
    with first.register_forward_pre_hook(note):
        for batch in batches:
            outputs_of(model, batch)
            if sum(map(len, seen)) >= count:
                break
    x_TD = torch.cat(seen)
    return x_TD.repeat(-(-count // len(x_TD)), 1)[:count]
