"""Small messages between GPUs of one node in one launch: each word travels with a flag, and nobody awaits a barrier.

A rank writes its words into each other rank's inbox, 32 bits of data beside a 32-bit epoch in one 64-bit store, and
reads its own inbox until every word bears the epoch that it waits for. (NCCL's protocol LL; Jeaugey, "NCCL 2.0", 2017.)
Inboxes come in pairs used in turn: who sends epoch n + 2 has received epoch n + 1 from all, and they had read epoch n.
Sums are taken in order of rank, so all ranks get the same bits.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.overlap import OVERLAP

MAX_ROWS = 64  # of a sum; with more, less data beats fewer launches
_PAIRS_AT_ONCE = 128


@dataclass(frozen=True)
class Inboxes:
    """Room on every rank for `max_rows` messages of `words` words from each other rank, two of each."""

    rank: int
    size: int
    max_rows: int
    words: int
    own: Tensor  # [2 * size * max_rows * words] int64, zero before the first message
    pointers: Tensor  # [size] int64: where each rank's `own` is
    epochs: Tensor  # [max_rows] int32: of the last message of each row

    @staticmethod
    def join(group: dist.ProcessGroup, max_rows: int, words: int, device: torch.device) -> "Inboxes":
        """A collective call, over the GPUs of one node."""
        rank, size = group.rank(), group.size()
        own = symm_mem.empty(2 * size * max_rows * words, dtype=torch.int64, device=device)
        own.zero_()
        torch.cuda.synchronize(device)  # before others may write
        handle = symm_mem.rendezvous(own, group)
        addresses = [handle.get_buffer(peer, own.shape, torch.int64).data_ptr() for peer in range(size)]
        pointers = torch.tensor(addresses, dtype=torch.int64, device=device)
        return Inboxes(
            rank, size, max_rows, words, own, pointers, torch.zeros(max_rows, dtype=torch.int32, device=device)
        )


def sum_norm(inboxes: Inboxes, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The root mean square norm of the sum of all ranks' `x` and `residual`, and that sum: both `[rows, size]`.

    `x` is `[rows, size]`, contiguous, in 16 bits; so are `residual` and `weight` `[size]`. The sum is taken in float32.
    """
    rows, size = x.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _sum_norm_kernel[(rows,)](
        x.view(torch.int32), None if residual is None else residual.view(torch.int32), weight.view(torch.int32),
        normed.view(torch.int32), total.view(torch.int32), inboxes.pointers, inboxes.epochs, eps,
        size // 2, inboxes.max_rows, RANK=inboxes.rank, SIZE=inboxes.size, IS_BF16=x.dtype == torch.bfloat16,
        HAS_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(size // 2), PDL=OVERLAP,
        num_warps=max(4, min(16, size // 512)), launch_pdl=OVERLAP,
    )  # fmt: skip
    return normed, total


def highest(inboxes: Inboxes, pairs: Tensor) -> Tensor:
    """The maximum `[n]` over all ranks' `pairs` `[n]` int64."""
    n = pairs.shape[0]
    out = torch.empty_like(pairs)
    _highest_kernel[(triton.cdiv(n, _PAIRS_AT_ONCE),)](
        pairs, out, inboxes.pointers, inboxes.epochs, n, inboxes.max_rows,
        RANK=inboxes.rank, SIZE=inboxes.size, BLOCK=_PAIRS_AT_ONCE, PDL=OVERLAP, num_warps=4, launch_pdl=OVERLAP,
    )  # fmt: skip
    return out


def pair_rows(max_pairs: int) -> tuple[int, int]:
    """`max_rows` and `words` of inboxes for `highest` of up to `max_pairs` pairs."""
    return -(-max_pairs // _PAIRS_AT_ONCE), 2 * _PAIRS_AT_ONCE


@triton.jit
def _send(words, epoch, pointers, offset, inside, RANK: tl.constexpr, SIZE: tl.constexpr):
    message = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.load(pointers + peer).to(tl.pointer_type(tl.int64))
            tl.store(inbox + offset, message, mask=inside)


@triton.jit
def _receive(inbox, offset, epoch, inside):
    expected = epoch.to(tl.int64)
    message = tl.load(inbox + offset, mask=inside, other=expected << 32, volatile=True)
    while tl.min(((message >> 32) == expected).to(tl.int32), 0) == 0:
        message = tl.load(inbox + offset, mask=inside, other=expected << 32, volatile=True)
    return message.to(tl.int32)


@triton.jit
def _offset(epoch, sender, row, rows, WORDS, SIZE: tl.constexpr):
    return (((epoch & 1) * SIZE + sender) * rows + row).to(tl.int64) * WORDS


@triton.jit
def _halves(word, IS_BF16: tl.constexpr):
    """The two 16-bit floats of each word in float32."""
    if IS_BF16:
        low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, IS_BF16: tl.constexpr):
    if IS_BF16:
        a, b = low.to(tl.bfloat16).to(tl.int16, bitcast=True), high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        a, b = low.to(tl.float16).to(tl.int16, bitcast=True), high.to(tl.float16).to(tl.int16, bitcast=True)
    return (b.to(tl.int32) << 16) | (a.to(tl.int32) & 0xFFFF)


@triton.jit
def _sum_norm_kernel(
    x, residual, weight, normed, total,  # words of two values
    pointers,  # [SIZE] int64, of the inboxes
    epochs,  # [max_rows] int32
    eps,
    words,
    max_rows,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    IS_BF16: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    if PDL:
        gdc_launch_dependents()
    row, word = tl.program_id(0), tl.arange(0, BLOCK)
    inside = word < words
    weight_low, weight_high = _halves(tl.load(weight + word, mask=inside, other=0), IS_BF16)
    if PDL:
        gdc_wait()
    place = row.to(tl.int64) * words + word
    epoch = tl.load(epochs + row) + 1
    own = tl.load(x + place, mask=inside, other=0)
    _send(own, epoch, pointers, _offset(epoch, RANK, row, max_rows, words, SIZE) + word, inside, RANK, SIZE)
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        kept = tl.load(residual + place, mask=inside, other=0)
    inbox = tl.load(pointers + RANK).to(tl.pointer_type(tl.int64))
    for sender in tl.static_range(SIZE):
        part = own
        if sender != RANK:
            part = _receive(inbox, _offset(epoch, sender, row, max_rows, words, SIZE) + word, epoch, inside)
        part_low, part_high = _halves(part, IS_BF16)
        low += part_low
        high += part_high
    if HAS_RESIDUAL:
        kept_low, kept_high = _halves(kept, IS_BF16)
        low += kept_low
        high += kept_high
    sums = _word(low, high, IS_BF16)
    tl.store(total + place, sums, mask=inside)
    low, high = _halves(sums, IS_BF16)  # normed as they are kept
    squares = tl.sum(low * low + high * high, 0) / (2 * words)
    scale = 1.0 / tl.sqrt(squares + eps)
    tl.store(normed + place, _word(low * scale * weight_low, high * scale * weight_high, IS_BF16), mask=inside)
    tl.debug_barrier()  # every warp has read the epoch
    tl.store(epochs + row, epoch)


@triton.jit(do_not_specialize=["n"])
def _highest_kernel(
    pairs, out, pointers, epochs, n, max_rows,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = row * BLOCK + lane < n
    epoch = tl.load(epochs + row) + 1
    best = tl.load(pairs + row * BLOCK + lane, mask=inside, other=0)
    offset = _offset(epoch, RANK, row, max_rows, 2 * BLOCK, SIZE) + lane
    _send(best, epoch, pointers, offset, inside, RANK, SIZE)
    _send(best >> 32, epoch, pointers, offset + BLOCK, inside, RANK, SIZE)
    inbox = tl.load(pointers + RANK).to(tl.pointer_type(tl.int64))
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            offset = _offset(epoch, sender, row, max_rows, 2 * BLOCK, SIZE) + lane
            low = _receive(inbox, offset, epoch, inside)
            high = _receive(inbox, offset + BLOCK, epoch, inside)
            best = tl.maximum(best, (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))
    tl.store(out + row * BLOCK + lane, best, mask=inside)
    tl.debug_barrier()  # every warp has read the epoch
    tl.store(epochs + row, epoch)
