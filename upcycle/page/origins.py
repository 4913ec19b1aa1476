"""What the experts are made of, counted from ``provenance.json``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from upcycle.errors import UsageError, one_line
from upcycle.targets.provenance_file import DRAWN, MOST, PADDING, LayerOrigin, runs, runs_of

BINS = 96  # of the dense neurons, in the picture
MOST_EXPERTS = 16  # in the picture


@dataclass(frozen=True)
class Kind:
    """Layers that follow each other and are made in the same way.

    Attributes:
        paths: the layers.
        extra: neurons of the experts that are none of the dense layer, in words.
        was: the numbers of the experts in the conversion, if they have others now.
        parts: what became of the dense neurons: a name, and the least and largest share of them.
    """

    method: str
    router: str
    experts: str
    sources: tuple[str, ...]
    extra: str
    was: str = ""
    paths: tuple[str, ...] = ()
    parts: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Origin:
    """The experts of one layer in detail.

    Attributes:
        names: of the rows: the experts, and the shared one.
        share_EB: of each bin of dense neurons, the share that the expert has.
        hidden: experts that are left out.
    """

    path: str
    neurons: int
    names: tuple[str, ...]
    share_EB: tuple[tuple[float, ...], ...]
    hidden: int


def kinds_of(layers: Sequence[LayerOrigin], where: str) -> list[Kind]:
    """The layers of the file, equal neighbours together.

    Raises:
        UsageError: the file is damaged; the message begins with `where`.
    """
    try:
        told = [(layer["path"], *_told(layer)) for layer in layers]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{where}: not what upcycle writes ({one_line(error)}); convert the model again"
        ) from error
    kinds = []
    for (kind, names), group in groupby(told, key=lambda row: (row[1], tuple(row[2]))):
        same = list(group)
        shares = [(name, [parts[name] for *_, parts in same]) for name in names]
        parts = tuple((name, min(found), max(found)) for name, found in shares)
        kinds.append(replace(kind, paths=tuple(path for path, *_ in same), parts=parts))
    return kinds


def first_split(layers: Sequence[LayerOrigin]) -> Origin | None:
    """The first layer whose experts are not all of the dense neurons; `kinds_of` has read it."""
    for layer in layers:
        whole = [(0, layer["dense_neurons"])]
        if any(list(runs_of(text)) != whole for text in layer["experts"]):
            return _origin(layer)
    return None


def _told(layer: LayerOrigin) -> tuple[Kind, dict[str, float]]:
    """The kind of a layer, without its path and parts, and the share of each part."""
    made, neurons, names = layer["layer"], _neurons(layer), layer["experts"]
    width, shared = int(made["width"]), int(made["shared"])
    held, padding, drawn = np.zeros(neurons, np.int32), 0, 0
    for text in names:
        counts, zero, new = _held(text, neurons, width)
        held, padding, drawn = held + counts, padding + zero, drawn + new
    common = _held(layer["shared"], neurons, shared)[0] > 0
    apart = held[~common]
    several = "in all experts" if (apart == len(names)).all() else "in several experts"
    parts = (
        ("in one expert", (apart == 1).sum()),
        (several, (apart > 1).sum()),
        ("in the shared expert", common.sum()),
        ("in no expert", (apart == 0).sum()),
    )
    total = len(names) * width
    extra = (f"{n / total:.0%} {name}" for n, name in ((padding, "padding"), (drawn, "new")) if n)
    experts = f"{len(names)} of {width} neurons" + (f", 1 shared of {shared}" if shared else "")
    low_rank = int(made.get("low_rank", 0))
    kind = Kind(
        method=layer["method"],
        router=layer["router"],
        experts=experts + (f", a linear map of rank {low_rank}" if low_rank else ""),
        sources=tuple(dict.fromkeys(layer["sources"])),
        extra=", ".join(extra),
        was=runs(map(int, layer.get("was", []))),
    )
    return kind, {name: float(n) / neurons for name, n in parts if n}


def _origin(layer: LayerOrigin) -> Origin:
    neurons, width = _neurons(layer), int(layer["layer"]["width"])
    shared = [("shared", layer["shared"])] if layer["shared"] else []
    rows = [*shared, *((f"expert {i}", text) for i, text in enumerate(layer["experts"]))]
    bins = min(BINS, neurons)
    starts = np.arange(bins) * neurons // bins
    sizes = np.diff(np.append(starts, neurons))
    most = max(width, int(layer["layer"]["shared"]))
    shares = [
        tuple((np.add.reduceat(_held(text, neurons, most)[0] > 0, starts) / sizes).tolist())
        for _, text in rows[:MOST_EXPERTS]
    ]
    names = tuple(name for name, _ in rows[:MOST_EXPERTS])
    return Origin(layer["path"], neurons, names, tuple(shares), len(rows) - len(names))


def _neurons(layer: LayerOrigin) -> int:
    neurons, experts = layer["dense_neurons"], len(layer["experts"])
    if not 0 < neurons <= MOST // 16 or not experts:
        raise ValueError(f"{experts} experts of {neurons} dense neurons")
    return neurons


def _held(
    text: str, neurons: int, most: int
) -> tuple["np.ndarray[tuple[int], np.dtype[np.int32]]", int, int]:
    """How often an expert has each dense neuron, and its neurons of padding and those drawn."""
    steps = np.zeros(neurons + 1, np.int32)
    others = {PADDING: 0, DRAWN: 0}
    for first, count in _bounded(text, most):
        if first in others:
            others[first] += count
        elif first + count <= neurons:
            steps[first] += 1
            steps[first + count] -= 1
        else:
            raise ValueError(f"neuron {first + count - 1} of {neurons}")
    return np.cumsum(steps[:-1], dtype=np.int32), others[PADDING], others[DRAWN]


def _bounded(text: str, most: int) -> Iterator[tuple[int, int]]:
    total = 0
    for first, count in runs_of(text):
        total += count
        if total > most:
            raise ValueError(f"an expert has more than its {most} neurons")
        yield first, count
