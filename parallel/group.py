"""The tensor-parallel group: an argument of every sharded layer, and its collectives.

The collectives are custom ops with a schema and a fake, so `torch.compile(fullgraph=True)` traces through them. They
find what connects the ranks by the group's name, since an op takes no objects.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.nn import functional as F

from eagleray.parallel.network import interface_of, own_address
from eagleray.parallel.platform import device_types, platform_of
from eagleray.parallel.symmetric_memory import SymmetricMemory
from eagleray.parallel.tcp_gather import MAX_BYTES, TcpGather

logger = logging.getLogger(__name__)

ReduceOp = Literal["sum", "max"]


@dataclass(frozen=True)
class TPGroup:
    """Rank `rank` of `size`. A group of one never communicates.

    Layers only need `rank` and `size`, so any shard can be built and loaded in one process; collectives also need the
    connections that `init_tp_group` registers as `name`, and raise `RuntimeError` without them.
    """

    rank: int = 0
    size: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"there is no rank {self.rank} in a group of {self.size}; ranks count from 0")

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        """The sum (or maximum) of every rank's `x`, bitwise equal on all ranks; `x` itself in a group of one."""
        if self.size == 1:
            return x
        return torch.ops.eagleray.all_reduce(x, op, self.size, self.name)  # type: ignore[no-any-return]

    def add_up(self, x: Tensor) -> Tensor:
        """As `all_reduce` for a sum, but in `x` itself, which must be contiguous."""
        if self.size > 1:
            torch.ops.eagleray.add_up(x, self.size, self.name)
        return x

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`F.rms_norm` of every rank's `x` and `residual` added up, and that sum; all `[rows, size]`.

        Where kernels are compiled: in one launch where the ranks' GPUs reach each other, rows are few and numbers have
        16 bits. The norm is bitwise equal on all ranks. The sum is good for one thing: to be the `residual` of the next
        call with as many rows, since a rank may keep only some rows of it (`low_latency_reduce.py`).
        """
        return torch.ops.eagleray.all_reduce_rms_norm(x, residual, weight, eps, self.size, self.name)  # type: ignore[no-any-return]

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, which has the same shape on all of them: `[size, *x.shape]`, in order of rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        return torch.ops.eagleray.all_gather(x, self.size, self.name)  # type: ignore[no-any-return]

    def all_to_all(self, x: Tensor) -> Tensor:
        """What every rank has for this one: of `x` [size, ...] each rank gets its own part, and returns like `x`."""
        if self.size == 1:
            return x
        return torch.ops.eagleray.all_to_all(x, self.size, self.name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Links:
    """What connects this process with the other ranks of its group."""

    process_group: dist.ProcessGroup
    mesh: TcpGather | None  # for small messages in host memory
    symmetric: SymmetricMemory | None  # for small sums between GPUs


_links: dict[str, _Links] = {}


def init_tp_group(
    rank: int, size: int, store: Store | None, device: torch.device, *, name: str = "tp", timeout_s: float = 600.0
) -> TPGroup:
    """Join the group: gloo on CPU, NCCL on CUDA. Every rank calls this with a client of the same store.

    A group of one needs no store and joins nothing. A process belongs to one group at a time: leave it with
    `destroy_tp_group` before joining the next, which needs a store (or a prefix of one) that was not used before. A
    collective that waits longer than `timeout_s` for a rank raises `RuntimeError`.
    """
    group = TPGroup(rank, size, name if size > 1 else "")
    if size == 1:
        return group
    if store is None:
        raise ValueError(f"{size} ranks need a store to meet")
    if _links:
        raise RuntimeError(f"this process is already in group {next(iter(_links))!r}; leave it first")
    platform = platform_of(device)
    on_host = platform.accelerator is None
    if platform.backend == "gloo" and (interface := interface_of(own_address(store)[1])):
        # gloo listens where the host's name leads, which on Debian and Ubuntu is loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        platform.backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=None if on_host else device,
    )
    assert dist.group.WORLD is not None
    mesh = TcpGather.join(rank, size, store, timeout_s) if on_host else None
    symmetric = _join_symmetric(dist.group.WORLD, device) if platform.has_symmetric_memory else None
    _links[name] = _Links(dist.group.WORLD, mesh, symmetric)
    return group


def _join_symmetric(group: dist.ProcessGroup, device: torch.device) -> SymmetricMemory | None:
    """Shared memory between the ranks' GPUs, where they can reach each other: on one node, over NVLink."""
    symmetric = None
    try:
        symmetric = SymmetricMemory(group, device)
    except RuntimeError as error:
        logger.warning("ranks cannot share GPU memory, so small sums go over NCCL, too: %s", error)
    joined = torch.tensor(symmetric is not None, dtype=torch.int32, device=device)
    dist.all_reduce(joined, dist.ReduceOp.MIN, group=group)  # all take the same way, or they would wait for each other
    return symmetric if joined.item() else None


def destroy_tp_group(group: TPGroup) -> None:
    """Leave the group. Leaving a group of one, or one that was left before, does nothing."""
    links = _links.pop(group.name, None)
    if links is None:
        return
    if links.mesh is not None:
        links.mesh.close()
    dist.destroy_process_group()


