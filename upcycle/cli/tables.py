"""Tables for people."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from rich.table import Table

from upcycle.util.spans import span


def fold(paths: Sequence[str]) -> str:
    """``layers.0.mlp`` to ``layers.11.mlp`` as ``layers.{0..11}.mlp``; see `span`."""
    columns = [
        [*dict.fromkeys(parts)] for parts in zip(*(p.split(".") for p in paths), strict=True)
    ]
    return ".".join(
        words[0] if len(words) == 1 else f"{{{span([int(word) for word in words])}}}"
        for words in columns
    )


def new_table(*columns: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        word = max(map(len, column.split()), default=0)
        table.add_column(column, overflow="fold", min_width=word)
    return table


def add_rows(table: Table, rows: Iterable[tuple[str, ...]]) -> None:
    """Add `rows`; neighbours that differ only in one number of their path become one row."""
    for (_, *cells), group in groupby(rows, key=lambda r: (re.sub(r"\d+", "#", r[0]), *r[1:])):
        run: list[str] = []
        for path, *_ in group:
            if run and not _continues(run, path):
                table.add_row(fold(run), *cells)
                run = []
            run.append(path)
        table.add_row(fold(run), *cells)


def _continues(paths: list[str], path: str) -> bool:
    """Whether `path` follows `paths`: one number grows, always the same and by the same step."""
    chain = [p.split(".") for p in (*paths[-2:], path)]
    steps = []
    for a, b in pairwise(chain):
        changed = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if len(changed) != 1 or not (a[changed[0]].isdigit() and b[changed[0]].isdigit()):
            return False
        steps.append((changed[0], int(b[changed[0]]) - int(a[changed[0]])))
    return len(set(steps)) == 1
