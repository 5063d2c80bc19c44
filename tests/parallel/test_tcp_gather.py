"""Connections between ranks, here between threads: what happens when one is slow, gone, or not one of ours."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from eagleray.parallel.tcp_gather import MAX_BYTES, TcpGather


@contextmanager
def meshes(
    size: int, timeout_s: float = 20.0, before: Callable[[HashStore], None] = lambda store: None
) -> Iterator[list[TcpGather]]:
    """Join all ranks; rank 0 first, and the others after `before`."""
    store = HashStore()
    with ThreadPoolExecutor(size) as threads:
        joining = [threads.submit(TcpGather.join, 0, size, store, timeout_s)]
        before(store)
        joining += [threads.submit(TcpGather.join, rank, size, store, timeout_s) for rank in range(1, size)]
        joined = [future.result() for future in joining]
        try:
            yield joined
        finally:
            for mesh in joined:
                mesh.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_every_rank_gathers_every_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [torch.full(shape, rank + 1).to(dtype) for rank in range(3)]
    with meshes(3) as ranks, ThreadPoolExecutor(3) as threads:
        for gathered in threads.map(lambda mesh, x: mesh.gather(x), ranks, inputs):
            assert torch.equal(gathered, torch.stack(inputs))


def test_every_rank_may_send_the_largest_message_before_any_receives() -> None:
    x = torch.arange(MAX_BYTES // 4, dtype=torch.int32)
    with meshes(3) as ranks, ThreadPoolExecutor(3) as threads:
        for gathered in threads.map(lambda mesh: [mesh.gather(x) for _ in range(20)][-1], ranks):
            assert torch.equal(gathered, torch.stack([x] * 3))


def test_a_rank_that_is_gone_is_an_error_at_once() -> None:
    with meshes(2) as ranks:
        ranks[1].close()
        with pytest.raises(RuntimeError, match="rank 1 is gone"):
            ranks[0].gather(torch.ones(2))


def test_a_rank_that_is_silent_is_an_error_in_time() -> None:
    with meshes(2, timeout_s=0.2) as ranks, pytest.raises(RuntimeError, match=r"rank 1 has sent nothing for 0\.2 s"):
        ranks[0].gather(torch.ones(2))


def test_a_stranger_is_not_let_in() -> None:
    def knock(store: HashStore) -> None:
        host, port = store.get("mesh/0").decode().split()
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"x" * 20)

    with meshes(2, before=knock) as ranks, ThreadPoolExecutor(2) as threads:
        for gathered in threads.map(lambda mesh: mesh.gather(torch.ones(1)), ranks):
            assert torch.equal(gathered, torch.ones(2, 1))
