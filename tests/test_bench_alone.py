"""Each model of a benchmark is measured in a process of its own."""

import logging
import os
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from bench_case import broken, note

from upcycle.bench.alone import Job, measured_alone
from upcycle.bench.meters import mean_over_time

MEGABYTES = 300


def test_the_memory_is_that_of_the_model(tmp_path: Path) -> None:
    held = torch.ones(2 * MEGABYTES << 18)  # of the process that asks: it is not counted
    used, said = [], []
    for size in (1, MEGABYTES << 18):
        made = partial(torch.ones, size)
        found = measured_alone(Job(made, note, tmp_path / "said", seconds=0.3, most=1000))
        assert found is not None
        memory = mean_over_time(found.seconds, found.memory)
        assert memory is not None
        used.append(memory * psutil.virtual_memory().total / 2**20)
        said.append((tmp_path / "said").read_text().split())
    assert MEGABYTES * 0.9 < used[1] - used[0] < MEGABYTES * 1.2
    assert len({os.getpid(), *(int(pid) for pid, _, _ in said)}) == 3
    assert {tuple(rest) for _, *rest in said} == {(str(torch.get_num_threads()), "False")}
    assert held.sum() > 0


def test_what_cannot_be_measured_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert measured_alone(Job(partial(torch.ones, 1), broken, None, 0.1, 1)) is None
    assert "was not measured: ValueError: nothing to run" in caplog.text
