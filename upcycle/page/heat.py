"""Heat maps as SVG: a path for each colour, so that thousands of cells stay small."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from markupsafe import Markup

from upcycle.ir.report import Report
from upcycle.page.origins import Origin

MOST_ROWS, MOST_COLUMNS = 200, 256
WIDTH = 480  # of all cells
SHOWN_FROM = 28  # a cell of this width has room for its figure
LOAD_STEPS = (0.25, 0.5, 1, 2, 4)  # upper ends of the colours, as parts of the even share
LOAD_LEGEND = ("none", "to ¼", "¼ to ½", "½ to 1", "1 to 2", "2 to 4", "over 4")
NEURON_STEPS = (0.125, 0.25, 0.5, 0.75, 0.999)
NEURON_LEGEND = ("none", "to ⅛", "⅛ to ¼", "¼ to ½", "½ to ¾", "over ¾", "all")


@dataclass(frozen=True)
class Row:
    """A row of the map: its place, a short name, its figures at the end, and all in words."""

    y: float
    name: str
    end: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A drawing of cells.

    Attributes:
        cell_width, cell_height: of a cell; all are in `width` x `height`.
        paths: a class of colour and the outlines of its cells.
        texts: x, y, a figure and the class of its cell, where there is room for figures.
        pooled: how many columns of the data are one here.
        hidden: rows that are left out.
    """

    columns: int
    cell_width: float
    cell_height: float
    rows: tuple[Row, ...]
    paths: tuple[tuple[int, Markup], ...]
    texts: tuple[tuple[float, float, str, int], ...]
    pooled: int
    hidden: int

    @property
    def width(self) -> float:
        """Of all cells."""
        return self.columns * self.cell_width

    @property
    def height(self) -> float:
        """Of all cells."""
        return len(self.rows) * self.cell_height


@dataclass(frozen=True)
class Load:
    """How the tokens use the experts of each layer.

    Attributes:
        data: what the tokens are.
        heat: a row for each layer; an even share is 1.
        idle: how many experts got no token at all.
        experts: of all layers.
    """

    data: str
    heat: HeatMap
    idle: int
    experts: int


def load_of(report: Report) -> Load | None:
    """The load of every expert, on the tokens of the verification or else of the calibration."""
    layers = report.layers or ()
    seen = [(row.path, row.tokens_per_expert) for row in layers]
    data = next((row.inputs for row in layers if row.inputs), None)
    if data is None and report.end_to_end:
        data = report.end_to_end.inputs
    calibration = report.calibration
    if calibration and (not seen or any(row.inputs for row in layers)):
        seen = [(usage.path, usage.tokens_per_expert) for usage in calibration.layers]
        data = f"the calibration data: {calibration.data}"
    seen = [(path, counts) for path, counts in seen if counts]
    if not seen:
        return None
    shares, rows = [], []
    names = short_names([path for path, _ in seen])
    for name, (path, counts) in zip(names, seen, strict=True):
        tokens = np.array(counts, dtype=float)
        shares.append(tokens / max(tokens.mean(), 1e-9))
        most, least, idle = int(tokens.argmax()), tokens.min(), int((tokens == 0).sum())
        end = f"{least:.0f} to {tokens.max():.0f}" + (f", {idle} idle" if idle else "")
        words = f"{path}: {end} tokens per expert, the most to expert {most}"
        rows.append((name, end, words))
    idle = sum(int((share == 0).sum()) for share in shares)
    heat = heat_map(shares, rows, LOAD_STEPS)
    return Load(data or "the inputs of the verification", heat, idle, sum(map(len, shares)))


def neuron_map(origin: Origin) -> HeatMap:
    """Which dense neurons of a layer went to which expert: a row for each, in order of neurons."""
    shares = [np.asarray(row) for row in origin.share_EB]
    rows = []
    for name, share in zip(origin.names, shares, strict=True):
        held = f"{share.mean():.0%}"
        rows.append((name, held, f"{name}: {held} of the dense neurons"))
    return heat_map(shares, rows, NEURON_STEPS, figures=False)


def short_names(paths: Sequence[str]) -> list[str]:
    """The part of each path that the others do not have, as ``12`` of ``model.layers.12.mlp``."""
    parts = [path.split(".") for path in paths]
    if len(set(paths)) < 2:
        return [_tail(path) for path in paths]
    head = _in_common(parts)
    foot = _in_common([part[:head:-1] for part in parts])
    return [_tail(".".join(part[head : len(part) - foot])) for part in parts]


def _in_common(parts: Sequence[Sequence[str]]) -> int:
    """How many items all of them begin with."""
    columns = zip(*parts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _tail(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def heat_map(
    shares: Sequence["np.ndarray[tuple[int], np.dtype[np.float64]]"],
    rows: Sequence[tuple[str, str, str]],
    steps: Sequence[float],
    *,
    figures: bool = True,
) -> HeatMap:
    """A map of `shares`; a row has a name, an end and a title, and `steps` are the upper ends of
    the colours."""
    longest = max(map(len, shares))
    pooled = -(-longest // MOST_COLUMNS)
    hidden = max(0, len(shares) - MOST_ROWS)
    columns = -(-longest // pooled)
    width = round(min(36.0, WIDTH / columns), 2)
    height = round(max(12.0, min(22.0, width)), 1)
    outlines: dict[int, list[str]] = {}
    texts, placed = [], []
    for row, (share, (name, end, title)) in enumerate(zip(shares[:MOST_ROWS], rows, strict=False)):
        y = round(row * height, 1)
        placed.append(Row(y, name, end, title))
        starts = np.arange(0, len(share), pooled)
        means = np.add.reduceat(share, starts) / np.minimum(pooled, len(share) - starts)
        levels = np.where(means > 0, 1 + np.searchsorted(steps, means), 0)
        for column, (level, mean) in enumerate(zip(levels.tolist(), means.tolist(), strict=True)):
            x = round(column * width, 2)
            outlines.setdefault(level, []).append(f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z")
            if figures and width >= SHOWN_FROM:
                texts.append((x + width / 2, y + height / 2, f"{mean:.1f}" if mean else "0", level))
    # Numbers and letters that are made here, which need no escapes.
    paths = tuple((level, Markup("".join(parts))) for level, parts in sorted(outlines.items()))
    return HeatMap(columns, width, height, tuple(placed), paths, tuple(texts), pooled, hidden)
