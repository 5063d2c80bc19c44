"""The pipe between `eagleray serve` and its worker process: news one way, the order to stop the other."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec

END = b"end\n"


class Watched(msgspec.Struct, frozen=True):
    """A process of this machine without which the server cannot go on."""

    name: str
    pid: int
    health: str | None = None  # HOST:PORT at which it answers gRPC's health checks


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """Empty fields say nothing."""

    watched: tuple[Watched, ...] = ()
    serving: bool = False


class ServerEnd:
    """The end of the process that works. It hears the order to end, and notices if the command is gone."""

    def __init__(self, news: int, orders: int, on_orphaned: Callable[[], None]) -> None:
        """Descriptors of pipes. `on_orphaned` is called in a thread once nobody holds the other end."""
        self._news = news
        self._orders = orders
        self._on_orphaned = on_orphaned
        self.told_to_end = threading.Event()
        self.orphaned = False  # once nobody else ends what is below
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def tell(self, news: News) -> None:
        os.write(self._news, msgspec.json.encode(news) + b"\n")

    def _listen(self) -> None:
        while os.read(self._orders, 64):
            self.told_to_end.set()
        self.orphaned = True
        self.told_to_end.set()
        self._on_orphaned()


class CommandEnd:
    """The command's end."""

    def __init__(self, news: int, orders: int) -> None:
        self.news = news
        self._orders = orders
        self._rest = b""
        os.set_blocking(news, False)

    def end(self) -> None:
        """Tell the server to end; one that has ended hears nothing."""
        with suppress(BrokenPipeError):
            os.write(self._orders, END)

    def hear(self) -> Iterator[News]:
        """What has come since; having none is not a reason to wait. Raises `EOFError` once the other end is closed."""
        try:
            read = os.read(self.news, 65536)
        except BlockingIOError:
            return
        if not read:
            raise EOFError
        *lines, self._rest = (self._rest + read).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=News)


def linked() -> tuple[tuple[int, int], tuple[int, int]]:
    """Descriptors for the command's end and for the server's, of processes that are to fork."""
    news_out, news_in = os.pipe()
    orders_out, orders_in = os.pipe()
    return (news_out, orders_in), (news_in, orders_out)
