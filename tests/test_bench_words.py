"""The sentence that ends a benchmark, and that all its figures are of one measurement."""

from typing import Any

import pytest

from upcycle.bench.timing import compared
from upcycle.cli.tables_of_bench import conclusion


def row(*times: tuple[float, float], tokens: int | None) -> dict[str, Any]:
    """Rounds, each with the seconds of the dense model and of the converted one."""
    dense, converted = zip(*times, strict=True)
    floors = {"dense": None, "converted": None}
    return {"tokens": tokens} | compared({"dense": dense, "converted": converted}, floors)


FASTER, SLOWER = [(2.0, 1.0)] * 5, [(1.0, 1.5)] * 5
NOISE = [(1.0, 1.2), (1.0, 0.8), (1.0, 1.0), (1.0, 1.1), (1.0, 0.9)]


@pytest.mark.parametrize(
    ("reading", "writing", "said"),
    [
        (
            FASTER,
            SLOWER,
            "Reading 512 tokens it is 2.00 times as fast as the dense model; writing it is slower: "
            "it takes 1.50 times as long as the dense model; on disk it takes 1.20 times the "
            "bytes.",
        ),
        (
            NOISE,
            None,
            "Reading 512 tokens it is as fast as the dense model, within the spread of the rounds "
            "(0.90 to 1.10 of its time); on disk it takes 1.20 times the bytes.",
        ),
    ],
)
def test_the_conclusion(
    reading: list[tuple[float, float]], writing: list[tuple[float, float]] | None, said: str
) -> None:
    found = {
        "reading": [row(*NOISE, tokens=1), row(*reading, tokens=512)],
        "writing": writing and row(*writing, tokens=1),
        "disk": {"dense": 100, "converted": 120},
    }
    assert conclusion(found) == said


def test_a_batch_has_no_tokens() -> None:
    found = {
        "reading": [row(*FASTER, tokens=None)],
        "writing": None,
        "disk": {"dense": 100, "converted": 27},
    }
    assert conclusion(found).startswith("Reading one batch it is 2.00 times as fast")
    assert conclusion(found).endswith("on disk it takes 0.27 times the bytes.")
