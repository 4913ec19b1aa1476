"""The files that describe a converted directory: recipe, report, provenance and model card."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from upcycle.errors import UsageError
from upcycle.ir.report import HubSource, Report
from upcycle.ir.spec import Plan
from upcycle.ir.weights import Provenance
from upcycle.recipe.reader import dump_recipe
from upcycle.recipe.schema import Recipe
from upcycle.targets.provenance_file import write_origins
from upcycle.util.json_text import json_text, read_json

REPORT = "report.json"


def describe(
    directory: Path, plan: Plan, provenance: Mapping[str, Provenance], report: Report, card: str
) -> None:
    """Write ``recipe.yaml``, ``report.json``, ``provenance.json`` and ``README.md``, the `card`.

    `provenance` is that of each layer, by FFN path.
    """
    (directory / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (directory / REPORT).write_text(json_text(report.to_json()), encoding="utf-8")
    write_origins(directory, plan, provenance)
    (directory / "README.md").write_text(card, encoding="utf-8")


def is_described(directory: Path) -> bool:
    """Whether the report of the conversion is there: after training, only what was saved is."""
    return (directory / REPORT).is_file()


def read_report(directory: Path) -> Report:
    """The report of a converted model.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = directory / REPORT
    if not path.is_file():
        raise UsageError(
            f"{directory}: no report.json, so this is not an output of upcycle; `upcycle inspect` "
            "shows what it is"
        )
    return Report.from_json(read_json(path, "convert the model again"), str(path))


def made_from(directory: Path) -> tuple[str | None, HubSource | None]:
    """The dense model of a converted directory, as its report names it and where it was found; both
    None if the report is gone."""
    if not is_described(directory):
        return None, None
    report = read_report(directory)
    return report.model, report.source


def recipe_of(report: Report, directory: Path) -> Recipe:
    """The recipe that the report of `directory` states.

    Raises:
        UsageError: it is no recipe of this version.
    """
    try:
        return Recipe.model_validate_json(json.dumps(report.resolved_recipe))
    except ValidationError as error:
        first = error.errors()[0]
        said = first.get("ctx", {}).get("error")  # of our own words, none are changed
        why = f"{first['msg'].lower()}; convert the model again" if said is None else str(said)
        if first["loc"][-1] == "method":
            why += "; `upcycle.verify(dense, converted)` in Python compares the two without it"
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{directory / REPORT}: resolved_recipe.{where}: {why}") from error
