"""Scales and ticks of the charts, and how their figures are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


def figure(value: float) -> str:
    """Three digits: ``0.218``, ``8.04e-07``, ``infinite``."""
    return f"{value:.3g}" if math.isfinite(value) else "infinite"


@dataclass(frozen=True)
class Scale:
    """From the values `low` to `high` to the places `start` to `end` of a drawing."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The place of `value`, or the end that it lies beyond."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Places and figures: powers of ten, or round steps."""
        if self.is_log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, math.ceil((high - low) / most))
            values = [10.0**power for power in range(low, high + 1, step)]
        else:
            step_of = (self.high - self.low) / most
            unit = 10 ** math.floor(math.log10(step_of))
            round_step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= step_of * 0.999)
            first = math.ceil(self.low / round_step - 1e-9)
            last = math.floor(self.high / round_step + 1e-9)
            values = [round_step * n for n in range(first, last + 1)]
        return [(self.at(value), f"{value:g}") for value in values]


def decades(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic scale of whole powers of ten around the values that have one."""
    powers = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    return Scale(10.0**low, 10.0 ** max(high, low + 1), start, end, is_log=True)
