"""What a converted model is written as, and which software then runs it.

A transformers model becomes the first native architecture that holds it and that all runtimes load
which the plan requires; else the dense architecture with a self-contained modeling file, if they
load that. Any other module becomes plain weights.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.spec import Plan
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.choose import build_config, choose
from upcycle.targets.remote_code import check_sources
from upcycle.targets.runtimes import RUNTIMES, Support, matrix, refusal
from upcycle.targets.runtimes.support import CUSTOM, PLAIN, loads, refuses
from upcycle.util.modules import model_dtype

GRAPH = "onnx"


@dataclass(frozen=True)
class Destination:
    """The form of the checkpoint.

    Attributes:
        target: the native architecture, or None.
        form: ``native``, ``remote_code``, ``module`` or ``onnx``.
        reasons: why each native architecture that was tried was not chosen.
        near: the reasons of those that hold models of this type, but not this plan.
        runtimes: software by name, and what it does with the checkpoint.
    """

    target: NativeTarget | None
    form: str
    reasons: Mapping[str, str]
    near: Mapping[str, str]
    runtimes: Mapping[str, Support]

    def text(self) -> str:
        """What it is written as, in words."""
        if self.target is not None:
            return f"{self.target.model_type}, an architecture of transformers"
        return {
            CUSTOM: "the dense architecture with a self-contained modeling file",
            PLAIN: "weights that upcycle.load puts into the dense module",
            GRAPH: "an ONNX file",
        }[self.form]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``upcycle plan --json``."""
        return {
            "form": self.form,
            "architecture": self.target.model_type if self.target else None,
            "not_native_because": dict(self.near),
            "runtimes": {name: support.to_json() for name, support in self.runtimes.items()},
        }


def destination(model: nn.Module, plan: Plan) -> Destination:
    """Choose what a model, dense or converted, is written as, from its class and configuration.

    The `runtimes` and `architecture` of the plan are requirements.

    Raises:
        UsageError: there is no such runtime or architecture.
        UnsupportedError: nothing that holds the model meets the requirements, or the modeling file
            would need a router or an activation of others whose text it cannot have.
    """
    for name in plan.runtimes:
        if name not in RUNTIMES:
            raise UsageError(f"`runtimes={name}`: unknown; choose from {', '.join(RUNTIMES)}")
    if plan.architecture is not None and plan.architecture not in NATIVE:
        raise UsageError(
            f"`architecture={plan.architecture}`: unknown; choose from {', '.join(NATIVE)}"
        )
    target: NativeTarget | None = None
    reasons: dict[str, str] = {}
    form, config = PLAIN, {"dtype": str(model_dtype(model)).removeprefix("torch.")}
    if isinstance(model, PreTrainedModel):
        form, config = CUSTOM, model.config.to_dict()
        target, reasons = _native_target(model, plan)
        if target is not None:
            form, config = "native", build_config(target, model.config, plan)
        else:
            check_sources(plan)
    written_as = target.model_type if target else form
    if target is None and plan.architecture is not None:
        why = reasons.get(plan.architecture, "the model is no model of transformers")
        raise UnsupportedError(f"`architecture={plan.architecture}`: {why}")
    kind = config.get("model_type")
    near = {name: why for name, why in reasons.items() if kind in NATIVE[name].sources}
    why_not = refusal(plan.runtimes, written_as, config, plan)
    if why_not is not None:
        others = [f"not as {names}: {reason}" for names, reason in grouped(near).items()]
        if not near and form == CUSTOM:
            others = [f"no native architecture holds a model of type {kind}"]
        raise UnsupportedError("; ".join([why_not, *others]))
    return Destination(target, form, reasons, near, matrix(written_as, config, plan))


def onnx_destination(plan: Plan) -> Destination:
    """The same for a model that is an ONNX file, and becomes one.

    Raises:
        UsageError: the plan requires more than that.
    """
    others = [name for name in plan.runtimes if name != "onnxruntime"]
    if others or plan.architecture is not None:
        option = f"`runtimes={others[0]}`" if others else f"`architecture={plan.architecture}`"
        raise UsageError(f"{option}: an ONNX file becomes an ONNX file; leave it out")
    runtimes = {name: refuses("MODEL", "it is an ONNX file") for name in RUNTIMES}
    return Destination(None, GRAPH, {}, {}, runtimes | {"onnxruntime": loads()})


def _native_target(
    dense: PreTrainedModel, plan: Plan
) -> tuple[NativeTarget | None, dict[str, str]]:
    def accepts(target: NativeTarget, config: Mapping[str, Any]) -> str | None:
        return refusal(plan.runtimes, target.model_type, config, plan)

    config: Any = copy.deepcopy(dense.config)
    config.architectures = [type(dense).__name__]  # a model built in memory does not say it
    return choose(NATIVE, config, plan, accepts=accepts, only=plan.architecture)


def grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """The architectures that have the same reason, as one text -> the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return {", ".join(alike): reason for reason, alike in names.items()}
