"""The parts of the benchmark on synthetic signals: meters, metrics, rounds."""

import time

import pytest

from upcycle.bench.machine import Machine
from upcycle.bench.meters import Readings, mean_over_time, readings, six_metrics
from upcycle.bench.timing import compared, interleaved, spread

UNEVEN = [0.0, 0.1, 0.3, 0.35, 1.0]
# A few float64 additions and one division of values about one.
EXACT = pytest.approx


def six(found: Readings | None, latency: float = 1.0, **changes: object) -> dict[str, float | None]:
    given: dict[str, object] = {"sizes": (8, 8), "quality": (1.0, 1.0)}
    return six_metrics(found, latency, 10, **(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.25, 40.0])
def test_a_constant_signal_is_its_own_mean(value: float) -> None:
    found = Readings(UNEVEN, [value] * 5, busy=value * 1.0, energy=value * 1.0)
    made = six(found)
    assert made["AMU"] == EXACT(value, rel=1e-14)
    assert made["PCU"] == value
    assert made["AEC"] == value
    assert made["energy"] == value


def test_trapezoids_are_the_mean_of_a_straight_line() -> None:
    seconds = [0.1 * i for i in range(11)]
    values: list[float | None] = [3.0 * t for t in seconds]
    assert mean_over_time(seconds, values) == EXACT(1.5, rel=1e-14)
    assert mean_over_time(UNEVEN, list(UNEVEN)) == EXACT(0.5, rel=1e-14)


def test_uniform_samples_of_a_periodic_signal_have_their_plain_mean() -> None:
    values: list[float | None] = [0.0, 1.0, 0.5, 0.25, 0.0]
    assert mean_over_time([0.0, 1.0, 2.0, 3.0, 4.0], values) == 1.75 / 4


def test_power_is_energy_over_time() -> None:
    found = Readings([0.0, 2.0], [0.5, 0.5], busy=1.0, energy=30.0)
    assert six(found)["AEC"] == 15.0
    assert six(found)["PCU"] == 0.5
    assert six(found)["energy"] == 30.0


def test_compression_of_the_identity_is_one() -> None:
    found = Readings([0.0, 1.0], [0.5, 0.5])
    assert six(found)["MCR"] == 1
    assert six(found, sizes=(8, 2), quality=(0.5, 0.25))["MCR"] == 2


def test_throughput_is_the_tokens_of_a_request_over_its_time() -> None:
    """Also where the model could not be measured by itself."""
    for found in (Readings([0.0, 1.0], [0.5, 0.5]), None):
        assert six(found, 0.25)["TT"] == 40
        assert six(found, 0.25)["AL"] == 0.25
    assert six(None)["AMU"] is six(None)["PCU"] is None


def test_what_has_no_meter_is_none_and_not_zero() -> None:
    found = Readings([0.0, 1.0], [None, None])
    made = six(found, quality=None)
    assert [name for name, value in made.items() if value is None] == [
        *("AMU", "PCU", "AEC", "MCR", "energy")
    ]
    assert mean_over_time([0.0, 1.0, 2.0], [0.5, None, 0.5]) is None


def test_meters_run_beside_the_work() -> None:
    joules = iter([5.0, 11.0])
    with readings(memory=lambda: 0.5, energy=lambda: next(joules)) as found:
        time.sleep(0.25)
    assert len(found.seconds) == len(found.memory) >= 3
    assert found.energy == 6.0
    assert found.busy is not None
    assert found.busy >= 0


def test_a_counter_that_starts_again_says_nothing() -> None:
    joules = iter([5.0, 1.0])
    with readings(energy=lambda: next(joules)) as found:
        pass
    assert found.energy is None


def test_rounds_begin_with_another_one_each() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    found = interleaved(calls, seconds=0, least=3)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert len(interleaved(calls, seconds=60, most=4)["a"]) == 4


def test_a_ratio_is_that_of_one_round() -> None:
    row = compared(
        {"dense": [1.0, 10.0, 4.0], "converted": [2.0, 20.0, 8.0]},
        {"dense": None, "converted": 1.0},
    )
    assert row["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert row["dense"] == {"median": 4.0, "low": 2.5, "high": 7.0, "rounds": 3, "floor": None}
    assert spread([3.0])["high"] == 3.0


def test_the_floor_is_whichever_takes_longer() -> None:
    machine = Machine(flops=100.0, bandwidth=10.0, dtype="float32", threads=1)
    assert machine.floor(200, 10) == 2
    assert machine.floor(200, 50) == 5
