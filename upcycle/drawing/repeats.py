"""What comes several times in a row, and the names of all of it in one."""

import re
from collections.abc import Hashable, Iterator, Sequence

from upcycle.util.spans import span

LONGEST = 32  # members of a group that repeats


def repeats(sequence: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Cut `sequence` into groups of neighbours that come several times, and single members.

    ``a b c b c d`` is ``a``, twice ``b c``, ``d``.

    Yields:
        Where a group begins, how many members it has, and how often it comes.
    """
    start = 0
    while start < len(sequence):
        best = (1, 1)
        for period in range(1, min(LONGEST, (len(sequence) - start) // 2) + 1):
            first = sequence[start : start + period]
            times = 1
            while sequence[start + times * period : start + (times + 1) * period] == first:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = (period, times)
        yield start, *best
        start += best[0] * best[1]


def pattern_of(paths: Sequence[str]) -> str:
    """``a.{0..3}.b`` for the paths ``a.0.b`` to ``a.3.b``; they differ in numbers."""
    unique = list(dict.fromkeys(paths))
    columns = list(zip(*(re.split(r"(\d+)", path) for path in unique), strict=False))
    differ = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not differ:
        return unique[0]
    if len(differ) > 1 or not all(part.isdigit() for part in columns[differ[0]]):
        return f"{unique[0]} to {unique[-1]}"
    numbers = [int(part) for part in columns[differ[0]]]
    return "".join(
        column[0] if i != differ[0] else f"{{{span(numbers)}}}" for i, column in enumerate(columns)
    )
