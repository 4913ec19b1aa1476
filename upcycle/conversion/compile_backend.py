"""A backend of torch.compile: the graph that it hands over is converted, and nothing is written.

    compiled = torch.compile(model, backend="upcycle", options={"recipe": "moefication"})

torch finds it by the entry point of this package, so that nothing needs to be imported.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from upcycle.conversion.api import convert
from upcycle.errors import UnsupportedError, UsageError

log = logging.getLogger(__name__)
_OPTIONS = {"recipe", "overrides"}


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What computes `graph` with its FFNs converted; for evaluation, without gradients.

    The inputs of the first call are what a recipe is calibrated on that needs data. A graph without
    an FFN runs as it is. The numbers of the weights are those of the first call: one that changes
    the weights afterwards changes nothing here.

    Args:
        graph: as torch.compile makes it: its weights are inputs.
        inputs: of the first call.
        options: ``recipe``, a name, a path or a `Recipe`; ``overrides``, as ``--set`` takes them.

    Raises:
        UsageError: there is no recipe, an unknown option, or gradients are wanted.
        RecipeError, PlanError: the recipe does not fit.
    """
    options = options or {}
    if unknown := sorted(set(options) - _OPTIONS):
        raise UsageError(f"options: `{unknown[0]}` is unknown; choose from recipe, overrides")
    if "recipe" not in options:
        raise UsageError('options: give a recipe, as in options={"recipe": "moefication"}')
    if torch.is_grad_enabled() and any(
        _is_weight(given) and given.requires_grad for given in inputs
    ):
        raise UsageError(
            'backend="upcycle": the weights of the model would get no gradient; run it under '
            "torch.no_grad(), or train what `upcycle.convert` returns"
        )
    places = [i for i, given in enumerate(inputs) if not _is_weight(given)]
    bound = _with_weights(graph, inputs)
    example = tuple(_number(inputs[i]) for i in places)
    changes = tuple(options.get("overrides", ()))
    try:
        done = convert(
            bound, options["recipe"], example, [example], verify=False, overrides=changes
        )
    except UnsupportedError as error:
        log.info("a graph runs as it is: %s", error)
        return graph.forward
    log.info("%d FFNs of a graph were converted", len(done.plan.specs))
    model = done.model.eval()
    return lambda *given: model(*(given[i] for i in places))


def _is_weight(given: object) -> bool:
    return isinstance(given, nn.Parameter)


def _number(given: Any) -> Any:
    """A size that varies, as it is in this call."""
    return int(given) if isinstance(given, torch.SymInt) else given


def _with_weights(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same graph with its weights as parameters, not as inputs."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node, given in zip(copied.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if _is_weight(given):
            setattr(copied, node.name, given)
            with copied.graph.inserting_after(node):
                weight = copied.graph.get_attr(node.name)
            node.replace_all_uses_with(weight)
            copied.graph.erase_node(node)
    copied.recompile()
    return copied
