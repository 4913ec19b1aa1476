"""The frame of the command line: every failure becomes a sentence on stderr and an exit code.

0 ok    2 usage or recipe    3 verification failed    4 unsupported    5 disk or memory
130 interrupted    141 nobody reads the output    1 a bug in upcycle

``upcycle diff`` ends with 3, too, if the two models differ.
"""

import errno
import gc
import logging
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from upcycle.cli import console
from upcycle.errors import UpcycleError, VerificationError, is_out_of_memory

DIFFERENT = VerificationError.exit_code
UNREAD = 141  # as a shell has it for a program that SIGPIPE ended


class CommandGroup(click.Group):
    """The group of commands."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and leave the process; not in standalone mode: return or raise."""
        console.start_log(logging.INFO)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except SystemExit as left:  # click ends with 1 where nobody reads on, as in `... | head -1`
            cause = left.__context__
            unread = isinstance(cause, OSError) and cause.errno == errno.EPIPE
            code = UNREAD if unread else left.code
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except (Exception, KeyboardInterrupt) as error:
            sentence, code = failure(error)
            if console.log.isEnabledFor(logging.DEBUG):
                traceback.print_exception(error)
            for line in sentence.splitlines():
                click.echo(f"error: {console.shown(line)}", err=True)
        sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    """End as Ctrl-C ends a run: what it has begun is cleared away."""
    raise KeyboardInterrupt


def failure(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit code for whatever stopped the program."""
    if isinstance(error, UpcycleError):
        return str(error), error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, click.UsageError):
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        sentence = " ".join(error.format_message().split()).rstrip(".")
        return sentence + where, error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if is_out_of_memory(error):
        return "there is not enough memory for this; choose a smaller --dtype or model", 5
    if isinstance(error, OSError):
        place = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{place}: {error.strerror}; free some space or choose another --out", 5
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{place}: {error.strerror}; choose a place that you may read and write", 2
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST):
            return f"{place}: {error.strerror}; choose another path", 2
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.EIO, errno.ENODEV):
            return f"{place}: {error.strerror}; mend that and run again", 5
    about = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
    return f"this is a bug in upcycle ({about}); -v shows where it happened", 1


def size_in_bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Read ``5GB``, ``500 MB``, ``2GiB`` or plain digits; the callback of a click option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", value.strip().lower())
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size; write 5GB or 500MB", ctx, param)
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector for imports, and for commands that take seconds.

    Importing transformers makes a million objects that all stay, and walking them again and again
    took a quarter of the time. Afterwards the collector leaves out what there is by then.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # only once in a process: freezing keeps garbage, too
            gc.freeze()
        gc.enable()
