"""The passes of a conversion, in their order: what each makes, and what holds of it.

Each hands what it made to a `Watch`, which checks it, shows it if it was asked to, and may stop
there.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from upcycle.capture.recorder import Program
from upcycle.ir.ffn import Located
from upcycle.ir.spec import Plan
from upcycle.layers.moe import MoE


class BrokenPassError(AssertionError):
    """A pass left what it may not leave: a bug of upcycle."""


class StoppedError(Exception):
    """A run ends after the pass that it was asked to."""


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        name: as ``--print-after`` takes it.
        takes, gives: what it reads and what it makes.
        does: how.
        where: the module with its code.
        ensures: raises BrokenPassError for a result that breaks the contract.
    """

    name: str
    takes: str
    gives: str
    does: str
    where: str
    ensures: Callable[[Any], None]


def is_recorded(program: Program) -> None:
    """Every call of the graph has a shape, or hands on parts that have; and the module that ran."""
    for node in program.graph.nodes:
        if node.op == "call_function" and "path" not in node.meta:
            raise BrokenPassError(f"{node} comes from no module")
    if sum(node.op == "output" for node in program.graph.nodes) != 1:
        raise BrokenPassError("the graph has no output")


def are_apart(located: Located) -> None:
    """Each FFN has a path of its own, and no weight is in two."""
    for what, names in (
        ("path", [ffn.path for ffn in located.ffns]),
        (
            "weight",
            [p.weight for f in located.ffns for p in {q.weight: q for q in _maps(f)}.values()],
        ),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise BrokenPassError(f"the {what} {twice[0]} belongs to two FFNs")


def _maps(ffn: Any) -> tuple[Any, ...]:
    return (*ffn.expansions, ffn.contraction)


def is_complete(plan: Plan) -> None:
    """What is planned was located, each at a place of its own, and no neuron is forgotten."""
    found = {ffn.path for ffn in plan.located.ffns}
    places = Counter(spec.ffn.place for spec in plan.specs)
    for spec in plan.specs:
        if spec.ffn.path not in found or places[spec.ffn.place] > 1:
            raise BrokenPassError(f"{spec.ffn.path} was planned and not located, or planned twice")


def is_rewritten(converted: tuple[nn.Module, Plan]) -> None:
    """A layer is at each planned place, and no weight of a converted FFN is left."""
    model, plan = converted
    held = dict(model.named_parameters(remove_duplicate=False))
    for spec in plan.specs:
        if not isinstance(model.get_submodule(spec.ffn.place), MoE):
            raise BrokenPassError(f"{spec.ffn.place} is no layer")
        kept = {name for kept in spec.ffn.kept for name in (kept.name, kept.parameter)}
        left = [name for name in spec.ffn.parameters if name in held and name not in kept]
        if left:
            raise BrokenPassError(f"{left[0]} is left of {spec.ffn.path}")


def holds(_: object) -> None:
    """What the pass itself refuses is all that can be said of it."""


PASSES = (
    Pass("capture", "a module, an ONNX file or a program", "a graph",
         "runs the forward once on shapes, and records every call with its module and its line",
         "upcycle.capture, upcycle.passes.locate_onnx.program", is_recorded),
    Pass("locate", "the graph", "FFNs and misses",
         "walks back from each linear map, and takes the regions that are an FFN",
         "upcycle.passes.locate", are_apart),
    Pass("plan", "FFNs and a recipe", "a plan", "decides what each FFN becomes, without a weight",
         "upcycle.passes.plan", is_complete),
    Pass("transform", "weights and calibration data", "experts and routers",
         "makes the layers one after the other", "upcycle.passes.calibrate, .transform", holds),
    Pass("rewrite", "the model and the layers", "a model with layers",
         "puts each layer into the place of its FFN: a module, a tap, or a call in the graph",
         "upcycle.passes.rewrite, upcycle.graphs.layer_passes", is_rewritten),
    Pass("lower", "the model with layers", "files", "writes each target in the forms it knows",
         "upcycle.targets", holds),
    Pass("verify", "the files and the dense model", "a report",
         "measures the distance, and fails if a promise is broken", "upcycle.verification", holds),
)  # fmt: skip
NAMES = tuple(one.name for one in PASSES)


@dataclass(frozen=True)
class Watch:
    """What is done after each pass.

    Attributes:
        show: what shows a result, by the name of its pass.
        stop_after: the name of the last pass that runs.
    """

    show: Mapping[str, Callable[[Any], None]]
    stop_after: str | None = None

    def __call__(self, name: str, made: Any) -> None:
        """The pass `name` has made something.

        Raises:
            BrokenPassError: it breaks the contract.
            StoppedError: nothing is to run after it.
        """
        next(one for one in PASSES if one.name == name).ensures(made)
        if name in self.show:
            self.show[name](made)
        if name == self.stop_after:
            raise StoppedError(name)


UNWATCHED = Watch({})
