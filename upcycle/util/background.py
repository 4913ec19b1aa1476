"""Work that is done beside other work, and does not keep a program from ending."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def started(function: Callable[[], T]) -> Callable[..., T]:
    """Call `function` in a thread; the result waits for it, and raises what it raised.

    The result takes the seconds to wait, after which it raises TimeoutError.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result
