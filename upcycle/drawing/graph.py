"""The graph of a model as networkx has it: plain attributes, to draw or to work on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from upcycle.capture.recorder import Program
from upcycle.drawing.around import around as unfolded
from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.folded import folded
from upcycle.drawing.layers import Facts, ffn_facts, operations_with_layers
from upcycle.drawing.operations import Operation, is_within
from upcycle.ir.ffn import Located

NO_MOE: Mapping[str, Facts] = MappingProxyType({})
NAMES = {"ffn": "FFN", "bottleneck": "bottleneck", "head": "head", "moe": "MoE layer"}


def graph_of(
    program: Program,
    located: Located,
    around: str | None = None,
    *,
    moe: Mapping[str, Facts] = NO_MOE,
    title: str = "the model",
) -> DiGraph:
    """What a captured model does, as boxes and arrows.

    Args:
        program: what `upcycle.capture.capture.capture` recorded.
        located: what was found in it.
        around: a layer to show from inside, with its operations; None for the whole model, in
            which every module without an FFN is one box and what repeats is there once.
        moe: the MoE layers by path, as `upcycle.drawing.layers.moe_facts` describes them.
        title: what the picture is called.

    Returns:
        A box for each node, in the order in which they run. Of its attributes `kind` is there
        always: ``input``, ``output``, ``module``, ``operations``, or that of a layer: ``ffn``,
        ``bottleneck``, ``head``, ``moe``. `frame` is a key of the graph's `frames`, what repeats
        together. An edge with `next` leads from one repeat to the next one.

    Raises:
        UsageError: there is no layer `around`.
    """
    layers = {ffn.path: ffn_facts(ffn) for ffn in located.ffns} | dict(moe)
    operations = operations_with_layers(program, located, moe)
    is_whole = around is None
    graph = folded(operations, layers) if around is None else unfolded(operations, layers, around)
    graph.graph.update(
        title=title if is_whole else f"{title}, around {around}",
        about=_about([str(facts["kind"]) for facts in layers.values()]) if is_whole else "",
        elsewhere="\n".join(_elsewhere(operations, located, moe)) if is_whole else "",
        operations=sum(one.kind == "operation" for one in operations),
    )
    return graph


def _about(kinds: Sequence[str]) -> str:
    """How many layers of each kind there are."""
    count = Counter(kinds)
    found = [
        f"{number} {name}{'' if number == 1 else 's'}"
        for kind, name in NAMES.items()
        if (number := count[kind])
    ]
    return ", ".join(found) or "no FFN"


def _elsewhere(
    operations: Sequence[Operation], located: Located, moe: Mapping[str, Facts]
) -> list[str]:
    """The misses that no operation shows: those of scripted modules, and of shared weights."""
    shown = {miss for one in operations for miss in one.misses}
    hidden = [(miss.path, miss.reason) for miss in located.misses]
    return [
        f"{path or 'the model'}: {reason}"
        for path, reason in dict.fromkeys(hidden)
        if (path, reason) not in shown and not any(is_within(path, layer) for layer in moe)
    ]
