"""The graph of a model in memory, in one call."""

from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.graph import graph_of
from upcycle.drawing.layers import moe_facts
from upcycle.passes.locate.locate import captured_and_located
from upcycle.util.modules import unwrapped


def graph(
    model: nn.Module, around: str | None = None, example_inputs: ExampleInputs | None = None
) -> DiGraph:
    """What `model` does, as boxes and arrows: its modules, its FFNs, its MoE layers.

    `upcycle.write_graph` draws it.

    Args:
        model: any module, dense or converted, also on the meta device; it is left alone.
        around: path of a layer, to see its operations and those around it; None for the whole
            model, in which a module without an FFN is one box, and what repeats is there once.
        example_inputs: keyword arguments or a tuple that its forward accepts; guessed if None.

    Returns:
        A graph of networkx with plain attributes; `upcycle.drawing.graph.graph_of` names them.

    Raises:
        CaptureError: the forward could not be run on example inputs.
        UsageError: there is no layer `around`.
    """
    model = unwrapped(model)
    program, located = captured_and_located(model, example_inputs)
    title = type(model).__name__
    return graph_of(program, located, around, moe=moe_facts(model), title=title)
