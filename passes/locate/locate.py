"""Locate: find every dense FFN of a captured program, and say why a near miss is refused.

Each linear map is tried as a contraction: `trace` walks back from its input to the
expansions. No name of a class or of a module is looked at.
"""

import logging
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from types import MappingProxyType

from torch import fx, nn

from upcycle.capture.capture import ExampleInputs, capture
from upcycle.capture.function_caches import caches_cleared
from upcycle.capture.guess_inputs import find_example
from upcycle.capture.recorder import Program, op_name
from upcycle.ir.ffn import FFN, SHARES, Located, Miss, Projection
from upcycle.passes.locate.behind import live_nodes
from upcycle.passes.locate.graph_region import in_graph
from upcycle.passes.locate.hidden_tensor import (
    HiddenTensor,
    NearMissError,
    NotAnFFNError,
    check_has_data,
    miss_at,
)
from upcycle.passes.locate.layout import joined_widths
from upcycle.passes.locate.linear import LinearMap, computed_linear, grouped_linear, linear_map
from upcycle.passes.locate.name_activation import recognise, swapped
from upcycle.passes.locate.outside_readers import (
    check_outside_readers,
    read_elsewhere,
    reads_of_parameters,
    without_tied,
)
from upcycle.passes.locate.place import Use, Ways, placed
from upcycle.passes.locate.region import (
    check_one_input,
    check_own_weights,
    common_path,
    is_nonlinear,
    kind_of,
    output_of,
    projection_of,
)
from upcycle.passes.locate.replayed_blocks import crosses_blocks, with_replayed_misses, with_replays
from upcycle.passes.locate.trace import trace
from upcycle.passes.locate.trial import fault_of, tried
from upcycle.passes.locate.unseen import check_followed, with_unseen
from upcycle.pointwise import Pointwise

log = logging.getLogger(__name__)
EXPERT_OPS = {"grouped_mm", "moe"}  # matrices chosen per token


