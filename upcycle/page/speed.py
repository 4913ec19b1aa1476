"""The figures of ``bench.json``, which ``upcycle bench`` prints as JSON."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from upcycle.errors import UsageError
from upcycle.ir.report import Report
from upcycle.util.json_text import read_json

FILE = "bench.json"
REMEDY = "remove it, or put the JSON of `upcycle bench` there"


@dataclass(frozen=True)
class Time:
    """Seconds, or a ratio of them."""

    median: float


@dataclass(frozen=True)
class Row:
    """The times of one figure; without `tokens` it is one batch of inputs."""

    dense: Time
    converted: Time
    ratio: Time
    tokens: int | None = None


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    dtype: str
    threads: int


@dataclass(frozen=True)
class Speed:
    """What is shown of a benchmark: whole models that read and write."""

    model: str
    recipe: str
    engine: str
    machine: Machine
    reading: tuple[Row, ...]
    writing: Row | None = None

    def rows(self) -> list[tuple[str, Row]]:
        """What the model does, and its times."""
        reading = [("reads", row) for row in self.reading]
        return [*reading, ("writes", self.writing)] if self.writing else reading


def read_speed(directory: Path, report: Report) -> Speed | None:
    """The benchmark of the model in `directory`, or None if there is none.

    Raises:
        UsageError: the file is damaged, or is that of another conversion.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        found = TypeAdapter(Speed).validate_python(read_json(path, REMEDY))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: not the JSON of `upcycle bench` ({place}: {first['msg'].lower()}); {REMEDY}"
        ) from error
    if (found.model, found.recipe) != (report.model, report.recipe):
        raise UsageError(
            f"{path}: it is the benchmark of {found.model} with {found.recipe}, and report.json "
            f"tells of {report.model} with {report.recipe}; {REMEDY}"
        )
    return found
