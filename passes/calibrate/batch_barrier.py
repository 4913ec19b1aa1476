"""A barrier for forwards: all batches reach a place of the model before any goes on.

Unlike with `threading.Barrier` one batch at a time computes, in turn, and a finished one is not
waited for. So what is held between two places is what a model holds itself, a residual stream for
each batch, and what happens at a place sees all batches together. Each batch has a thread, because
a forward in plain Python cannot be left and entered again in any other way.
"""

import threading
from collections.abc import Callable


class Stop(BaseException):
    """Leaves a forward whose rest is not needed; no model catches it by accident."""


class BatchBarrier:
    """Batches that take turns, in the order of their numbers; each waits at every place.

    Attributes:
        current: the number of the batch that runs.
    """

    def __init__(self, count: int) -> None:
        self.current = 0
        self._error: BaseException | None = None
        self._turn = threading.Condition()
        self._runs = [True] * count  # neither waiting nor finished
        self._waits = [False] * count
        self._action: Callable[[], None] = lambda: None

    def wait(self, action: Callable[[], None]) -> None:
        """Wait until every batch waits or is finished; the last one to come runs `action`, once.

        Raises:
            Stop: another batch, or `action`, has failed.
        """
        with self._turn:
            me, self._action = self.current, action
            self._runs[me], self._waits[me] = False, True
            self._pass_on()
            self._turn.wait_for(lambda: self._runs[me] and self.current == me)
            if self._error is not None:
                raise Stop

    def run(self, forward: Callable[[int], object]) -> None:
        """Call ``forward(i)`` for every batch i; when it returns or raises, no thread is left.

        Raises:
            BaseException: the first that a forward, or what was run at a place, has raised.
        """
        threads = [
            threading.Thread(target=self._one, args=(i, forward), name=f"batch {i}", daemon=True)
            for i in range(len(self._runs))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: they end at the next place
            self._fail(error)
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _one(self, i: int, forward: Callable[[int], object]) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self.current == i)
        try:
            if self._error is None:
                forward(i)
        except Stop:
            pass
        except BaseException as error:
            self._fail(error)
        with self._turn:
            self._runs[i] = False
            self._pass_on()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def _pass_on(self) -> None:
        """Give the turn to the next batch that can run; the one that has it calls this."""
        if not any(self._runs) and any(self._waits):
            try:
                if self._error is None:
                    self._action()
            except BaseException as error:
                self._fail(error)
            self._runs, self._waits = self._waits, [False] * len(self._runs)
            self.current = -1
        count = len(self._runs)
        order = (self.current + 1 + i for i in range(count))
        self.current = next((i % count for i in order if self._runs[i % count]), -1)
        self._turn.notify_all()
