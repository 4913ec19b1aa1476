"""What a walk finds about the hidden tensor of a candidate FFN, and why it is refused."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from upcycle.capture.recorder import op_name
from upcycle.ir.ffn import Miss
from upcycle.passes.locate.linear import LinearMap, linear_map
from upcycle.pointwise import Step


class NotAnFFNError(Exception):
    """A region is no FFN: the reason, and the node where it shows."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


class NearMissError(NotAnFFNError):
    """All else is as in an FFN, so that the reason is worth reporting."""


def miss_at(node: fx.Node, reason: str, *, path: str | None = None) -> Miss:
    """The refusal that shows at `node`; the module is the node's own, unless `path` is given."""
    where = node.meta["path"] if path is None else path
    return Miss(where, reason, node.name, node.meta.get("source", ""))


@dataclass
class Expansion:
    """A linear map that feeds the hidden tensor: row ``rows[c]`` of it belongs to column c."""

    linear: LinearMap
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass
class HiddenTensor:
    """The result of a walk back from a hidden tensor.

    Attributes:
        expansions: in the order of first use.
        steps: the pointwise program on them; only to be run if there is no refusal.
        taken: node -> the flat positions of its elements that the hidden tensor needs.
        visited: every node between the expansions and the contraction, expansions included.
        biases: index of an expansion -> name of a per-neuron parameter added to it.
        dropout: probability of the dropout met on the way.
        reshaped: a layout operation was met on the way.
        mixing, own_parameter: why the region is no FFN although the walk reached its end.
    """

    expansions: list[Expansion] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    taken: dict[fx.Node, list[torch.Tensor]] = field(default_factory=dict)
    visited: set[fx.Node] = field(default_factory=set)
    biases: dict[int, str] = field(default_factory=dict)
    dropout: float = 0.0
    reshaped: bool = False
    mixing: NearMissError | None = None
    own_parameter: NearMissError | None = None

    def taken_of(self, node: fx.Node) -> torch.Tensor:
        """Whether the hidden tensor needs each element of `node`."""
        taken = torch.zeros(math.prod(node.meta["shape"]), dtype=torch.bool)
        for index_PC in self.taken[node]:
            taken[index_PC] = True
        return taken.reshape(node.meta["shape"])

    def through_dropout(self, node: fx.Node) -> fx.Node:
        """What a dropout works on; its probability is noted."""
        self.dropout = max(self.dropout, dropout_of(node))
        return data_of(node)

    def note_mixing(self, reason: str, node: fx.Node) -> None:
        """Note that the hidden axis is mixed; the first reason stays."""
        self.mixing = self.mixing or NearMissError(reason, node)

    def note_parameter(self, reason: str, node: fx.Node) -> None:
        """Note that the nonlinearity reads numbers of its own; the first reason stays."""
        self.own_parameter = self.own_parameter or NearMissError(reason, node)

    def name_biased(self) -> None:
        """Call every biased expansion z again, if it is used with its bias everywhere."""
        used = {
            arg for op, args, _ in self.steps for arg in (args[:1] if op == "cast_like" else args)
        }
        for i, name in self.biases.items():
            if f"z{i}" in used:
                reason = f"it reads a linear map with and without the bias `{name}`"
                self.note_parameter(reason, self.expansions[i].linear.node)

        def plain(arg: Any) -> Any:
            biased = isinstance(arg, str) and arg[0] == "b" and arg[1:].isdigit()
            return f"z{arg[1:]}" if biased else arg

        self.steps = [
            (op, tuple(plain(arg) for arg in args), kwargs) for op, args, kwargs in self.steps
        ]


def check_has_data(hidden: fx.Node) -> None:
    """Refuse a tensor without elements, from which no walk can start."""
    if 0 in hidden.meta["shape"]:
        refuse = NearMissError if _maps_nothing(hidden) else NotAnFFNError
        reason = "no data reaches it with these example inputs: give others with "
        raise refuse(reason + "`example_inputs`", hidden)


def _maps_nothing(node: fx.Node) -> bool:
    """Whether `node` is empty and comes from a linear map of an empty tensor."""
    if node.op != "call_function" or 0 not in node.meta.get("shape", ()):
        return False
    return linear_map(node) is not None or any(map(_maps_nothing, node.all_input_nodes[:1]))


def data_of(node: fx.Node) -> fx.Node:
    """The tensor that a call works on, its first argument."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise NotAnFFNError(f"`{op_name(node.target)}` makes a tensor of its own", node)
    return source


def dropout_of(node: fx.Node) -> float:
    """The probability of a dropout call, however it is spelled.

    One of an exported program draws or does not, as it was exported in training or not.
    """
    probability: Any = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    if isinstance(node.target, OpOverload) and node.args[2:] == (False,):
        return 0.0
    return float(probability)
