"""The progress of a long run: a function of stage, items done and items in all."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called as a stage begins, with 0 done, and after each item.
Progress = Callable[[str, int, int], None]
log = logging.getLogger(__name__)


def silent(stage: str, done: int, total: int) -> None:
    """Progress that goes to the debug log alone."""
    log.debug("%s %d/%d", stage, done, total)


@contextmanager
def step(progress: Progress, stage: str) -> Iterator[None]:
    """A stage of one item: it begins with the block and is done when the block ends well."""
    progress(stage, 0, 1)
    yield
    progress(stage, 1, 1)
