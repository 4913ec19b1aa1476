"""What a converted model is written as, and which software then runs it.

A transformers model becomes the first native architecture that holds it and that all software runs
which the user requires; else the dense architecture with a self-contained modeling file, if that
will do; any other module becomes plain weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from upcycle.errors import UnsupportedError
from upcycle.spec import Plan
from upcycle.targets.native import NATIVE
from upcycle.targets.native.native import NativeTarget, build_config, choose
from upcycle.targets.runtimes import Support, matrix, refusal
from upcycle.targets.runtimes.support import CUSTOM, PLAIN


@dataclass(frozen=True)
class Destination:
    """The form of the checkpoint.

    Attributes:
        target: the native architecture, or None.
        form: ``native``, ``remote_code`` or ``module``.
        reasons: why each native architecture that was tried was not chosen.
        runtimes: software by name, and what it does with the checkpoint.
    """

    target: NativeTarget | None
    form: str
    reasons: Mapping[str, str]
    runtimes: Mapping[str, Support]

    @property
    def architecture(self) -> str | None:
        """The model type of the native architecture, or None."""
        return None if self.target is None else self.target.model_type


def destination(model: nn.Module, plan: Plan) -> Destination:
    """Choose what a model is written as; only its class and configuration are looked at.

    Args:
        model: the dense or the converted model, on any device.
        plan: what is converted; its `runtimes` and `architecture` are requirements.

    Raises:
        UnsupportedError: nothing that holds the model meets the requirements.
    """
    target, reasons = native_target(model, plan)
    config = _config(model, plan, target)
    form = "native" if target else CUSTOM if isinstance(model, PreTrainedModel) else PLAIN
    written_as = target.model_type if target else form
    if target is None and plan.architecture is not None:
        why = reasons.get(plan.architecture, "the model is no model of transformers")
        raise UnsupportedError(f"--architecture {plan.architecture}: {why}")
    why_not = refusal(plan.runtimes, written_as, config, plan)
    if why_not is not None:
        nearest = near(reasons, config)
        others = "".join(f"; {name}: {reason}" for name, reason in nearest.items())
        raise UnsupportedError(f"--runtime {why_not}{others}")
    return Destination(target, form, reasons, matrix(written_as, config, plan))


def native_target(dense: nn.Module, plan: Plan) -> tuple[NativeTarget | None, dict[str, str]]:
    """The native architecture that holds the plan, or None; and why the others do not."""
    if not isinstance(dense, PreTrainedModel):
        return None, {}

    def accepts(target: NativeTarget, config: Mapping[str, Any]) -> str | None:
        return refusal(plan.runtimes, target.model_type, config, plan)

    return choose(NATIVE, _asked(dense), plan, accepts=accepts, only=plan.architecture)


def near(reasons: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """The reasons of the architectures that hold models of this type, if not this one."""
    kind = str(config.get("model_type"))
    return {
        name: reason
        for name, reason in reasons.items()
        if name not in NATIVE or kind in NATIVE[name].sources
    }


def _asked(dense: PreTrainedModel) -> Any:
    config = copy.deepcopy(dense.config)
    config.architectures = [type(dense).__name__]  # a model built in memory does not say it
    return config


def _config(model: nn.Module, plan: Plan, target: NativeTarget | None) -> dict[str, Any]:
    if not isinstance(model, PreTrainedModel):
        return {"dtype": _dtype(model)}
    if target is not None:
        return build_config(target, model.config, plan)
    config: dict[str, Any] = model.config.to_dict()
    return config


def _dtype(model: nn.Module) -> str:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return str(dtypes[0]).removeprefix("torch.") if dtypes else "float32"


def rows(runtimes: Mapping[str, Support]) -> Sequence[tuple[str, str]]:
    """The matrix for a table."""
    return [(name, support.text()) for name, support in runtimes.items()]
