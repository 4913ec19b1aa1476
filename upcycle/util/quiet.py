"""Keep what other libraries tell their own developers off our output."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from tqdm import tqdm


@contextmanager
def quiet_logs(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Within it the loggers of these names say nothing below `level`."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.setLevel(was)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows errors alone, and no progress bar."""
    log: Any = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    made = tqdm.__init__  # compressed-tensors has bars of its own, and no switch for them

    def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
        made(bar, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = made
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
