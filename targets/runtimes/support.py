"""What a runtime does with a converted model.

A runtime is one pure function of what the model is written as (a native architecture,
``remote_code`` or ``module``), the ``config.json`` of that, and the plan. The conditions are read
in the source of the runtime, and each file names what was read; the tests run only transformers,
ONNX Runtime and llama.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from upcycle.ir.spec import Plan

Config = Mapping[str, Any]
CUSTOM, PLAIN = "remote_code", "module"  # what is written where no native architecture fits


@dataclass(frozen=True)
class Support:
    """Whether a runtime loads the model and computes what it should.

    Attributes:
        level: ``no`` also where it would load and compute something else.
        why: the limits, or why not; phrases without a full stop.
        field: for a ``no``, the field of the model's configuration or of the recipe that decides.
    """

    level: Literal["yes", "limits", "no"]
    why: tuple[str, ...] = ()
    field: str | None = None

    def text(self) -> str:
        """One cell of a table."""
        start = f"no, {self.field}" if self.level == "no" else "yes"
        return ": ".join([start, "; ".join(self.why)]) if self.why else start

    def to_json(self) -> dict[str, Any]:
        """Plain data; `why` is a list."""
        return asdict(self) | {"why": list(self.why)}


# What the model is written as, its ``config.json``, and the plan, which converts something.
Judge = Callable[[str, Config, Plan], Support]


def loads(*limits: str | None) -> Support:
    """It loads, within the `limits` that are not None."""
    given = tuple(limit for limit in limits if limit)
    return Support("limits" if given else "yes", given)


def refuses(field: str, why: str) -> Support:
    """It does not, because of `field`."""
    return Support("no", (why,), field)
