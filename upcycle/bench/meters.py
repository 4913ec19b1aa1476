"""Memory, load and energy while something runs, and the six figures made of them.

Zheng et al., "EfficientLLM", 2025, https://arxiv.org/abs/2505.13840. What this machine has no meter
for is None, never zero.
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
Sampler = Callable[[], float | None]
_COUNTERS = Path("/sys/class/powercap")


def memory_part() -> float:
    """The part of the machine's memory that this process holds."""
    return float(psutil.Process().memory_info().rss / psutil.virtual_memory().total)


def busy_seconds() -> float:
    """How long this process has kept all processors of the machine busy, as a counter."""
    return time.process_time() / (os.cpu_count() or 1)


def joules() -> float | None:
    """The energy counters of the processor packages, or None where they cannot be read."""
    try:
        files = [d / "energy_uj" for d in _COUNTERS.glob("intel-rapl:*") if d.name.count(":") == 1]
        return sum(int(file.read_text("ascii")) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


@dataclass
class Readings:
    """Samples in time of the memory in use; the busy seconds and the joules that were added."""

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
    """What a counter has counted; None if there is none, or it has started again from zero."""
    return None if before is None or after is None or after < before else after - before


def mean_over_time(seconds: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The integral of samples by trapezoids, over the duration; None if a sample is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len(known) < 2:
        return None
    samples = pairwise(zip(seconds, known, strict=True))
    area = sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in samples)
    return area / (seconds[-1] - seconds[0])


def six_metrics(
    found: Readings,
    latencies: Sequence[float],
    tokens: int | None,
    *,
    sizes: tuple[int, int],
    quality: tuple[float, float] | None,
) -> dict[str, float | None]:
    """The figures of the paper, by their names there, and the energy.

    Args:
        found: the meters of the whole run, which took some time.
        latencies: seconds of each request.
        tokens: read or written by all of them together; None if they have none.
        sizes: bytes of the dense weights and of these.
        quality: of both, larger is better; None if it was not measured.

    Returns:
        ``AMU`` mean part of the memory, ``PCU`` mean part of the processors (called a peak in the
        paper, and a mean there, too), ``AL`` seconds of a request, ``TT`` tokens per second,
        ``AEC`` watts, ``MCR`` the compression rate times what is kept of the quality; and
        ``energy`` in joules, which AEC is not.
    """
    duration = found.seconds[-1] - found.seconds[0]
    return {
        "AMU": mean_over_time(found.seconds, found.memory),
        "PCU": None if found.busy is None else found.busy / duration,
        "AL": sum(latencies) / len(latencies),
        "TT": None if tokens is None else tokens / sum(latencies),
        "AEC": None if found.energy is None else found.energy / duration,
        "MCR": None if quality is None else sizes[0] / sizes[1] * (quality[1] / quality[0]),
        "energy": found.energy,
    }
