"""Fixtures for all tests."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models: starting a second thread takes longer than their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def log_restored() -> Iterator[None]:
    """A command that a test runs in this process sends the log to stderr: for that test alone."""
    log = logging.getLogger("upcycle")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level
