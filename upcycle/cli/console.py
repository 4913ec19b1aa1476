"""The terminal: results on stdout, the log and the progress on stderr.

The logger ``upcycle`` has level ERROR for ``--quiet`` and DEBUG for ``--verbose``. The library
itself only logs.
"""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from upcycle.cli.flags import with_flags
from upcycle.util.json_text import json_text
from upcycle.util.progress import Progress
from upcycle.util.untrusted import printable

log = logging.getLogger("upcycle")
ALIVE = 10.0  # seconds after which a stage says that it is still running


def shown(text: str) -> str:
    """`text` for a terminal: with the flags of the command line, and without control characters."""
    return printable(with_flags(text))


class _Stderr(logging.Handler):
    """Writes to the current ``sys.stderr``, which rich and the tests replace for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record)), file=sys.stderr)


class _Console(Console):
    """Shows the cells of tables as `shown`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def start_log(level: int) -> None:
    """Send the log of upcycle to stderr, from `level` up."""
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())
    log.setLevel(level)
    # torch says it of a registration of its own, wherever a program is read or run.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec", FutureWarning)


def is_verbose() -> bool:
    """Whether more is to be said than what matters to everyone."""
    return log.isEnabledFor(logging.DEBUG)


def print_result(*parts: RenderableType) -> None:
    """Print tables and lines on stdout, unless only errors are wanted.

    A pipe gets them unwrapped and without colour.
    """
    if log.level >= logging.ERROR:
        return
    width = None if sys.stdout.isatty() else 1000
    console = _Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    for part in parts:
        if isinstance(part, Table):
            _keep_names(part, console.width)
        console.print(part)


def _keep_names(table: Table, width: int) -> None:
    """The first column, which names things, is not broken unless it takes more than half a line."""
    first = table.columns[0]
    first.no_wrap = max(map(cell_len, map(str, first.cells)), default=0) <= width // 2


def print_json(data: Any) -> None:
    """Print `data` on stdout, for programs."""
    click.echo(json_text(data), nl=False)


def show(as_json: bool, data: Any, report: Callable[[], Iterable[RenderableType]]) -> None:
    """Print `data` for programs, or the tables of `report` for people."""
    if as_json:
        print_json(data)
    else:
        print_result(*report())


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere lines, also while a stage takes long."""
    if not log.isEnabledFor(logging.INFO):
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        with Bars(*columns, *times, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=None)
                known = total if done or total > 1 else None  # one item: the bar just moves
                bars.update(tasks[stage], completed=done, total=known)

            yield show
    else:
        lines = _Lines()
        stop = threading.Event()
        thread = threading.Thread(target=lines.go_on, args=(stop,), daemon=True)
        thread.start()
        try:
            yield lines.show
        finally:
            stop.set()
            thread.join()


class _Lines:
    """A line for the start and the end of each stage, and every `ALIVE` seconds between them."""

    def __init__(self) -> None:
        self._running: dict[str, _Stage] = {}
        self._lock = threading.Lock()

    def show(self, stage: str, done: int, total: int) -> None:
        """As `Progress`."""
        now = time.perf_counter()
        with self._lock:
            first = stage not in self._running
            begun = now if first else self._running[stage].begun
            self._running[stage] = _Stage(begun, done, total)
            if first or done == total:
                after = "" if first else f", {now - begun:.1f} s"
                _say(f"{stage}: {done} of {total}{after}")

    def go_on(self, stop: threading.Event) -> None:
        """Say what is still running, until `stop`."""
        while not stop.wait(ALIVE):
            now = time.perf_counter()
            with self._lock:
                for name, stage in self._running.items():
                    if stage.done < stage.total and now - stage.begun >= ALIVE:
                        _say(f"{name}: {stage.text(now)}")


@dataclass(frozen=True)
class _Stage:
    begun: float
    done: int
    total: int

    def text(self, now: float) -> str:
        """How far it is, and an estimate of the rest once an item is done."""
        seconds = now - self.begun
        left = seconds / self.done * (self.total - self.done) if self.done else None
        about = "" if left is None else f", about {left:.0f} s left"
        return f"{self.done} of {self.total}, running for {seconds:.0f} s{about}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