_EVERYWHERE = device_types(lambda platform: True)
_ADDING_ALIKE = device_types(lambda platform: platform.adds_alike)
_ADDING_IN_ORDER = device_types(lambda platform: not platform.adds_alike)
_COMPILING = device_types(lambda platform: platform.compiles_kernels)

torch.library.define("eagleray::all_reduce", "(Tensor x, str op, int size, str group) -> Tensor")
torch.library.define("eagleray::add_up", "(Tensor(a!) x, int size, str group) -> ()")
torch.library.define(
    "eagleray::all_reduce_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, int size, str group) -> (Tensor, Tensor)",
)
torch.library.define("eagleray::all_gather", "(Tensor x, int size, str group) -> Tensor")
torch.library.define("eagleray::all_to_all", "(Tensor x, int size, str group) -> Tensor")


def _links_of(name: str) -> _Links:
    if name not in _links:
        raise RuntimeError(f"no process group {name!r} in this process; join one with init_tp_group")
    return _links[name]


def _gather(x: Tensor, size: int, group: str) -> Tensor:
    links, x = _links_of(group), x.contiguous()
    if links.mesh is not None and x.nbytes <= MAX_BYTES:
        return links.mesh.gather(x)
    gathered = x.new_empty(size, *x.shape)
    # The function that does this has one name in torch 2.11 and another in 2.13; the method has the same in both.
    links.process_group._allgather_base(gathered.view(-1), x.view(-1)).wait()
    return gathered


@torch.library.impl("eagleray::all_gather", _EVERYWHERE)
def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    return _gather(x, size, group)


@torch.library.impl("eagleray::all_to_all", _EVERYWHERE)
def _all_to_all(x: Tensor, size: int, group: str) -> Tensor:
    assert x.shape[0] == size
    came = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(came, x.contiguous(), group=_links_of(group).process_group)
    return came


def _reduce_in_order(x: Tensor, op: ReduceOp, size: int, group: str) -> Tensor:
    """Gather, then reduce in order of rank.

    gloo's own all-reduce adds in an order that depends on an element's place in the message, so a token's sum would
    change with the tokens beside it.
    """
    gathered = _gather(x, size, group)
    if op == "max":
        return gathered.amax(dim=0)
    total = gathered[0].clone()
    for other in gathered[1:]:
        total += other
    return total


@torch.library.impl("eagleray::all_reduce", _ADDING_IN_ORDER)
def _all_reduce_in_order(x: Tensor, op: ReduceOp, size: int, group: str) -> Tensor:
    return _reduce_in_order(x, op, size, group)


@torch.library.impl("eagleray::all_reduce", _ADDING_ALIKE)
def _all_reduce_alike(x: Tensor, op: ReduceOp, size: int, group: str) -> Tensor:
    return _reduce_alike(x, op, group)


def _reduce_alike(x: Tensor, op: ReduceOp, group: str) -> Tensor:
    """NCCL reduces each element once and hands the same result to every rank, and so do the kernels for small ones."""
    links = _links_of(group)
    if links.symmetric is not None and links.symmetric.takes(x, op):
        return links.symmetric.all_reduce(x.contiguous(), op)
    total = x.clone(memory_format=torch.contiguous_format)
    reduce = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    dist.all_reduce(total, reduce, group=links.process_group)
    return total


@torch.library.impl("eagleray::add_up", _ADDING_IN_ORDER)
def _add_up_in_order(x: Tensor, size: int, group: str) -> None:
    x.copy_(_reduce_in_order(x, "sum", size, group))


@torch.library.impl("eagleray::add_up", _ADDING_ALIKE)
def _add_up_alike(x: Tensor, size: int, group: str) -> None:
    links = _links_of(group)
    if links.symmetric is not None and links.symmetric.takes(x, "sum"):
        links.symmetric.add_up(x)
    else:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=links.process_group)


@torch.library.impl("eagleray::all_reduce_rms_norm", _COMPILING)
def _all_reduce_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, size: int, group: str
) -> tuple[Tensor, Tensor]:
    symmetric = _links_of(group).symmetric
    if symmetric is not None and symmetric.takes_rms_norm(x):
        return symmetric.all_reduce_rms_norm(x.contiguous(), residual, weight, eps)
    total = _reduce_alike(x, "sum", group)
    total = total if residual is None else total + residual
    return F.rms_norm(total, list(weight.shape), weight, eps), total


@torch.library.register_fake("eagleray::all_reduce_rms_norm")  # type: ignore[untyped-decorator]
def _all_reduce_rms_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, size: int, group: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("eagleray::add_up")  # type: ignore[untyped-decorator]
def _add_up_fake(x: Tensor, size: int, group: str) -> None:
    """Changes what is in `x`, and nothing else."""


@torch.library.register_fake("eagleray::all_reduce")  # type: ignore[untyped-decorator]
def _all_reduce_fake(x: Tensor, op: ReduceOp, size: int, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("eagleray::all_gather")  # type: ignore[untyped-decorator]
def _all_gather_fake(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(size, *x.shape)


@torch.library.register_fake("eagleray::all_to_all")  # type: ignore[untyped-decorator]
def _all_to_all_fake(x: Tensor, size: int, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
