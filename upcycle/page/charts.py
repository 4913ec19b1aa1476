"""The places of what is drawn: bars of checks, errors of layers, quality against work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from upcycle.ir.measured import Check, LayerDistance
from upcycle.ir.report import Report
from upcycle.page.heat import short_names
from upcycle.page.measured import Measured, measured
from upcycle.page.scale import Scale, decades, figure

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 700, 14, 204
BAR = 140  # the width of a check's bar
MOST_LAYERS = 400
MOST_STEP = 80  # between two layers
MOST_NAMES = 16  # below the axis
LABEL_HEIGHT = 13
WORST_FACTOR = 1000  # of perplexity: what is worse is not drawn


@dataclass(frozen=True)
class Bar:
    """A check as a bar: where the error ends and where what is allowed stands."""

    check: Check
    error: float
    allowed: float


def bars_of(checks: Sequence[Check]) -> list[Bar]:
    """The checks on one logarithmic scale; an error of zero has no bar."""
    scale = decades([n for check in checks for n in (check.error, check.allowed)], 0, BAR)
    return [
        Bar(check, *(scale.at(n) if n else 0.0 for n in (check.error, check.allowed)))
        for check in checks
    ]


@dataclass(frozen=True)
class Stem:
    """The error of a layer: its place, its name below the axis if there is room, and in words."""

    x: float
    y: float
    name: str
    title: str


@dataclass(frozen=True)
class LayerChart:
    """Relative errors by layer, on a logarithmic scale."""

    stems: tuple[Stem, ...]
    ticks: list[tuple[float, str]]
    worst: LayerDistance
    hidden: int


def layer_chart(report: Report) -> LayerChart | None:
    """The distance of each layer from its dense FFN."""
    if not (rows := report.layers) or not (worst := report.worst_layer):
        return None
    shown = rows[:MOST_LAYERS]
    scale = decades([row.relative for row in rows], BOTTOM, TOP)
    step = min(MOST_STEP, (RIGHT - LEFT) / len(shown))
    every = -(-len(shown) // MOST_NAMES)
    names = short_names([row.path for row in shown])
    stems = tuple(
        Stem(
            round(LEFT + step * (i + 0.5), 1),
            scale.at(row.relative) if row.relative else BOTTOM,
            name if i % every == 0 else "",
            f"{row.path}: relative error {figure(row.relative)}, "
            f"mean cosine {figure(row.mean_cosine)}",
        )
        for i, (row, name) in enumerate(zip(shown, names, strict=True))
    )
    return LayerChart(stems, scale.ticks(), worst, len(rows) - len(shown))


@dataclass(frozen=True)
class Line:
    """The measured points of a recipe."""

    name: str
    points: tuple[tuple[float, float], ...]
    label_y: float
    is_ours: bool


@dataclass(frozen=True)
class Quality:
    """One figure of how near this model is to the dense one."""

    kind: Literal["perplexity", "cosine", "agreement"]
    what: str
    value: float

    @property
    def text(self) -> str:
        """The figure."""
        return f"{self.value:.1%}" if self.kind == "agreement" else figure(self.value)


def figures_of(report: Report) -> list[Quality]:
    """What the model is judged by, as by its verdict; the most telling figure is the first."""
    end = report.end_to_end
    if end is None:
        return []
    if found := end.language_model:
        factor = found.converted_perplexity / found.dense_perplexity
        return [Quality("perplexity", "perplexity over the dense one", factor)]
    judged = []
    for name, out in sorted(
        end.outputs.items(), key=lambda o: (o[0] != "sentence_embedding", o[0])
    ):
        if out.top1_agreement is None:
            judged.append(Quality("cosine", f"mean cosine of {name}", out.mean_cosine))
        else:
            what = f"same largest entry of {name}"
            judged.append(Quality("agreement", what, out.top1_agreement))
    return [one for one in judged if math.isfinite(one.value)]


@dataclass(frozen=True)
class QualityChart:
    """Quality against work.

    Attributes:
        what: the quality of this model, in words.
        work, value: of this model; `x` and `y` are its place.
        is_same_model: whether the measured points are of this very dense model.
        omitted: how many measured points are too bad to be drawn.
    """

    measured: Measured
    what: str
    work: float
    value: float
    x: float
    y: float
    lines: tuple[Line, ...]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    is_same_model: bool
    omitted: int


def quality_chart(report: Report) -> QualityChart | None:
    """This model's point among those that were measured on other models."""
    costs = report.costs
    if costs is None or (work := costs.work) is None:
        return None
    if not (found := [one for one in figures_of(report) if one.kind in measured()]):
        return None
    what, value, kind = found[0].what, found[0].value, found[0].kind
    known = measured()[kind]
    points = [(x, y) for line in known.points.values() for x, y in line]
    across = Scale(0, max(1.0, math.ceil(work * 4) / 4), LEFT + 90, RIGHT)
    if kind == "perplexity":
        kept = [y for _, y in points if y <= WORST_FACTOR]
        down = decades([*kept, min(max(value, 1), WORST_FACTOR)], TOP, BOTTOM)
    else:
        kept = [y for _, y in points]
        down = Scale(math.floor(min(*kept, max(value, 0)) * 5) / 5, 1.0, BOTTOM, TOP)
    lines = [
        Line(
            name,
            tuple((across.at(x), down.at(y)) for x, y in line if y <= WORST_FACTOR),
            0,
            name == report.recipe,
        )
        for name, line in known.points.items()
    ]
    return QualityChart(
        known,
        what,
        work,
        value,
        across.at(work),
        down.at(value),
        _labelled([line for line in lines if line.points]),
        [(x, f"{float(text):.0%}") for x, text in across.ticks(5)],
        down.ticks(5),
        report.model == known.model,
        len(points) - len(kept),
    )


def _labelled(lines: list[Line]) -> tuple[Line, ...]:
    """The names beside the leftmost points, none on another."""
    lines = sorted(lines, key=lambda line: line.points[0][1])
    places: list[float] = []
    for line in lines:
        wanted = line.points[0][1] + 4
        places.append(max(wanted, places[-1] + LABEL_HEIGHT) if places else wanted)
    over = max(0.0, places[-1] - BOTTOM) if places else 0
    for i in reversed(range(len(places))):  # push up again what went below the axis
        ceiling = places[i + 1] - LABEL_HEIGHT if i + 1 < len(places) else BOTTOM
        places[i] = round(min(places[i], ceiling), 1) if over else round(places[i], 1)
    return tuple(
        Line(line.name, line.points, place, line.is_ours)
        for line, place in zip(lines, places, strict=True)
    )
