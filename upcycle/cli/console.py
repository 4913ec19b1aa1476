"""The terminal: results on stdout, the log and the progress on stderr.

The logger ``upcycle`` has level ERROR for ``--quiet`` and DEBUG for ``--verbose``. The library
itself only logs.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from upcycle.cli.flags import with_flags
from upcycle.util.json_text import json_text
from upcycle.util.progress import Progress
from upcycle.util.untrusted import printable

log = logging.getLogger("upcycle")


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


def print_result(*parts: RenderableType) -> None:
    """Print tables and lines on stdout; a pipe gets them unwrapped and without colour."""
    width = None if sys.stdout.isatty() else 1000
    console = _Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part)


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
    """Bars on a terminal; elsewhere a line for the start and the end of each stage."""
    if not log.isEnabledFor(logging.INFO):
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield show
    else:
        started: dict[str, float] = {}

        def line(stage: str, done: int, total: int) -> None:
            first = stage not in started
            seconds = time.perf_counter() - started.setdefault(stage, time.perf_counter())
            if first or done == total:
                after = "" if first else f", {seconds:.1f} s"
                print(f"{stage}: {done} of {total}{after}", file=sys.stderr, flush=True)

        yield line
