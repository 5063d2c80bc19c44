"""Runs a function in a thread that nobody need wait for, not even the end of the process."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_background(run: Callable[[], T], name: str) -> "Future[T]":
    """What `run` returns or raises, once it does."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            result = run()
        except BaseException as error:  # it belongs to whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=work, name=name, daemon=True).start()
    return future
