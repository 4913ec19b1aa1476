"""Run several functions in turn and say how long each took."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST, MOST = 5, 200  # rounds


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = LEAST,
    most: int = MOST,
) -> dict[str, list[float]]:
    """Time each of `calls` once in every round, each round beginning with another one.

    Each is called once before, untimed. The last round is that in which `seconds` have passed;
    there are at least `least` and at most `most`. Returns the seconds of each call, by round.
    """
    names = list(calls)
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            before = time.perf_counter()
            calls[name]()
            found[name].append(time.perf_counter() - before)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and both quartiles, as plain data."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def compared(
    found: Mapping[str, Sequence[float]], floors: Mapping[str, float | None]
) -> dict[str, Any]:
    """Times of ``dense`` and ``converted`` as plain data: spread, rounds, floor, and the ratio.

    The ratio is that of the two times of one round; its spread is that over the rounds.
    """
    quotients = [b / a for a, b in zip(found["dense"], found["converted"], strict=True)]
    rows = {
        name: {**spread(times), "rounds": len(times), "floor": floors[name]}
        for name, times in found.items()
    }
    return {**rows, "ratio": spread(quotients)}
