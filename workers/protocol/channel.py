"""Messages between processes over ZeroMQ: one hub, many peers, each known to the hub by its name.

Bytes go in and come out whole and in order. On one node they go through a socket file that only its user can open;
between nodes over tcp with CURVE encryption, whose server key is known only to those to whom Ray handed the endpoint.
The endpoint's token is part of every peer's identity, so nobody without it is heard, or takes a peer's place.

On one node a peer may be stopped for as long as one likes and goes on where it was: the kernel says when it is gone.
Between nodes one that is silent for `SILENT_MS` counts as gone.
"""

import errno
import logging
import secrets
import shutil
from math import ceil
from pathlib import Path

import msgspec
import zmq

from eagleray.workers.protocol.socket_directory import NAME, make_socket_directory

logger = logging.getLogger(__name__)

HEARTBEAT_MS = 5000  # between nodes
SILENT_MS = 30_000  # a node that vanishes without a word is noticed after this
MAX_BYTES = 2**28  # of a message to a hub; a peer that sends a longer one is disconnected
MAX_DROPPED_AT_ONCE = 100  # so that a flood of nonsense leaves its receiver time for other things
_TOKEN_BYTES = 32


class Endpoint(msgspec.Struct, frozen=True):
    """Where a hub listens."""

    address: str
    server_key: bytes | None = None  # CURVE public key, on tcp
    token: bytes = b""  # known to those who are to connect


class PeerGoneError(RuntimeError):
    """The hub has no connection to the named peer."""


class Hub:
    """The listening side. `ip` is the address that other nodes reach this one by; None serves this node alone."""

    def __init__(self, ip: str | None = None) -> None:
        self.num_dropped = 0  # messages from strangers, or in a form that no peer sends
        self._directory: Path | None = None
        self._token = secrets.token_hex(_TOKEN_BYTES // 2).encode()  # an identity must not begin with a zero
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        _never_drop(self.socket)
        self.endpoint = self._listen_here() if ip is None else self._listen_on(ip)

    def _listen_here(self) -> Endpoint:
        self._directory = make_socket_directory()
        address = f"ipc://{self._directory / NAME}"
        self.socket.bind(address)
        return Endpoint(address, token=self._token)

    def _listen_on(self, ip: str) -> Endpoint:
        public, secret = zmq.curve_keypair()
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        _set_keys(self.socket, public, secret)
        _notice_silence(self.socket)
        try:
            port = self.socket.bind_to_random_port(f"tcp://{ip}")
        except zmq.ZMQError as error:  # an address that is translated on its way here
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise
            port = self.socket.bind_to_random_port("tcp://*")
        return Endpoint(f"tcp://{ip}:{port}", public, self._token)

    def send(self, peer: bytes, payload: bytes) -> None:
        """Queue bytes for a peer, without waiting. Raises `PeerGoneError` if it is not connected."""
        try:
            self.socket.send_multipart((self._token + peer, payload), flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerGoneError(f"{peer.decode(errors='replace')} is not connected") from error

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, bytes), or None if there is none now. Messages that none of our peers would send are dropped
        and counted.
        """
        for _ in range(MAX_DROPPED_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) == 2 and frames[0].startswith(self._token):
                return frames[0][_TOKEN_BYTES:], frames[1]
            self._drop(len(frames))
        return None

    def _drop(self, num_frames: int) -> None:
        self.num_dropped += 1
        if self.num_dropped == 1:
            logger.warning(
                "a message of %d frames at %s is not one of ours; it and further ones are dropped",
                num_frames,
                self.endpoint.address,
            )

    def close(self) -> None:
        """Send what is queued, for a second at most, and stop listening."""
        self.socket.close(linger=1000)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class Peer:
    """The connecting side; `name` is unique at its hub."""

    def __init__(self, endpoint: Endpoint, name: bytes) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, endpoint.token + name)
        _never_drop(self.socket)
        if endpoint.server_key is not None:
            _notice_silence(self.socket)
            _set_keys(self.socket, *zmq.curve_keypair())
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, endpoint.server_key)
        self.socket.connect(endpoint.address)

    def send(self, payload: bytes) -> None:
        self.socket.send(payload)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next message, or None once `timeout_s` is over; without one, waits."""
        return self.socket.recv() if self.socket.poll(milliseconds(timeout_s)) else None

    @property
    def fd(self) -> int:
        """A descriptor that becomes readable when there may be a message, and says so once."""
        return int(self.socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self.socket.close(linger=0)


def milliseconds(timeout_s: float | None) -> int | None:
    """ZeroMQ's unit, rounded up so that a short wait is not a busy one."""
    return None if timeout_s is None else max(0, ceil(timeout_s * 1000))


def _set_keys(socket: "zmq.Socket[bytes]", public: bytes, secret: bytes) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _never_drop(socket: "zmq.Socket[bytes]") -> None:
    """Queues without limit: the engine bounds what is in flight itself, and a dropped message would be a lost token."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)


def _notice_silence(socket: "zmq.Socket[bytes]") -> None:
    """ZeroMQ's own heartbeats. Not for ipc: there they would only drop a peer that is stopped for a while."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
