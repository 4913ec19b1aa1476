"""A part of `benchmarks/fuzz.py` and `benchmarks/kill.py`, and that they see what is wrong."""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz
import kill


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    found = fuzz.fuzz(tmp_path, range(240), seed=7)
    assert [case for case in found if case.verdict not in fuzz.GOOD] == []
    counts = Counter(case.verdict for case in found)
    assert min(counts[verdict] for verdict in fuzz.GOOD) >= 20  # both are met
    assert {case.kind for case in found} == set(fuzz.KINDS)


def test_what_goes_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 1)

    def fail() -> int:
        raise KeyError("x")

    def sleep() -> int:
        time.sleep(9)
        return 0

    commands = [lambda: 0, lambda: 2, lambda: 1, fail, os.abort, sleep]
    seen = [fuzz.judged(*fuzz.in_a_process(command)) for command in commands]
    assert seen == ["ok", "refused", "called a bug", "traceback", "signal 6", "hangs"]


def test_killed_conversions_leave_the_old_or_the_new(tmp_path: Path) -> None:
    outcomes = kill.attack_all(tmp_path, every=11)
    assert {outcome.kind: outcome.wrong for outcome in outcomes} == {k: [] for k in kill.KINDS}
    assert all(outcome.kills >= 3 for outcome in outcomes)
