"""Low-latency collectives of small messages between the GPUs of a node: one launch, flags beside the data, no
barrier.

A rank writes its words into another's inbox, 32 bits of data beside a 32-bit epoch in one 64-bit store, and reads its
own inbox until every word bears the epoch that it waits for. (NCCL's protocol LL; Jeaugey, "NCCL 2.0", 2017.) Longer
messages are written as they are, half as long, and the epoch once behind them, when they are there (protocol Simple).
Inboxes come in pairs used in turn: a rank that sends epoch n + 2 of a row has received epoch n + 1 from all, or from
one that had, and these had read epoch n. Sums are taken in order of rank, so all ranks get the same bits.

Programs that wait for each other need not all run at once, but those of low numbers must start first, as GPUs have them
do: then the first row that is not done is under way on every rank.
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

from eagleray.parallel.platform import LAUNCH, OVERLAP, synchronize

MAX_ROWS = 512  # of a sum; with more, less data beats fewer launches
MAX_ROWS_AT_ONCE = 64  # of a sum for which every rank sends all it has to every other
MAX_BYTES_AT_ONCE = 640 * 1024  # that a rank sends then
_PAIRS_AT_ONCE = 128


@dataclass(frozen=True)
class Inboxes:
    """Room on every rank for messages of `words` words on `lines` lines from each rank, two on each."""

    rank: int
    size: int
    lines: int
    words: int
    own: Tensor  # [2 * size * lines * words] int64, zero before the first message
    pointers: Tensor  # [size] int64: where each rank's `own` is
    epochs: Tensor  # int32: of the last message about each row

    @staticmethod
    def join(group: dist.ProcessGroup, lines: int, words: int, device: torch.device) -> "Inboxes":
        """A collective call, over the GPUs of one node."""
        rank, size = group.rank(), group.size()
        own = symm_mem.empty(2 * size * lines * words, dtype=torch.int64, device=device)
        own.zero_()
        synchronize(device)  # before others may write
        handle = symm_mem.rendezvous(own, group)
        addresses = [handle.get_buffer(peer, own.shape, torch.int64).data_ptr() for peer in range(size)]
        pointers = torch.tensor(addresses, dtype=torch.int64, device=device)
        epochs = torch.zeros(max(lines, MAX_ROWS), dtype=torch.int32, device=device)
        return Inboxes(rank, size, lines, words, own, pointers, epochs)


def lines_of_sums(size: int) -> int:
    """Lines of inboxes for `all_reduce_rms_norm` of `size` ranks: rows sent to all, parts sent to an owner, results."""
    return MAX_ROWS_AT_ONCE + 2 * _owned(size)


def has_owners(rows: int, row_bytes: int, size: int) -> bool:
    """Whether `all_reduce_rms_norm` of so many rows among `size` ranks goes by the rows' owners."""
    return rows > MAX_ROWS_AT_ONCE or rows * row_bytes * (size - 1) > MAX_BYTES_AT_ONCE


