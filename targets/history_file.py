"""``operations.json``: what was done to a mixture of experts since it was converted.

The report of the conversion tells of the model before, so it is not in the directory any more.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from upcycle.errors import UsageError
from upcycle.ir.measured import ModelDistance
from upcycle.ir.report import plain
from upcycle.ir.verdict import likeness
from upcycle.targets.description import is_described, read_report
from upcycle.util.json_text import json_text, read_json

FILE = "operations.json"


class Operation(TypedDict):
    """One command.

    Attributes:
        directory: the last part of the path of the model before.
        settings: the options that it was given.
        distance: from the model before; what it was measured on is in ``inputs``.
    """

    name: str
    directory: str
    settings: dict[str, Any]
    distance: ModelDistance


class History(TypedDict):
    """The conversion, if it is known, and the operations since, the last one last."""

    model: str | None
    recipe: str | None
    operations: list[Operation]


_HISTORY = TypeAdapter(History)


def read_history(directory: Path) -> History | None:
    """What the file of `directory` tells, or None if there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return _HISTORY.validate_python(read_json(path, "remove it"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: not what upcycle writes ({place}: {first['msg'].lower()}); remove it"
        ) from error


def write_history(
    folder: Path, before: Path, name: str, settings: Mapping[str, Any], distance: ModelDistance
) -> None:
    """Write the file into `folder`: the history of `before`, and one operation more."""
    told = read_history(before)
    if told is None:
        report = read_report(before) if is_described(before) else None
        told = {
            "model": report.model if report else None,
            "recipe": report.recipe if report else None,
            "operations": [],
        }
    done: Operation = {
        "name": name,
        "directory": before.absolute().name,
        "settings": dict(settings),
        "distance": distance,
    }
    told = {**told, "operations": [*told["operations"], done]}
    (folder / FILE).write_text(json_text(plain({"form": 1, **told})), encoding="utf-8")


def sentences(told: History) -> list[str]:
    """What was done, a sentence for each step."""
    found = []
    if told["model"] and told["recipe"]:
        found.append(f"Made from {told['model']} by {told['recipe']}.")
    for done in told["operations"]:
        settings = ", ".join(f"{key} {_word(value)}" for key, value in done["settings"].items())
        found.append(f"Then `upcycle {done['name']}` of {done['directory']} ({settings}).")
        found.append(likeness(done["distance"], f"{done['directory']} before"))
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
