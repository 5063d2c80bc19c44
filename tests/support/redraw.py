"""Lines of requests drawn by `KernelSampler` and by the sampler in PyTorch."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling, TokenLogprobs
from eagleray.workers.sampling import kernel_sampler
from eagleray.workers.sampling.kernel_sampler import ANY, KernelSampler
from eagleray.workers.sampling.packed_pairs import PAD, unpack_host
from eagleray.workers.sampling.reference import ReferenceSampler
from eagleray.workers.sampling.table import Feature, SamplingTable
from support.interpreter import DEVICE

CPU = torch.device("cpu")
UNKNOWN = 1  # stands behind the tokens of every row, and must not count
FORMER = Sampling(  # what every row was asked for before: it leaves nothing behind
    top_k=1,
    logit_bias={0: 100.0, 1: 50.0},
    allowed_token_ids=[0],
    bad_words=[[2], [1, 3]],
    min_tokens=50,
    stop_token_ids=[4],
    repetition_penalty=2.0,
    logprobs=3,
)


@dataclass(frozen=True)
class Line:
    """One request at one position."""

    sampling: Sampling
    logits: Tensor  # [vocab]
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


@dataclass(frozen=True)
class Drawn:
    """What one sampler says of all lines."""

    token_ids: list[int]
    not_finite: list[bool]
    all_masked: list[bool]
    edited: Tensor  # [n, vocab] float32, logits after all edits; the reference's hold for greedy lines only
    logprobs: dict[int, TokenLogprobs]  # by line


def small(monkeypatch: pytest.MonkeyPatch, lanes: int = 64, capacity: int = 64, tile: int = 64) -> None:
    """Tiles so small that small vocabularies take every path of the kernels."""
    for name, value in {
        "LANES": lanes, "CAPACITY": capacity, "FEW": capacity, "SURVEY_WIDTH": lanes // 2, "SURVEY_DEPTH": 2,
        "TILE": tile, "WALK_TILE": tile, "TOKENS_AT_ONCE": 16, "PARTS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(kernel_sampler, name, value)


def rows_of(lines: list[Line]) -> list[int]:
    """In falling order, and one between each two stays empty."""
    return [2 * line for line in range(len(lines))][::-1]


def token_table(lines: list[Line]) -> Tensor:
    """[rows + 1, length] int32."""
    length = 2 + max(len(line.tokens) for line in lines)
    tokens = torch.full((2 * len(lines) + 1, length), UNKNOWN, dtype=torch.int32)
    for row, line in zip(rows_of(lines), lines, strict=True):
        tokens[row, : len(line.tokens)] = torch.tensor(line.tokens, dtype=torch.int32)
    return tokens


def filled_table(lines: list[Line], device: torch.device) -> SamplingTable:
    table = SamplingTable(2 * len(lines), range(len(lines[0].logits)), device)
    table.set({row: line.sampling for row, line in zip(rows_of(lines), lines, strict=True)})
    return table


def by_reference(lines: list[Line], soft_cap: float | None = None) -> Drawn:
    """By the sampler in PyTorch, one line at a time if that is how `lines` are given."""
    vocab, rows = len(lines[0].logits), rows_of(lines)
    sampler = ReferenceSampler(filled_table(lines, CPU), range(vocab), vocab, TPGroup())
    logits = torch.stack([line.logits for line in lines]).float()
    logits = logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap + 0 * logits
    prompts, lengths = [len(line.prompt) for line in lines], [len(line.tokens) for line in lines]
    out = sampler(logits, rows, token_table(lines), prompts, lengths)
    ids, not_finite, all_masked = unpack_host(out.pairs.numpy())
    logprobs = {rows.index(row): entry for row, (entry,) in out.logprobs.items()}
    return Drawn(ids.tolist(), not_finite.tolist(), all_masked.tolist(), logits, logprobs)


class Kernels:
    """A `KernelSampler` whose rows are those of `lines`; all had other requests before."""

    def __init__(self, lines: list[Line], soft_cap: float | None = None) -> None:
        self.lines = lines
        self.rows, vocab = rows_of(lines), len(lines[0].logits)
        self.table = filled_table(lines, DEVICE)
        self.tokens = token_table(lines).to(DEVICE)
        self.sampler = KernelSampler(self.table, vocab, 2 * len(lines), self.tokens, soft_cap)
        self.sampler.set(dict.fromkeys(self.rows, FORMER), dict.fromkeys(self.rows, 2))
        self.sampler.set(
            {row: line.sampling for row, line in zip(self.rows, lines, strict=True)},
            {row: len(line.prompt) for row, line in zip(self.rows, lines, strict=True)},
        )

    def draw(self, features: Feature = ANY) -> Drawn:
        """Every line, of which none may be plain. Checks what is written beside the pairs."""
        raw, rows, lengths = self.inputs()
        pairs = torch.full((len(self.lines),), PAD, device=DEVICE)
        before = self.tokens.clone()
        self.sampler.redraw(raw, rows, lengths, pairs, features)
        self.sampler.logprobs(raw, rows, pairs)
        logprobs = self.sampler.found_logprobs(slice(len(rows)))
        ids, not_finite, all_masked = unpack_host(pairs.cpu().numpy())
        assert not self.sampler._token_counts.any()
        before[rows, lengths.long()] = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
        assert torch.equal(self.tokens, before)
        vocab = raw.shape[1]
        asking = [line for line, each in enumerate(self.lines) if each.sampling.logprobs is not None]
        num_top = [min(self.lines[line].sampling.logprobs or 0, vocab) for line in asking]
        wire = logprobs.of(torch.tensor(asking, dtype=torch.int64, device=DEVICE)).to_messages(num_top)
        edited = self.sampler._work[: len(self.lines)].cpu()
        by_line = dict(zip(asking, wire, strict=True))
        return Drawn(ids.tolist(), not_finite.tolist(), all_masked.tolist(), edited, by_line)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits whose lines stand further apart than they are long, rows and lengths."""
        whole = torch.stack([line.logits for line in self.lines])
        apart = torch.full((len(whole), whole.shape[1] + 13), torch.nan, dtype=whole.dtype)
        apart[:, : whole.shape[1]] = whole
        lengths = torch.tensor([len(line.tokens) for line in self.lines], dtype=torch.int32)
        return apart.to(DEVICE)[:, : whole.shape[1]], torch.tensor(self.rows, device=DEVICE), lengths.to(DEVICE)


def assert_same(lines: list[Line], soft_cap: float | None = None) -> Drawn:
    """Both samplers draw the same tokens, and mark the same lines; what the kernels say."""
    drawn, expected = Kernels(lines, soft_cap).draw(), by_reference(lines, soft_cap)
    assert drawn.not_finite == expected.not_finite
    assert drawn.all_masked == expected.all_masked
    for line, ours, theirs, broken in zip(lines, drawn.token_ids, expected.token_ids, drawn.not_finite, strict=True):
        assert broken or ours == theirs, line.sampling
    return drawn