def _owned(size: int) -> int:
    """How many rows a rank owns at most."""
    return -(-MAX_ROWS // size)


def all_reduce_rms_norm(
    inboxes: Inboxes, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The root mean square norm of the sum of all ranks' `x` and `residual`, and that sum: both `[rows, size]`.

    `x` is `[rows, size]`, contiguous, in 16 bits; so are `residual` and `weight` `[size]`. The sum is taken in float32.
    Few rows are sent to all. Of more, each has an owner, row `i` rank `i % size`: it adds the parts up and sends the
    norm back. Then the sum of a row is kept by its owner alone, and only there must `residual` hold it.
    """
    rows, size = x.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _all_reduce_rms_norm_kernel[(rows,)](
        x.view(torch.int32), None if residual is None else residual.view(torch.int32), weight.view(torch.int32),
        normed.view(torch.int32), total.view(torch.int32), inboxes.pointers, inboxes.epochs, eps,
        size // 2, inboxes.lines, MAX_ROWS_AT_ONCE, _owned(inboxes.size), RANK=inboxes.rank, SIZE=inboxes.size,
        HAS_OWNERS=has_owners(rows, size * x.itemsize, inboxes.size),
        IS_BF16=x.dtype == torch.bfloat16, HAS_RESIDUAL=residual is not None,
        BLOCK=triton.next_power_of_2(size // 2), PDL=OVERLAP,
        num_warps=num_warps(size), **LAUNCH,
    )  # fmt: skip
    return normed, total


def num_warps(row_size: int) -> int:
    """Warps of a program for a row, a power of two: a warp for every 256 words or so."""
    warps: int = triton.next_power_of_2(row_size // 2) // 256
    return max(4, min(16, warps))


def highest(inboxes: Inboxes, pairs: Tensor) -> Tensor:
    """The maximum `[n]` over all ranks' `pairs` `[n]` int64."""
    n = pairs.shape[0]
    out = torch.empty_like(pairs)
    _highest_kernel[(triton.cdiv(n, _PAIRS_AT_ONCE),)](
        pairs, out, inboxes.pointers, inboxes.epochs, n, inboxes.lines,
        RANK=inboxes.rank, SIZE=inboxes.size, BLOCK=_PAIRS_AT_ONCE, PDL=OVERLAP, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def lines_of_pairs(max_pairs: int) -> tuple[int, int]:
    """Lines and words of inboxes for `highest` of up to `max_pairs` pairs."""
    return -(-max_pairs // _PAIRS_AT_ONCE), 2 * _PAIRS_AT_ONCE


@triton.jit
def _send_to(words, epoch, inbox, offset, inside):
    message = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(tl.multiple_of(inbox, 16).to(tl.pointer_type(tl.int64)) + offset, message, mask=inside)


@triton.jit
def _send_to_all(words, epoch, pointers, offset, inside, RANK: tl.constexpr, SIZE: tl.constexpr):
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            _send_to(words, epoch, tl.load(pointers + peer), offset, inside)


@triton.jit
def _receive(inbox, offset, epoch, inside):
    expected = epoch.to(tl.int64)
    message = tl.load(inbox + offset, mask=inside, other=expected << 32, volatile=True)
    while tl.min(((message >> 32) == expected).to(tl.int32), 0) == 0:
        message = tl.load(inbox + offset, mask=inside, other=expected << 32, volatile=True)
    return message.to(tl.int32)


@triton.jit
def _line(inbox, epoch, sender, line, lines, words, SIZE: tl.constexpr):
    """Where a message without flags begins, in 32-bit words; behind its `words` stands its epoch."""
    start = inbox.to(tl.pointer_type(tl.int64)) + _offset(epoch, sender, line, lines, words, SIZE)
    return tl.multiple_of(start.to(tl.pointer_type(tl.int32), bitcast=True), 16)


@triton.jit
def _announce(line, words, epoch):
    """All that this program has written on `line` is there. A barrier must come before."""
    tl.atomic_xchg(line + words, epoch, sem="release", scope="sys")


@triton.jit
def _read_line(line, words, word, inside, epoch):
    """The message of this epoch, once it is there; not from L1, which knows nothing of other GPUs."""
    seen = tl.atomic_add(line + words, 0, sem="acquire", scope="sys")
    while seen != epoch:
        seen = tl.atomic_add(line + words, 0, sem="acquire", scope="sys")
    return tl.load(line + word, mask=inside, other=0, cache_modifier=".cg")


@triton.jit
def _offset(epoch, sender, line, lines, words, SIZE: tl.constexpr):
    return (((epoch & 1) * SIZE + sender) * lines + line).to(tl.int64) * words


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
def _add_parts(
    own, kept, inbox, epoch, line, lines, words, word, inside,
    RANK: tl.constexpr, SIZE: tl.constexpr, HAS_OWNERS: tl.constexpr, IS_BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This rank's part, the others', which come on `line`, and what was kept, as words of the sum."""
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for sender in tl.static_range(SIZE):
        part = own
        if sender != RANK:
            if HAS_OWNERS:
                part = _read_line(_line(inbox, epoch, sender, line, lines, words, SIZE), words, word, inside, epoch)
            else:
                part = _receive(inbox, _offset(epoch, sender, line, lines, words, SIZE) + word, epoch, inside)
        part_low, part_high = _halves(part, IS_BF16)
        low += part_low
        high += part_high
    kept_low, kept_high = _halves(kept, IS_BF16)
    return _word(low + kept_low, high + kept_high, IS_BF16)


@triton.jit
def _norm(sums, scales, words, eps, IS_BF16: tl.constexpr):
    """The norm of a row in words, times `scales`, in words."""
    low, high = _halves(sums, IS_BF16)
    scale_low, scale_high = _halves(scales, IS_BF16)
    factor = 1.0 / tl.sqrt(tl.sum(low * low + high * high, 0) / (2 * words) + eps)
    return _word(low * factor * scale_low, high * factor * scale_high, IS_BF16)


@triton.jit
def _all_reduce_rms_norm_kernel(
    x, residual, weight, normed, total,  # words of two values
    pointers,  # [SIZE] int64, of the inboxes
    epochs,  # int32, by row
    eps,
    words,
    lines,
    at_once,
    owned,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_OWNERS: tl.constexpr,
    IS_BF16: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. Lines: `at_once` for rows sent to all, `owned` for parts of own rows, `owned` for results."""
    if PDL:
        gdc_launch_dependents()
    row, word = tl.program_id(0), tl.arange(0, BLOCK)
    inside = word < words
    scales = tl.load(weight + word, mask=inside, other=0)
    if PDL:
        gdc_wait()
    place = row.to(tl.int64) * words + word
    epoch = tl.load(epochs + row) + 1
    own = tl.load(x + place, mask=inside, other=0)
    inbox = tl.multiple_of(tl.load(pointers + RANK), 16).to(tl.pointer_type(tl.int64))
    line, owner = row, row % SIZE
    if HAS_OWNERS:
        line = at_once + row // SIZE
        if owner != RANK:
            there = _line(tl.load(pointers + owner), epoch, RANK, line, lines, words, SIZE)
            tl.store(there + word, own, mask=inside)
            tl.debug_barrier()
            _announce(there, words, epoch)
            here = _line(inbox, epoch, owner, line + owned, lines, words, SIZE)
            tl.store(normed + place, _read_line(here, words, word, inside, epoch), mask=inside)
    else:
        offset = _offset(epoch, RANK, line, lines, words, SIZE) + word
        _send_to_all(own, epoch, pointers, offset, inside, RANK, SIZE)
    if owner == RANK or not HAS_OWNERS:
        kept = tl.zeros([BLOCK], tl.int32)
        if HAS_RESIDUAL:
            kept = tl.load(residual + place, mask=inside, other=0)
        sums = _add_parts(
            own, kept, inbox, epoch, line, lines, words, word, inside, RANK, SIZE, HAS_OWNERS, IS_BF16, BLOCK
        )
        result = _norm(sums, scales, words, eps, IS_BF16)  # of the sums as they are kept
        if HAS_OWNERS:
            for peer in tl.static_range(SIZE):
                if peer != RANK:
                    there = _line(tl.load(pointers + peer), epoch, RANK, line + owned, lines, words, SIZE)
                    tl.store(there + word, result, mask=inside)
            tl.debug_barrier()
            for peer in tl.static_range(SIZE):
                if peer != RANK:
                    there = _line(tl.load(pointers + peer), epoch, RANK, line + owned, lines, words, SIZE)
                    _announce(there, words, epoch)
        tl.store(total + place, sums, mask=inside)
        tl.store(normed + place, result, mask=inside)
    tl.debug_barrier()  # every warp has read the epoch
    tl.store(epochs + row, epoch)


@triton.jit(do_not_specialize=["n"])
def _highest_kernel(
    pairs, out, pointers, epochs, n, lines,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = row * BLOCK + lane < n
    epoch = tl.load(epochs + row) + 1
    best = tl.load(pairs + row * BLOCK + lane, mask=inside, other=0)
    offset = _offset(epoch, RANK, row, lines, 2 * BLOCK, SIZE) + lane
    _send_to_all(best, epoch, pointers, offset, inside, RANK, SIZE)
    _send_to_all(best >> 32, epoch, pointers, offset + BLOCK, inside, RANK, SIZE)
    inbox = tl.load(pointers + RANK).to(tl.pointer_type(tl.int64))
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            offset = _offset(epoch, sender, row, lines, 2 * BLOCK, SIZE) + lane
            low = _receive(inbox, offset, epoch, inside)
            high = _receive(inbox, offset + BLOCK, epoch, inside)
            best = tl.maximum(best, (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))
    tl.store(out + row * BLOCK + lane, best, mask=inside)
    tl.debug_barrier()  # every warp has read the epoch
    tl.store(epochs + row, epoch)
