"""Try the located FFNs: does the model still run with layers in their places?

A graph does not show what other Python code reads from a module, such as the dtype of a weight
inside, or what it does with a hidden tensor of width zero. So the model is captured once more with
layers that compute nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType

import torch
from torch import fx, nn

from upcycle.capture.capture import ExampleInputs, capture
from upcycle.capture.recorder import Program
from upcycle.capture.source_lines import source_of
from upcycle.errors import CaptureError, first_line
from upcycle.graphs.install import install
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.ir.spec import site_of
from upcycle.layers.config import LayerConfig, RouterConfig, SelectConfig
from upcycle.layers.moe import MoE
from upcycle.passes.locate.place import Way, Ways, pattern_of
from upcycle.util.copies import state_restored

Find = Callable[[Ways], Located]
_OTHER_WAYS: tuple[Way, ...] = ("tap", "wide tap")

Fault = Callable[[Sequence[FFN]], str | None]  # why the model does not run with these converted


def tried(find: Find, fault: Fault) -> Located:
    """What `find` gives, with each FFN placed so that the model runs; those that cannot be refused.

    FFNs of equal blocks are treated alike.
    """
    located = find({})
    if not located.ffns or fault(located.ffns) is None:
        return located
    ways: dict[str, Way] = {}
    refused: dict[str, str] = {}
    for pattern in dict.fromkeys(pattern_of(ffn.path) for ffn in located.ffns):
        reason = fault(_of(located, pattern))
        if reason is None:
            continue
        for way in _OTHER_WAYS:
            others = _of(find({pattern: way}), pattern)
            if others and others != _of(located, pattern) and fault(others) is None:
                ways[pattern] = way
                break
        else:
            refused[pattern] = reason
    located = find(ways)
    kept = tuple(ffn for ffn in located.ffns if pattern_of(ffn.path) not in refused)
    reason = fault(kept) if kept else None
    if reason is not None:
        refused |= {pattern_of(ffn.path): reason for ffn in kept}
    misses = tuple(
        Miss(ffn.path, f"without its modules the model does not run ({reason})")
        for ffn in located.ffns
        if (reason := refused.get(pattern_of(ffn.path)))
    )
    ffns = tuple(ffn for ffn in located.ffns if pattern_of(ffn.path) not in refused)
    return replace(located, ffns=ffns, misses=(*located.misses, *misses))


def _of(located: Located, pattern: str) -> tuple[FFN, ...]:
    return tuple(ffn for ffn in located.ffns if pattern_of(ffn.path) == pattern)


def fault_of(
    model: nn.Module,
    example: ExampleInputs,
    program: Program,
    ffns: Sequence[FFN],
    *,
    repeat_blocks: bool,
) -> str | None:
    """Why `model`, which is left as it was, does not run on `example` with layers for `ffns`.

    `program` is what it does without them; the shapes of its outputs must be the same.
    """
    if isinstance(model, fx.GraphModule):  # a graph is no attribute, which could be restored
        model = fx.GraphModule(model, model.graph)
    with state_restored(model):
        with torch.device("meta"):
            layers = install(model, [site_of(ffn, _smallest(ffn)) for ffn in ffns])
        for layer in layers:
            vars(layer)["tokens"] = MethodType(_no_numbers, layer)
        try:
            other = capture(model, example, repeat_blocks=repeat_blocks)
        except CaptureError as refusal:
            error = refusal.__cause__ or refusal
            where = source_of(error)
            at = f" at {where}" if where else ""
            return f"{type(error).__name__}{at}: {first_line(error)}"
    if _shapes(other) != _shapes(program):
        return "its outputs get other shapes"
    return None


def _no_numbers(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.new_zeros(x_TD.shape[0], layer.config.d_out)


def _smallest(ffn: FFN) -> LayerConfig:
    """A layer with one expert."""
    select = SelectConfig(rule="top_k", k=1)
    router = RouterConfig(
        kind="linear", num_experts=1, d_model=ffn.d_model, select=select, weights="one", scale=1.0
    )
    return LayerConfig(
        num_experts=1,
        width=ffn.d_ff,
        d_model=ffn.d_model,
        d_out=ffn.d_out,
        axis=ffn.axis,
        pointwise=ffn.pointwise,
        up_bias=ffn.has_up_bias,
        output_bias=ffn.contraction.bias is not None,
        router=router,
        hidden_dropout=ffn.hidden_dropout,
        output_dropout=ffn.output_dropout,
    )


def _shapes(program: Program) -> list[tuple[int, ...]]:
    output = next(node for node in program.graph.nodes if node.op == "output")
    return [node.meta["shape"] for node in output.all_input_nodes]
