"""What a conversion did and what was measured of it: the data of ``report.json``.

In JSON a field that is None is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from upcycle.errors import UsageError, one_line
from upcycle.ir.measured import (
    Calibrated,
    Check,
    Costs,
    Distance,
    LayerDistance,
    ModelDistance,
    OnnxFacts,
    Tempered,
)
from upcycle.ir.verdict import Verdict, verdict

DType = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CheckpointFacts:
    """What the weights were written as, why as nothing nearer, and which software runs them."""

    form: str
    architecture: str
    not_native_because: dict[str, str]
    runtimes: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class HubSource:
    """A model of a hub: the repository, the hash of its commit, and the GGUF file if it is one."""

    hub: str
    revision: str
    file: str | None = None

    @property
    def name(self) -> str:
        """As a person writes it."""
        return f"{self.hub}@{self.revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Published:
    """What the card of the dense model says to the hub: names and codes, none of them checked."""

    license: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None


@dataclass(frozen=True)
class Report:
    """A conversion: what was done, and what was measured.

    Attributes:
        upcycle, torch: versions.
        model: the dense model, as the user named it; `source` is where a hub has it, and
            `published` what its card says.
        recipe: its name; `resolved_recipe` has every key.
        dtype: of the dense weights.
        checks: the verification; empty if it was not run.
        streamed: how the model was converted, if it was never whole in memory.
        unread: tensors of the dense files that nothing in the model reads; they are left out.
        layers, end_to_end: what verification measured.
        sources: the distance from each of the models that experts were taken from.
        tempered, onnx, rounding: for files that are not exactly the model.
    """

    upcycle: str
    model: str
    recipe: str
    resolved_recipe: dict[str, Any]
    promise: str
    dtype: DType
    torch: str
    source: HubSource | None = None
    published: Published | None = None
    costs: Costs | None = None
    checks: tuple[Check, ...] = ()
    streamed: str | None = None
    unread: tuple[str, ...] | None = None
    calibration: Calibrated | None = None
    checkpoint: CheckpointFacts | None = None
    layers: tuple[LayerDistance, ...] | None = None
    end_to_end: ModelDistance | None = None
    sources: dict[str, Distance] | None = None
    tempered: Tempered | None = None
    onnx: OnnxFacts | None = None
    rounding: OnnxFacts | None = None

    @property
    def worst_layer(self) -> LayerDistance | None:
        """The layer that is furthest from its dense FFN."""
        return max(self.layers, key=lambda row: row.relative) if self.layers else None

    @property
    def verdict(self) -> Verdict:
        """What the figures mean for the user."""
        passed = all(check.passed for check in self.checks)
        facts = self.onnx or self.rounding
        return verdict(
            self.promise,
            self.costs,
            self.end_to_end,
            dtype=self.dtype,
            recipe=self.recipe,
            fitted=bool((self.resolved_recipe.get("compensate") or {}).get("refit")),
            equal_layers=self.promise == "exact" and bool(self.layers) and passed,
            merged=bool((self.resolved_recipe.get("experts") or {}).get("sources")),
            rounded_bytes=facts.bytes if facts else None,
            unmeasured="Convert it in memory (`stream=False`) and with verification to know.",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``report.json``; what follows from its fields is there, too."""
        data: dict[str, Any] = plain(self) | {"verdict": plain(self.verdict)}
        if worst := self.worst_layer:
            data["largest_error_at"] = {"layer": worst.path, "relative": worst.relative}
        return data

    @classmethod
    def from_json(cls, data: object, where: str) -> "Report":
        """The report that `to_json` wrote, also by an earlier version.

        Raises:
            UsageError: a field is missing or has another type; the message begins with `where`.
        """
        try:
            report = _ADAPTER.validate_python(data)
            _ = report.verdict  # it divides by what no conversion leaves at zero
        except ArithmeticError as error:
            raise UsageError(
                f"{where}: its figures are not those of a conversion ({one_line(error)}); convert "
                "the model again"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "it"
            raise UsageError(
                f"{where}: not a report of upcycle, {field}: {first['msg'].lower()}; convert the "
                "model again"
            ) from error
        return report


_ADAPTER = TypeAdapter(Report)


def report_schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json``."""
    return _ADAPTER.json_schema()


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, without the fields that are None, and tuples as lists."""
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: plain(held) for name, held in named.items() if held is not None}
    if isinstance(value, Mapping):
        return {key: plain(held) for key, held in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
