"""How the layer of an FFN is put into a model: in the place of a module, or of its linear maps.

A module is replaced only if it is exactly the FFN in *every* call, and nothing but one tensor goes
in and comes out. Else each linear map must be a module, of which one hands its input over and one
computes (`upcycle.layers.tap`); these may apply what is pointwise, too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import fx

from upcycle.capture.recorder import Call, Program, op_name
from upcycle.ir.ffn import FFN
from upcycle.passes.locate.hidden_tensor import HiddenTensor, NearMissError, data_of, dropout_of
from upcycle.passes.locate.linear import LinearMap, linear_map
from upcycle.passes.locate.region import VIEWS, through_views


@dataclass(frozen=True)
class Use:
    """One place of a model where it applies an FFN.

    Attributes:
        ffn: what it computes there; how it is placed is not known yet.
        hidden: its hidden tensor.
        contraction: ends it.
        output: the node that holds what it gives, bias included.
    """

    ffn: FFN
    hidden: HiddenTensor
    contraction: LinearMap
    output: fx.Node

    @property
    def x(self) -> fx.Node:
        """What the linear maps read."""
        return self.hidden.expansions[0].linear.x

    @property
    def nodes(self) -> list[fx.Node]:
        """The linear maps."""
        return [*(e.linear.node for e in self.hidden.expansions), self.contraction.node]


def pattern_of(path: str) -> str:
    """The path with a star for each number: the same for the FFNs of equal blocks."""
    return re.sub(r"\d+", "*", path)


# What is tried one after the other: the FFN's module is replaced, its linear maps are tapped, or
# tapped with a hidden tensor as wide as it was.
Way = Literal["module", "tap", "wide tap"]
Ways = Mapping[str, Way]  # of the FFNs whose paths have a pattern; of others the first that fits


def placed(program: Program, uses: Sequence[Use], ways: Ways) -> FFN:
    """The FFN that the model applies at `uses`, with the way to place its layer.

    Args:
        program: what was recorded.
        uses: of the same weights, in the order in which they run.
        ways: how to place it.

    Raises:
        NearMissError: the uses are not one function, or no module could be put into its place.
    """
    ffn = uses[0].ffn
    for use in uses[1:]:
        if use.ffn.pointwise != ffn.pointwise:
            raise NearMissError(
                "its weights are applied with two activations, or two scales of the hidden tensor: "
                "give each its own weights",
                use.contraction.node,
            )
        if _slices(use.ffn) != _slices(ffn):
            raise NearMissError(
                "its weights are applied in two ways, with other rows or columns: give each its "
                "own weights",
                use.contraction.node,
            )
    way = ways.get(pattern_of(ffn.path), "module")
    if ffn.path and not ffn.shared and way == "module":
        dropout = _dropout_of_module(program, uses)
        if dropout is not None:
            return replace(ffn, placement="module", output_dropout=dropout)
    return _tapped(program, uses, wide=way == "wide tap")


def _slices(ffn: FFN) -> object:
    projections = (*ffn.expansions, ffn.contraction)
    return ffn.axis, [(p.weight, p.rows, p.columns, p.transposed) for p in projections]


def _dropout_of_module(program: Program, uses: Sequence[Use]) -> float | None:
    """The output dropout if the module of the FFN computes exactly it in every call, or None."""
    fits: dict[fx.Node, float] = {}
    calls = [call for call in program.calls.get(uses[0].ffn.path, []) if not call.replayed]
    for call in calls:
        for use in uses:
            dropout = dropout_of_call(call, use)
            if dropout is not None:
                fits[use.contraction.node] = dropout
                break
        else:
            return None
    return next(iter(fits.values())) if len(set(fits.values())) == 1 else None


def dropout_of_call(call: Call, use: Use) -> float | None:
    """The output dropout if a call of a module is exactly `use` of an FFN, or None."""
    if (
        not call.plain
        or not call.inputs
        or through_views(call.inputs[0]) is not through_views(use.x)
    ):
        return None
    shape = list(call.inputs[0].meta["shape"])
    shape[use.ffn.axis] = use.ffn.d_out
    same = tuple(shape) == call.outputs[0].meta["shape"]
    return _dropout_between(use.output, call.outputs[0]) if same else None


def _dropout_between(output: fx.Node, end: fx.Node) -> float | None:
    """The dropout on the way from `output` to `end`, or None if more than views lies between."""
    total = 0.0
    while end is not output:
        if end.op != "call_function" or op_name(end.target) not in VIEWS:
            return None
        if op_name(end.target) == "dropout":
            more = dropout_of(end)
            total += more - total * more
        end = data_of(end)
    return total


def _tapped(program: Program, uses: Sequence[Use], *, wide: bool) -> FFN:
    """The FFN with a tap for each expansion, and a module that computes it."""
    for use in uses:
        _check_unchanged(program, use)
    shared = any(use.ffn.shared for use in uses)
    found = [_modules(program, use, exact=shared) for use in uses]
    _check_turns(program, uses[0])
    ffn = uses[0].ffn
    paths = [p.module for p in (*ffn.expansions, ffn.contraction)]
    nested = any(path.startswith(f"{other}.") for path in paths for other in paths)
    if nested or len(set(paths[:-1])) < len({p.weight for p in ffn.expansions}):
        raise NearMissError("one module applies several of its linear maps", uses[0].nodes[0])
    depth = ffn.path.count(".") + 1 if ffn.path else 0
    inline = all(path.count(".") <= depth for path in paths)
    dropout = _dropout_between(uses[0].output, found[0][-1].outputs[0]) or 0.0
    ffn = replace(
        ffn,
        placement="inline" if inline else "siblings",
        output_dropout=dropout,
        shared=shared,
        hidden_width=uses[0].contraction.x.meta["shape"][ffn.axis] if shared else 0,
    )
    if not shared and not wide and not any(use.hidden.reshaped for use in uses):
        return ffn
    widths = {
        node.meta["path"]: call.outputs[0].meta["shape"][ffn.axis]
        for node, call in zip(uses[0].nodes, found[0], strict=True)
    }
    modules = dict.fromkeys(p.module for p in ffn.expansions)
    return replace(ffn, tap_widths=tuple(widths[module] for module in modules))


def _modules(program: Program, use: Use, *, exact: bool) -> list[Call]:
    """The call of a module that applies each linear map, and what is pointwise besides.

    With `exact` it may do nothing besides.
    """
    hidden = {through_views(node) for node in use.hidden.visited}
    ins = {through_views(expansion.linear.x) for expansion in use.hidden.expansions}
    outs = {through_views(use.output)}
    of_contraction = hidden | {through_views(use.contraction.x)}
    if exact:
        of_contraction = {through_views(use.contraction.x)}
    found = []
    for node in use.nodes:
        last = node is use.contraction.node
        taken, given = (of_contraction, outs) if last else (ins, {through_views(node)})
        if not last and not exact:
            given = hidden
        calls = [
            call
            for call in _calls_at(program, node, use.output if last else node)
            if call.plain
            and (not call.inputs or through_views(call.inputs[0]) in taken)
            and through_views(call.outputs[0]) in given
        ]
        if not calls or not node.meta["path"]:
            raise NearMissError(_raw(program, use, node.meta["path"]), node)
        found.append(calls[0])
    return found


def _calls_at(program: Program, node: fx.Node, output: fx.Node) -> list[Call]:
    """The calls of the module of `node`; of an ONNX file, what gives the output with its bias."""
    calls = program.calls.get(node.meta["path"], [])
    return calls + [c for c in program.calls.get(output.meta["path"], []) if not c.inputs]


def _raw(program: Program, use: Use, path: str) -> str:
    """Why a linear map that no module applies alone is refused."""
    weights = " and ".join(f"`{name}`" for name in use.ffn.parameters[:2])
    if program.is_graph:
        return (
            f"no call of a layer can stand for what this graph does with its weights {weights}, as "
            "where one matrix also does something else: convert the module that it was made of"
        )
    if path:
        return (
            f"`{path}` applies its weights {weights} among other things: move the FFN into a "
            "module of its own"
        )
    alone = any(dropout_of_call(call, use) is not None for call in program.calls.get("", []))
    advice = (
        "put it into a parent module, as in nn.Sequential(model)"
        if alone
        else "move each FFN into a module of its own"
    )
    return f"its weights {weights} are raw parameters of the model itself: {advice}"


def _check_unchanged(program: Program, use: Use) -> None:
    """What the expansion reads must be the same when the contraction computes on it."""
    expansions, between = set(use.nodes[:-1]), False
    inputs = {expansion.linear.x for expansion in use.hidden.expansions}
    for node in program.graph.nodes:
        between = between or node in expansions
        if node is use.contraction.node:
            return
        if between and not inputs.isdisjoint(node.meta.get("writes", ())):
            raise NearMissError(
                f"`{op_name(node.target)}` changes its input in place before its contraction: "
                "write it without the change in place",
                node,
            )


def _check_turns(program: Program, use: Use) -> None:
    """Expansion and contraction must run in turns: one input is kept between them."""
    first, last = use.ffn.expansions[0], use.ffn.contraction
    ends, modules = (first.weight, last.weight), {first.module, last.module}
    maps = [linear_map(node) for node in program.graph.nodes if node.meta.get("path") in modules]
    order = [ends.index(found.weight) for found in maps if found and found.weight in ends]
    if any(a == b for a, b in pairwise(order)) or order[0] != 0 or order[-1] != 1:
        raise NearMissError(
            "its expansion runs several times before its contraction does: call them in turn",
            use.contraction.node,
        )
