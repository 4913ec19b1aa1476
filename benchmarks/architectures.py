"""Write docs/architectures.md: what is found in every architecture of the zoo, and the error.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --check

With --check nothing is written: the table is made again and compared, but for its last two columns,
which depend on the machine. The zoo is in tests/zoo*.py: tiny models with random weights.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/architectures.md"
UNSTABLE = 2

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
already, are here to show that nothing else is taken for one.

{count} architectures, {ffns} FFNs.

"""
HEAD = (
    "architecture", "class", "found / expected", "activation", "placement", "refused",
    "error", "seconds, at most",
)  # fmt: skip


def rows() -> list[list[str]]:
    from zoo_facts import ARCHITECTURES, facts_of

    torch.set_num_threads(1)
    table = []
    for name in sorted(ARCHITECTURES):
        facts, case = facts_of(name), ARCHITECTURES[name]
        error = "-" if facts.error is None else f"{facts.error:.0e}"
        table.append(
            [
                name,
                f"`{facts.library}`" if "." in facts.library else facts.library,
                f"{len(facts.found)} / {case.ffns}",
                facts.activation or "-",
                facts.placement or "-",
                str(facts.misses),
                error,
                f"{math.ceil(2 * facts.seconds) / 2:.1f}",
            ]
        )
    return table


def markdown(table: list[list[str]]) -> str:
    ffns = sum(int(row[2].partition(" ")[0]) for row in table)
    lines = [list(HEAD), ["---"] * len(HEAD), *table]
    text = TEXT.format(count=len(table), ffns=ffns)
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stable(text: str) -> list[str]:
    """The lines without the columns that depend on the machine."""
    return [
        "|".join(line.split("|")[: -UNSTABLE - 1]) if line.startswith("|") else line
        for line in text.splitlines()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "tests"))
    warnings.simplefilter("ignore")
    new = markdown(rows())
    if not check:
        TABLE.write_text(new)
        return
    old = TABLE.read_text()
    different = [pair for pair in zip(stable(old), stable(new), strict=False) if len(set(pair)) > 1]
    for before, after in different:
        print(f"- {before}\n+ {after}")
    if different or len(stable(old)) != len(stable(new)):
        raise SystemExit("docs/architectures.md is out of date: run benchmarks/architectures.py")


if __name__ == "__main__":
    main()
