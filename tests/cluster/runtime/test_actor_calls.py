"""The descriptor of calls on actors: who polls it neither misses an end nor turns idly."""

from concurrent.futures import Future
from select import select
from typing import Any

from eagleray.cluster.runtime.actor_calls import ActorCalls


class Ref:
    """As Ray's reference to the result of a call."""

    def __init__(self) -> None:
        self.result: Future[None] = Future()

    def future(self) -> "Future[None]":
        return self.result


def test_it_is_readable_for_as_long_as_an_end_is_untold() -> None:
    refs: list[Any] = [Ref() for _ in range(3)]
    calls = ActorCalls(refs)

    def readable() -> bool:
        return bool(select([calls.fd], [], [], 0)[0])

    assert (readable(), calls.next(0)) == (False, None)
    refs[1].result.set_result(None)
    assert (readable(), calls.next(0), readable()) == (True, (1, None), False)
    error = ValueError("it failed")
    refs[2].result.set_exception(error)
    refs[0].result.set_result(None)
    assert (readable(), calls.next(0), readable()) == (True, (2, error), True)
    assert (calls.next(0), readable(), calls.next(0)) == ((0, None), False, None)
    calls.close()
