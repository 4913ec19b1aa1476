"""The table of docs/architectures.md, written from what was found and read back to be compared."""

import math
from pathlib import Path

from zoo_facts import ARCHITECTURES, Facts

TABLE = Path(__file__).parents[1] / "docs/architectures.md"
HEAD = (
    "architecture", "class", "found / expected", "activation", "placement", "refused",
    "error", "seconds, at most",
)  # fmt: skip
TRIED = "\n## Tried and not captured\n"
STABLE = len(HEAD) - 2  # columns; the last two depend on the machine

TEXT = """\
# Architectures

`python benchmarks/architectures.py` makes this table. Each row is a tiny model, built from a
configuration with random weights. Its inputs are guessed, its forward is captured, and its FFNs
are located; *expected* was worked out from the architecture. Then every FFN is split into five
experts that are all used (`split-all`), and the outputs are compared with those of the dense model.
The error is the largest difference over the largest output, in float32. Every FFN matters: without
them the output moves by more than 1 %.

*Placement* tells how an FFN lies in the model: a module of its own, linear maps of sibling modules,
or linear maps that one forward applies among other things. *Refused* counts places that look like
an FFN and are none; `upcycle inspect` gives the reasons. Models with no FFN, or with experts
already, are here to show that nothing else is taken for one. An activation without a name is
*custom*: it is kept as it was written.

{count} architectures, {ffns} FFNs.

"""


def row(name: str, facts: Facts) -> list[str]:
    """The cells of one architecture, in the order of `HEAD`."""
    return [
        name,
        f"`{facts.library}`" if "." in facts.library else facts.library,
        f"{len(facts.found)} / {ARCHITECTURES[name].ffns}",
        facts.activation or "-",
        facts.placement or "-",
        str(facts.misses),
        "-" if facts.error is None else f"{facts.error:.0e}",
        f"{math.ceil(2 * facts.seconds) / 2:.1f}",
    ]


def markdown(table: list[list[str]]) -> str:
    """The whole page."""
    ffns = sum(int(cells[2].partition(" ")[0]) for cells in table)
    lines = [list(HEAD), ["---"] * len(HEAD), *table]
    text = TEXT.format(count=len(table), ffns=ffns)
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines) + _tried()


def _tried() -> str:
    """The end of the page, which was written by hand and is kept."""
    return "".join(TABLE.read_text().partition(TRIED)[1:])


def written_rows() -> list[list[str]]:
    """The rows that the page has."""
    table = TABLE.read_text().partition(TRIED)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
