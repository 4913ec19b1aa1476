"""Memory, load and energy while something runs, and the six figures made of them.

Zheng et al., "EfficientLLM", 2025, https://arxiv.org/abs/2505.13840. A figure without a meter on
this machine is None, never zero.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

EVERY = 0.1  # seconds between two samples
SIX = ("AMU", "PCU", "AL", "TT", "AEC", "MCR", "energy")  # what `six_metrics` returns
Sampler = Callable[[], float | None]
_COUNTERS = Path("/sys/class/powercap")


def memory_part() -> float:
    """The part of the machine's memory that this process holds."""
    return float(psutil.Process().memory_info().rss / psutil.virtual_memory().total)


def busy_seconds() -> float:
    """A counter: processor seconds of this process over the number of processors."""
    return time.process_time() / (os.cpu_count() or 1)


def joules() -> float | None:
    """The energy counter of the processor packages, or None where it cannot be read."""
    try:
        files = [d / "energy_uj" for d in _COUNTERS.glob("intel-rapl:*") if d.name.count(":") == 1]
        return sum(int(file.read_text("ascii")) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


@dataclass
class Readings:
    """Samples of the memory in use over time, and what the counters have counted."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float | None] = field(default_factory=list)
    busy: float | None = None
    energy: float | None = None


@contextmanager
def readings(
    memory: Sampler = memory_part, busy: Sampler = busy_seconds, energy: Sampler = joules
) -> Iterator[Readings]:
    """Read the meters while the block runs: the memory every 100 ms, counters before and after."""
    found, over = Readings(), threading.Event()

    def sample() -> None:
        found.seconds.append(time.perf_counter())
        found.memory.append(memory())

    def run() -> None:
        while not over.wait(EVERY):
            sample()

    before = busy(), energy()
    sample()
    thread = threading.Thread(target=run, name="meters", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        sample()
        found.busy, found.energy = _added(before[0], busy()), _added(before[1], energy())


def _added(before: float | None, after: float | None) -> float | None:
    """None if there is no counter, or it has started again from zero."""
    return None if before is None or after is None or after < before else after - before


def mean_over_time(seconds: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The integral of samples by trapezoids, over the duration; None if a sample is missing."""
    present = [value for value in values if value is not None]
    if len(present) < len(values) or len(present) < 2:
        return None
    samples = pairwise(zip(seconds, present, strict=True))
    area = sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in samples)
    return area / (seconds[-1] - seconds[0])


def six_metrics(
    found: Readings | None,
    latency: float,
    tokens: int | None,
    *,
    sizes: tuple[int, int],
    quality: tuple[float, float] | None,
) -> dict[str, float | None]:
    """The figures of the paper, by their names there, and the energy.

    Args:
        found: the meters of a run of this model by itself; None if there was none.
        latency: seconds of a request, where both models ran in turn.
        tokens: of a request; None if it has none.
        sizes: bytes of the dense weights and of this model's.
        quality: of the dense model and of this one, larger is better; None if not measured.

    Returns:
        ``AMU`` mean part of the memory, ``PCU`` mean part of the processors (the paper calls it a
        peak, and takes the mean, too), ``AL`` seconds of a request, ``TT`` tokens per second,
        ``AEC`` watts, ``MCR`` the compression rate times the part of the quality that is left; and
        ``energy`` in joules.
    """
    found = found or Readings([0.0, 1.0], [None, None])
    duration = found.seconds[-1] - found.seconds[0]
    return {
        "AMU": mean_over_time(found.seconds, found.memory),
        "PCU": None if found.busy is None else found.busy / duration,
        "AL": latency,
        "TT": None if tokens is None else tokens / latency,
        "AEC": None if found.energy is None else found.energy / duration,
        "MCR": None if quality is None else sizes[0] / sizes[1] * (quality[1] / quality[0]),
        "energy": found.energy,
    }
