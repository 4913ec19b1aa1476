"""Where the converted layers are: the FFN that was there, and the experts in its place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from upcycle.drawing.origins import origin_facts
from upcycle.drawing.repeats import pattern_of
from upcycle.errors import UsageError, one_line
from upcycle.targets.provenance_file import LayerOrigin

MOST_SITES = 40
MOST_SQUARES = 24  # experts that are drawn
LONGEST = 40  # letters of a line
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Site:
    """Layers that follow each other and are equal.

    Attributes:
        path: of all of them, as ``layers.{0..3}.mlp``.
        count: how many there are.
        dense, experts, router: what was there and what is there, in words.
        squares: one for each expert, as far as there is room; whether a token visits so many.
        hidden: experts for which there is none.
    """

    path: str
    count: int
    dense: str
    experts: str
    router: str
    squares: tuple[bool, ...]
    hidden: int


def sites_of(layers: Sequence[LayerOrigin], where: str) -> tuple[Site, ...]:
    """The layers of ``provenance.json``, in the order in which the model runs them.

    Raises:
        UsageError: the file is damaged; the message begins with `where`.
    """
    try:
        told = [(layer["path"], _dense(layer), origin_facts(layer)) for layer in layers]
        groups = groupby(told, key=lambda row: (re.sub(r"\d+", "#", row[0]), *row[1:]))
        return tuple(_site([path for path, *_ in group], *key[1:]) for key, group in groups)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{where}: not what upcycle writes ({one_line(error)}); convert the model again"
        ) from error


def _dense(layer: LayerOrigin) -> str:
    made = layer["layer"]
    arity = int(made["pointwise"]["arity"])
    several = f"{arity} {TIMES} " if arity > 1 else ""
    widths = f"{int(made['d_model'])} → {several}{layer['dense_neurons']} → {int(made['d_out'])}"
    return f"{widths}, {made['pointwise']['name']}"


def _site(paths: list[str], dense: str, facts: dict[str, Any]) -> Site:
    experts, top = facts["num_experts"], facts["top_k"]
    shown = max(0, min(experts, MOST_SQUARES))
    several = "" if experts == 1 else "s"
    shared = f" + {facts['shared']} shared" if facts["shared"] else ""
    return Site(
        path=_cut(pattern_of(paths)),
        count=len(paths),
        dense=_cut(dense),
        experts=_cut(f"{experts} expert{several} of {facts['width']} neurons{shared}"),
        router=_cut(f"top {top}; {facts['router']}"),
        squares=tuple(i < top for i in range(shown)),
        hidden=experts - shown,
    )


def _cut(text: str) -> str:
    """The text without its middle if it is long."""
    most = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: most - 1]}…{text[-most:]}"
