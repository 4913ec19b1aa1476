"""The page: what the files of a converted directory say, in a template that escapes everything."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from upcycle.errors import UsageError, one_line
from upcycle.ir.report import Report
from upcycle.page import charts, heat
from upcycle.page.mixture import Mixture
from upcycle.page.origins import Kind, Origin, first_split, kinds_of
from upcycle.page.routing import Routing, read_routing
from upcycle.page.scale import figure
from upcycle.page.sites import MOST_SITES, Site, sites_of
from upcycle.page.speed import FILE as BENCH
from upcycle.page.speed import Speed, read_speed
from upcycle.targets.description import read_report
from upcycle.targets.provenance_file import FILE as PROVENANCE
from upcycle.targets.provenance_file import read_origins
from upcycle.targets.runtimes.support import Support
from upcycle.util.text_file import write_text
from upcycle.util.untrusted import printable
from upcycle.util.wording import short, size
from upcycle.version import __version__

FILE = "report.html"
MOST_CHARACTERS = 300  # of a text; a recipe is shown line by line
MOST_ROWS = 200  # of a table
_SUPPORT = TypeAdapter(Support)


@dataclass(frozen=True)
class Contents:
    """All that a page tells.

    Attributes:
        where: the directory, for messages.
        kinds: what the experts are made of; empty where an older version wrote no provenance.
        origin: one layer in detail, if its experts are parts of the dense layer.
        speed: if it was measured.
        sites: where the layers are, in the order in which they run.
        routing: if it was traced.
    """

    report: Report
    where: str = ""
    kinds: tuple[Kind, ...] = ()
    origin: Origin | None = None
    speed: Speed | None = None
    sites: tuple[Site, ...] = ()
    routing: Routing | None = None


def read_contents(directory: Path) -> Contents:
    """What lies in a converted directory: report.json, and if they are there provenance.json,
    bench.json and trace.npz.

    Raises:
        UsageError: the directory is no output of upcycle, or a file is damaged.
    """
    report = read_report(directory)
    layers = read_origins(directory) or []
    where = str(directory / PROVENANCE)
    kinds, sites = tuple(kinds_of(layers, where)), sites_of(layers, where)
    speed = read_speed(directory, report)
    split, routing = first_split(layers), read_routing(directory)
    return Contents(report, str(directory), kinds, split, speed, sites, routing)


def page(contents: Contents | Mixture) -> str:
    """The page as HTML: one file that loads nothing. The same contents give the same text.

    Raises:
        UsageError: the report has figures that no conversion has.
    """
    if isinstance(contents, Mixture):
        return _of_mixture(contents)
    try:
        return _page(contents)
    except (ArithmeticError, ValueError) as error:  # of a damaged file: what divides is zero, ...
        raise UsageError(
            f"{contents.where}: the figures of its report are not those of a conversion "
            f"({one_line(error)}); convert the model again"
        ) from error


def _of_mixture(contents: Mixture) -> str:
    template = _environment().get_template("mixture.html.jinja")
    return template.render(version=__version__, contents=contents, **_pictures(contents.origin))


def _pictures(origin: Origin | None) -> dict[str, Any]:
    """What both pages draw with."""
    return {
        "neurons": heat.neuron_map(origin) if origin else None,
        "most": MOST_ROWS,
        "most_sites": MOST_SITES,
        "chart": charts,
        "heat": heat,
    }


def _page(contents: Contents) -> str:
    report = contents.report
    runtimes = report.checkpoint.runtimes if report.checkpoint else {}
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            version=report.upcycle,
            contents=contents,
            runtimes=[
                (name, _SUPPORT.validate_python(held).text()) for name, held in runtimes.items()
            ],
            verdict=report.verdict,
            figures=charts.figures_of(report),
            report=report,
            bars=charts.bars_of(report.checks[:MOST_ROWS]),
            layers=charts.layer_chart(report),
            load=heat.load_of(report),
            quality=charts.quality_chart(report),
            recipe=yaml.safe_dump(_bounded(report.resolved_recipe), sort_keys=False).splitlines(),
            bench_file=BENCH,
            **_pictures(contents.origin),
        )
    )


def page_file(directory: Path) -> Path:
    """Where the page of a converted directory is."""
    return directory / FILE


def write_page(contents: Contents | Mixture, file: Path) -> Path:
    """Write the page to `file`; returns that.

    Raises:
        UsageError: as `page`, or nothing can be written there.
    """
    write_text(file, page(contents))
    return file


def _bounded(data: Any) -> Any:
    """The beginning of each list and text, so that YAML of a damaged report is no long work."""
    if isinstance(data, dict):
        return {_bounded(key): _bounded(held) for key, held in [*data.items()][:MOST_ROWS]}
    if isinstance(data, list | tuple):
        return [_bounded(held) for held in data[:MOST_ROWS]]
    return data[: MOST_CHARACTERS + 1] if isinstance(data, str) else data


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters.update(figure=figure, short=short, size=size)
    return made


def _shown(value: Any) -> Any:
    """What a template prints: a text of a file without control characters, and not endless."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = printable(value[: MOST_CHARACTERS + 1])
    return text if len(value) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
