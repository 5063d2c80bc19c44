"""A front end's socket to the engine core: notices lost messages, and tells silence from having no news.

News are numbered. Once a second, whoever waits asks the core for a sign of life and tells it how many messages it has
been sent. So a connection that broke, a core that is stopped, and a stop of this process itself are all seen for what
they are: after the last one, everything goes on.
"""

import logging
import time

import msgspec
import zmq

from eagleray.cluster.core.messages import EngineOutputs, EngineRequest, FrontEndMessage, Ping, Submit
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.runtime.process_state import DEAD, STOPPED, in_words, state_of
from eagleray.workers.protocol.channel import Endpoint, Peer

logger = logging.getLogger(__name__)

PING_S = 1.0
WARN_S = 4.0  # silence that is told
STOPPED_S = 30.0  # silence that ends the wait for a core that is stopped, which may be for a moment only
MAX_SUBMIT_BYTES = 2**23  # of prompts in one message
LISTED_BYTES = 16  # of an id with its bias, or of a seed, at most


class CoreLink:
    """Raises `EngineDeadError` once news were lost or the core is silent for too long, and for ever after."""

    def __init__(self, endpoint: Endpoint, name: bytes, core_pid: int | None, silence_limit_s: float) -> None:
        """`core_pid` is the core's process if it runs on this node; `silence_limit_s` bounds a core that is busy."""
        self._peer = Peer(endpoint, name)
        self._core_pid = core_pid
        self._silence_limit_s = silence_limit_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineOutputs).decode
        self._num_sent = 0
        self._num_news = 0
        now = time.monotonic()
        self._heard = now  # when the core last said something, or somebody began to wait for that
        self._asked = now  # when this was last asked for
        self._awaits = False  # an answer
        self._warned = False
        self._broken: str | None = None  # why nothing that still comes is to be trusted

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        return self._peer.socket

    @property
    def fd(self) -> int:
        """As `Peer.fd`."""
        return self._peer.fd

    def send(self, message: FrontEndMessage) -> None:
        """Hand a message to the core without waiting; one of many requests goes in several parts."""
        for part in _parts(message) if isinstance(message, Submit) else (message,):
            payload = self._encode(part)
            self._num_sent += 1  # what cannot be encoded is not missed
            self._peer.send(payload)

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        """The next news, or None once the time is over."""
        if self._broken is not None:
            raise EngineDeadError(self._broken)
        payload = self._peer.receive(timeout_s)
        if payload is None:
            return None
        self._heard = time.monotonic()
        self._awaits = False
        if self._warned:
            self._warned = False
            logger.warning("the engine core is responding again")
        news = self._decode(payload)
        self._num_news += 1
        is_next = news.number == self._num_news
        if not is_next or news.lost:
            lost = f"{news.lost} were lost on their way" if is_next else "news were lost"
            self._broken = f"the connection to the engine core broke and {lost}"
            raise EngineDeadError(self._broken)
        return news

    def look(self) -> None:
        """Whoever waits for news calls this every second or so, and may call it at any time."""
        now = time.monotonic()
        away_s = now - self._asked
        if away_s < PING_S:
            return
        self._asked = now
        if away_s > 2.5 * PING_S:  # nobody waited meanwhile, or this process was stopped
            self._heard = now
        if not self._awaits:
            self._awaits = True
            self.send(Ping(self._num_sent + 1))
        self._judge(now - self._heard)

    def _judge(self, silence_s: float) -> None:
        if silence_s < WARN_S:
            return
        stopped = self._core_pid is not None and state_of(self._core_pid) in STOPPED + DEAD
        told = f"the engine core has given no sign of life for {silence_s:.0f} s{self._why()}"
        if silence_s >= (min(STOPPED_S, self._silence_limit_s) if stopped else self._silence_limit_s):
            raise EngineDeadError(told)
        if not self._warned:
            self._warned = True
            logger.warning("%s; waiting for it", told)

    def _why(self) -> str:
        return " (it is on another node)" if self._core_pid is None else f" ({in_words(self._core_pid)})"

    def close(self) -> None:
        self._peer.close()


def _parts(message: Submit) -> list[Submit]:
    """The same requests in messages that the core's socket takes."""
    parts: list[list[EngineRequest]] = [[]]
    size = 0
    for request in message.requests:
        more = len(request.prompt_token_ids) + LISTED_BYTES * (request.sampling.num_listed + len(request.seeds))
        if parts[-1] and size + more > MAX_SUBMIT_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(request)
        size += more
    return [Submit(requests) for requests in parts]
