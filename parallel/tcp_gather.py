"""All-gather of small messages between ranks on CPU, over a TCP connection between every two of them.

gloo hands each message to threads of its own. Where ranks fill every core those threads wait for one, and a message of
2 KB takes hundreds of microseconds instead of twenty; a forward pass sends two of them per layer.
"""

import hmac
import secrets
import socket
import struct
from typing import Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from eagleray.parallel.network import own_address

MAX_BYTES = 128 * 1024  # fits in a connection's buffers, so that every rank may send before it receives
_BUFFER_BYTES = 256 * 1024
_SECRET_BYTES = 16
_RANK = struct.Struct("<i")


class TcpGather:
    """Connections to every other rank. All ranks gather in the same order, as with any collective."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout_s: float) -> None:
        self._rank = rank
        self._peers = peers
        self._timeout_s = timeout_s
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        for connection in peers.values():
            connection.settimeout(None)  # the kernel keeps time: a timeout here would cost a system call per message
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def join(cls, rank: int, size: int, store: Store, timeout_s: float) -> Self:
        """Meet the other ranks through `store`. Only those who know the secret in the store are let in."""
        if rank == 0:
            store.set("mesh/secret", secrets.token_hex(_SECRET_BYTES))
        address = own_address(store)
        with socket.socket(address[0], socket.SOCK_STREAM) as listener:
            _widen(listener)
            listener.settimeout(timeout_s)
            listener.bind((address[1], 0))
            listener.listen(size)
            store.set(f"mesh/{rank}", f"{address[1]} {listener.getsockname()[1]}")
            secret = bytes.fromhex(store.get("mesh/secret").decode())
            peers = {peer: _connect(rank, peer, address[0], store, secret, timeout_s) for peer in range(rank)}
            while len(peers) < size - 1:
                connection, _ = listener.accept()
                connection.settimeout(timeout_s)
                greeting = _read_greeting(connection)
                if hmac.compare_digest(greeting[:_SECRET_BYTES], secret):
                    peers[_RANK.unpack(greeting[_SECRET_BYTES:])[0]] = connection
                else:
                    connection.close()
        return cls(rank, peers, timeout_s)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` of at most `MAX_BYTES`: `[size, *x.shape]`. Raises `RuntimeError` when a rank is gone."""
        gathered = x.new_empty(len(self._peers) + 1, *x.shape)
        gathered[self._rank] = x
        memory, length = gathered.view(-1).view(torch.uint8).numpy().data, x.nbytes
        own = memory[self._rank * length : (self._rank + 1) * length]
        for peer, connection in self._peers.items():
            try:
                connection.sendall(own)
            except OSError as error:
                raise RuntimeError(f"rank {peer} is gone: {error}") from error
        for peer, connection in self._peers.items():
            self._receive(peer, connection, memory[peer * length : (peer + 1) * length])
        return gathered

    def _receive(self, peer: int, connection: socket.socket, row: memoryview) -> None:
        while row:
            try:
                received = connection.recv_into(row, len(row), socket.MSG_WAITALL)
            except BlockingIOError as error:
                raise RuntimeError(f"rank {peer} has sent nothing for {self._timeout_s:g} s") from error
            except OSError as error:
                raise RuntimeError(f"rank {peer} is gone: {error}") from error
            if not received:
                raise RuntimeError(f"rank {peer} is gone: it closed its connection")
            row = row[received:]

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()


def _connect(
    rank: int, peer: int, family: socket.AddressFamily, store: Store, secret: bytes, timeout_s: float
) -> socket.socket:
    host, port = store.get(f"mesh/{peer}").decode().split()
    connection = socket.socket(family, socket.SOCK_STREAM)
    _widen(connection)
    connection.settimeout(timeout_s)
    connection.connect((host, int(port)))
    connection.sendall(secret + _RANK.pack(rank))
    return connection


def _read_greeting(connection: socket.socket) -> bytes:
    size, greeting = _SECRET_BYTES + _RANK.size, b""
    while len(greeting) < size and (more := connection.recv(size - len(greeting))):
        greeting += more
    return greeting


def _widen(connection: socket.socket) -> None:
    """Buffers that hold a whole message. Set before connecting, since TCP agrees on its window then."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
