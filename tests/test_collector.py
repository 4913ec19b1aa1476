"""Garbage collection while commands import, and at the end of the process."""

import gc
import subprocess
import sys

import pytest

from upcycle.cli.group import collector_paused

WATCHED = """
import atexit, gc
full = []
gc.callbacks.append(lambda phase, about: full.append(phase) if about["generation"] == 2 else None)
# Registered first, so called last: no full collection until then, and little left for one after.
atexit.register(lambda: print(len(full), gc.get_freeze_count() > 10**5, len(gc.get_objects())))
from upcycle.cli.main import main
main(["verify", "{missing}", "."])
"""


def test_the_collector_runs_again_after_an_error() -> None:
    def failing() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        failing()
    assert gc.isenabled()


def test_what_is_imported_is_frozen_once() -> None:
    with collector_paused():
        pass
    frozen = gc.get_freeze_count()
    made = [[i] for i in range(1000)]
    with collector_paused():
        pass
    assert frozen > 0
    assert gc.get_freeze_count() <= frozen
    assert any(held is made for held in gc.get_objects())


def test_a_command_ends_without_walking_what_it_imported() -> None:
    """A full collection during imports, or objects left for the one at the end, are seconds."""
    code = WATCHED.format(missing="/nowhere/model")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    full, frozen, left = done.stdout.split()
    assert (full, frozen) == ("0", "True"), done.stdout
    assert int(left) < 1000
