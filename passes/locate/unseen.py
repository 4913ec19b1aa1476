"""Parts of a model that a recording shows nothing of, or nothing of what comes of them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx, nn

from upcycle.capture.recorder import Program, op_name
from upcycle.ir.ffn import Located, Miss
from upcycle.passes.locate.hidden_tensor import NearMissError, miss_at

# What these run is handed over as functions, and recorded as one call.
_OF_FUNCTIONS = {"associative_scan", "cond", "map_impl", "scan", "while_loop"}


def with_unseen(model: nn.Module, program: Program, located: Located) -> Located:
    """Add a miss for each module that was scripted, and for each call of functions."""
    misses = [miss_at(node, reason) for node, reason in _calls_of_functions(program.graph)]
    misses += [
        Miss(path, "it is a ScriptModule, whose operations are not seen: put the module there that "
             "it was made from")
        for path in _scripted(model)
    ]  # fmt: skip
    return replace(located, misses=(*located.misses, *misses))


def _calls_of_functions(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            name = op_name(node.target)
            if name in _OF_FUNCTIONS:
                yield node, f"`{name}` runs functions, whose operations are not seen: write it out"


def _scripted(model: nn.Module) -> list[str]:
    """The outermost ScriptModules that could hold an FFN."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        matrices = sum(p.dim() > 1 for p in module.parameters())
        if isinstance(module, torch.jit.ScriptModule) and not inside and matrices > 1:
            found.append(path)
    return found


def check_followed(contraction: fx.Node) -> None:
    """Refuse an FFN under a transform of torch.func, as its results are not those of its calls."""
    transform = contraction.meta.get("transform")
    if transform:
        raise NearMissError(
            f"it runs under `torch.func.{transform}`, whose result is not followed: call it "
            "directly",
            contraction,
        )
