"""Run a model on several batches at once, so that all of them reach one place before any goes on.

One batch at a time computes. So what is held between two places is what the model holds itself: a
residual stream for each batch; and what happens at a place sees all batches together.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from upcycle.capture import ExampleInputs


class Stop(Exception):  # noqa: N818 - not an error: the last place has been passed
    """Raised inside a forward whose rest is not needed."""


class Lockstep:
    """Threads of which one runs at a time, in turn; each waits at every place for the others.

    Attributes:
        current: the number of the batch that runs.
    """

    def __init__(self, count: int) -> None:
        self.current = 0
        self.error: BaseException | None = None
        self._count = count
        self._waiting = [False] * count
        self._finished = [False] * count
        self._turn = threading.Condition()
        self._everyone: Callable[[], None] | None = None

    def meet(self, everyone: Callable[[], None]) -> None:
        """Wait until all batches are here; the last one to come runs `everyone`, once."""
        with self._turn:
            me = self.current
            self._everyone = everyone
            self._waiting[me] = True
            self._pass_on()
            self._turn.wait_for(lambda: self.current == me and not self._waiting[me])
            if self.error is not None:
                raise Stop

    def run(self, forward: Callable[[int], Any]) -> None:
        """Call ``forward(i)`` for every batch i, in lockstep.

        Raises:
            BaseException: what a forward raised, or what was run at a place.
        """
        threads = [
            threading.Thread(target=self._one, args=(i, forward), daemon=True)
            for i in range(self._count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _one(self, i: int, forward: Callable[[int], Any]) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self.current == i)
        try:
            if self.error is None:
                forward(i)
        except Stop:
            pass
        except BaseException as error:
            self.error = self.error or error
        with self._turn:
            self._finished[i] = True
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the next batch that can run; called by the one that has it."""
        later = [(self.current + 1 + i) % self._count for i in range(self._count)]
        for i in later:
            if not self._finished[i] and not self._waiting[i]:
                self.current = i
                self._turn.notify_all()
                return
        if any(self._waiting):
            self._everyone_is_here()
            self.current = next(i for i in range(self._count) if not self._finished[i])
        self._turn.notify_all()

    def _everyone_is_here(self) -> None:
        everyone = self._everyone
        if self.error is None and everyone is not None:
            try:
                everyone()
            except BaseException as error:
                self.error = error
        self._waiting = [False] * self._count


def in_lockstep(model: nn.Module, batches: Sequence[ExampleInputs], lockstep: Lockstep) -> None:
    """Run `model` on every batch; its own code calls `Lockstep.meet` at the places."""

    def forward(i: int) -> None:
        batch = batches[i]
        if isinstance(batch, tuple):
            model(*batch)
        else:
            model(**batch)

    lockstep.run(forward)
