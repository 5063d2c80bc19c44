"""Messages between processes over ZeroMQ: one hub, many peers, each known to the hub by its name.

Bytes go in and come out whole and in order. On one node they go through a socket file that only its user can open;
between nodes over tcp with CURVE encryption, whose server key is known only to those to whom Ray handed the endpoint.
"""

import shutil
from math import ceil
from pathlib import Path

import msgspec
import zmq

from eagleray.workers.socket_directory import NAME, make_socket_directory

HEARTBEAT_MS = 5000  # a node that vanishes without a word is noticed after this


class Endpoint(msgspec.Struct, frozen=True):
    """Where a hub listens."""

    address: str
    server_key: bytes | None = None  # CURVE public key, on tcp


class PeerGoneError(RuntimeError):
    """The hub has no connection to the named peer."""


class Hub:
    """The listening side. `ip` is the address that other nodes reach this one by; None serves this node alone."""

    def __init__(self, ip: str | None = None) -> None:
        self._directory: Path | None = None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        _never_drop(self.socket)
        self.endpoint = self._listen_here() if ip is None else self._listen_everywhere(ip)

    def _listen_here(self) -> Endpoint:
        self._directory = make_socket_directory()
        address = f"ipc://{self._directory / NAME}"
        self.socket.bind(address)
        return Endpoint(address)

    def _listen_everywhere(self, ip: str) -> Endpoint:
        public, secret = zmq.curve_keypair()
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        _set_keys(self.socket, public, secret)
        port = self.socket.bind_to_random_port("tcp://*")
        return Endpoint(f"tcp://{ip}:{port}", public)

    def send(self, peer: bytes, payload: bytes) -> None:
        """Queue bytes for a peer, without waiting. Raises `PeerGoneError` if it is not connected."""
        try:
            self.socket.send_multipart((peer, payload), flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerGoneError(f"{peer.decode(errors='replace')} is not connected") from error

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, bytes), or None if there is none now."""
        try:
            peer, payload = self.socket.recv_multipart(flags=zmq.NOBLOCK)
        except zmq.Again:
            return None
        return peer, payload

    def close(self) -> None:
        """Send what is queued, for a second at most, and stop listening."""
        self.socket.close(linger=1000)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class Peer:
    """The connecting side; `name` is unique at its hub."""

    def __init__(self, endpoint: Endpoint, name: bytes) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, name)
        _never_drop(self.socket)
        if endpoint.server_key is not None:
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
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