def locate(program: Program, ways: Ways = MappingProxyType({})) -> Located:
    """All FFNs and near misses, in the order in which the model runs them.

    An FFN whose weights are used at several places of the model is reported once. `ways`
    says how to place some.
    """
    uses: dict[tuple[str, ...], list[Use]] = {}
    misses: list[Miss] = []
    live = live_nodes(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and op_name(node.target) in EXPERT_OPS:
            misses.append(miss_at(node, "it is already a mixture of experts"))
        seen = node in live or "transform" in node.meta
        contraction = (
            (linear_map(node) or computed_linear(node) or grouped_linear(node)) if seen else None
        )
        if contraction is None:
            continue
        try:
            use = _use_at(contraction, live)
        except NotAnFFNError as reason:
            if isinstance(reason, NearMissError):
                path = contraction.node.meta["path"]
                misses.append(miss_at(reason.node, str(reason), path=path))
            continue
        uses.setdefault(use.ffn.parameters, []).append(use)
    found: list[FFN] = []
    for several in uses.values():
        try:
            found.append(in_graph(program, several, live) or placed(program, several, ways))
        except NearMissError as reason:
            misses.append(miss_at(reason.node, str(reason), path=several[0].ffn.contraction.module))
    kept = _drop_overlapping(found, misses)
    reads = reads_of_parameters(program.graph, live)
    for ffn in list(kept):
        maps = {node for use in uses[ffn.parameters] for node in use.nodes}
        reader = read_elsewhere(reads, ffn, maps)
        if reader is not None:
            kept.remove(ffn)
            node, why = reader
            misses.append(miss_at(node, why, path=ffn.path or ffn.contraction.module))
    used = {p.module for ffn in kept for p in (*ffn.expansions, ffn.contraction)}
    misses = [miss for miss in misses if miss.path not in used]
    ffns = _with_distinct_paths(with_replays(program, kept))
    return Located(ffns, tuple(with_replayed_misses(program, misses)))


def locate_in(model: nn.Module, example: ExampleInputs | None = None) -> Located:
    """Capture `model` on `example` (or on guessed inputs) and locate its FFNs.

    A model whose FFNs reach from one block into the next is captured again with every block. An FFN
    is placed so that the model runs with a layer there.
    """
    return captured_and_located(model, example)[1]


def captured_and_located(
    model: nn.Module, example: ExampleInputs | None = None
) -> tuple[Program, Located]:
    """As `locate_in`, with the program in which the FFNs were found."""

    def captured(repeat_blocks: bool) -> tuple[ExampleInputs, Program]:
        if example is None:
            return find_example(model, repeat_blocks=repeat_blocks)
        with caches_cleared(model):
            return example, capture(model, example, repeat_blocks=repeat_blocks)

    given, program = captured(repeat_blocks=True)
    first = locate(program)
    repeat_blocks = not any(crosses_blocks(program, ffn) for ffn in first.ffns)
    if not repeat_blocks:
        given, program = captured(repeat_blocks=False)
        first = locate(program)
    with caches_cleared(model):
        located = tried(
            lambda ways: without_tied(model, locate(program, ways) if ways else first),
            lambda ffns: fault_of(model, given, program, ffns, repeat_blocks=repeat_blocks),
        )
    located = with_unseen(model, program, located)
    log.debug("captured %d operations", len(program.graph.nodes))
    for ffn in located.ffns:
        log.debug("FFN %s: %s, %s", ffn.path, ffn.pointwise.name, ffn.placement)
    for miss in located.misses:
        log.debug("no FFN at %s: %s", miss.path, miss.reason)
    return program, located


def _use_at(contraction: LinearMap, live: set[fx.Node]) -> Use:
    """The FFN that ends at `contraction`: all its columns, or those of one tensor of a `cat`.

    Of several such tensors the widest is taken; the contraction keeps the columns of the others.
    """
    check_has_data(contraction.x)
    ends = accumulate(joined_widths(contraction.x, contraction.axis), initial=0)
    parts = sorted((a, b) for a, b in pairwise(ends) if b > a)
    parts.sort(key=lambda part: part[0] - part[1])
    refusal: NotAnFFNError | None = None
    for columns in (None, *parts):
        try:
            hidden = trace(contraction.x, contraction.axis, columns)
            return _use(contraction, hidden, live, columns)
        except NotAnFFNError as reason:
            if not isinstance(refusal, NearMissError):
                refusal = reason
    assert refusal is not None
    raise refusal


def _use(
    contraction: LinearMap,
    hidden: HiddenTensor,
    live: set[fx.Node],
    columns: tuple[int, int] | None,
) -> Use:
    expansions = [e.linear for e in hidden.expansions]
    pointwise = Pointwise(len(expansions), tuple(hidden.steps))
    if not is_nonlinear(pointwise):
        raise NotAnFFNError("there is no nonlinearity between the linear maps", contraction.node)
    check_followed(contraction.node)
    if hidden.mixing is not None:
        raise hidden.mixing
    check_one_input(hidden, contraction)
    if hidden.own_parameter is not None:
        raise hidden.own_parameter
    check_own_weights(expansions, contraction)
    shared = check_outside_readers(hidden, contraction, live) or columns is not None
    projections = [projection_of(hidden, i) for i in range(len(expansions))]
    named = recognise(pointwise)
    if named.name == "custom" and named.arity == 2:
        other = recognise(swapped(pointwise))
        if other.name != "custom":
            named, projections = other, projections[::-1]
    output, bias = output_of(contraction)
    d_out = contraction.node.meta["shape"][contraction.axis]
    d_model = expansions[0].x.meta["shape"][expansions[0].axis]
    d_ff = len(hidden.expansions[0].rows)
    path = contraction.node.meta["path"]
    if shared and hidden.biases:
        raise NearMissError(
            "a projection of which only a part is the FFN's has its bias elsewhere: put it into "
            "the linear map",
            contraction.node,
        )
    ffn = FFN(
        path=common_path([path, *(p.module for p in projections)]),
        kind=kind_of(d_model, d_ff, d_out),
        placement="inline",
        expansions=tuple(projections),
        contraction=Projection(
            path, contraction.weight, bias, contraction.transposed, (0, d_out, 1), columns
        ),
        pointwise=named,
        d_model=d_model,
        d_ff=d_ff,
        d_out=d_out,
        axis=contraction.axis,
        hidden_dropout=hidden.dropout,
        shared=shared,
    )
    return Use(ffn, hidden, contraction, output)


def _drop_overlapping(found: list[FFN], misses: list[Miss]) -> list[FFN]:
    """Of FFNs that share a linear map keep a real one, and the one with more neurons."""
    kept: list[FFN] = []
    for ffn in sorted(found, key=lambda f: (f.kind != "ffn", -f.d_ff)):
        rival = next((k for k in kept if set(k.parameters) & set(ffn.parameters)), None)
        if rival is None:
            kept.append(ffn)
        else:
            where = rival.path or rival.contraction.module
            reason = f"{SHARES} `{where}`"
            misses.append(Miss(ffn.contraction.module, reason))
    return [ffn for ffn in found if ffn in kept]


def _with_distinct_paths(ffns: tuple[FFN, ...]) -> tuple[FFN, ...]:
    """Where one module holds several FFNs, the path of each is that of its contraction."""
    count = Counter(ffn.path for ffn in ffns)
    return tuple(
        replace(ffn, path=ffn.contraction.module) if count[ffn.path] > 1 else ffn for ffn in ffns
    )
