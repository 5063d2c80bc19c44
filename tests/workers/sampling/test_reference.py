"""The sampler over vocabulary shards against a plain numpy pipeline over the whole vocabulary, and its corner cases."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling, TokenLogprobs
from eagleray.workers.sampling.packed_pairs import unpack_host
from eagleray.workers.sampling.reference import ReferenceSampler
from eagleray.workers.sampling.table import SamplingTable

Array = npt.NDArray[Any]
T = TypeVar("T")

VOCAB = 1000
SHARDS = {
    1: [range(0, 1000)],
    2: [range(0, 700), range(700, 1000)],
    3: [range(0, 11), range(11, 600), range(600, 1000)],
}


# Ranks as threads, which exchange through a list and a barrier.


@dataclass(eq=False)
class Meeting:
    size: int
    barrier: threading.Barrier = field(init=False)
    items: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)
        self.items = [torch.empty(0)] * self.size

    def exchange(self, rank: int, item: Tensor) -> Tensor:
        self.items[rank] = item
        self.barrier.wait()
        assert len({(x.shape, x.dtype) for x in self.items}) == 1, "ranks must pass the same shape"
        gathered = torch.stack(self.items)
        self.barrier.wait()
        return gathered


@dataclass(frozen=True)
class ThreadGroup(TPGroup):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_gather(self, x: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, x)

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        gathered = self.meeting.exchange(self.rank, x)
        return gathered.sum(0).to(x.dtype) if op == "sum" else gathered.amax(0)


def on_ranks(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    """What `work` returns on each rank."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]


@dataclass
class Line:
    """One request at one position."""

    sampling: Sampling
    logits: Array  # [vocab] float32
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)


def sample(
    lines: list[Line], size: int = 1, odd: Sequence[int] = (), masked: Sequence[int] = ()
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    """The tokens of `lines`, in rows 0, 2, 4, …, after a check that all ranks agree; logprobs by line.

    Nothing can be drawn for lines `odd`, whose logits are not finite, nor for `masked`, and every rank must say so of
    those alone.
    """
    rows = [2 * line for line in range(len(lines))]
    max_rows, max_len = 2 * len(lines) + 3, 2 + max(len(line.prompt) + len(line.output) for line in lines)
    tokens = torch.full((max_rows, max_len), 5, dtype=torch.int32)  # what stands behind a row's tokens must not count
    for row, line in zip(rows, lines, strict=True):
        ids = line.prompt + line.output
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    whole = torch.from_numpy(np.stack([line.logits for line in lines]))
    shards = SHARDS[size] if whole.shape[1] == VOCAB else [range(0, whole.shape[1])]

    def work(tp: TPGroup) -> tuple[list[int], dict[int, TokenLogprobs]]:
        shard = shards[tp.rank]
        table = SamplingTable(max_rows, shard, torch.device("cpu"))
        for row, line in zip(rows, lines, strict=True):
            table.set({row: EVERYTHING})  # a former request leaves nothing behind
            table.clear(row)
            table.set({row: line.sampling})
        out = ReferenceSampler(table, shard, whole.shape[1], tp)(
            whole[:, shard.start : shard.stop].clone(),
            rows,
            tokens,
            [len(line.prompt) for line in lines],
            [len(line.prompt) + len(line.output) for line in lines],
        )
        token_ids, is_mark, is_masked = unpack_host(out.pairs.numpy())
        assert np.flatnonzero(is_mark).tolist() == list(odd)
        assert np.flatnonzero(is_masked).tolist() == list(masked)
        return token_ids.tolist(), {row // 2: each for row, (each,) in out.logprobs.items() if row // 2 not in odd}

    results = on_ranks(size, work)
    assert all(result == results[0] for result in results)
    return results[0]


EVERYTHING = Sampling(
    temperature=0.5,
    top_k=3,
    top_p=0.5,
    min_p=0.3,
    top_n_sigma=0.5,
    seed=9,
    presence_penalty=1.0,
    frequency_penalty=1.0,
    repetition_penalty=2.0,
    logit_bias={3: 50.0},
    allowed_token_ids=[3, 4],
    bad_words=[[3], [5, 5, 3], [2, 4]],
    min_tokens=4,
    stop_token_ids=[3],
    logprobs=3,
)


# The reference. float32 operations that IEEE defines exactly are done in float32, in the order that the sampler
# promises, so that equal logits stay equal and masks and greedy tokens must agree exactly; the rest is in float64.


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def reference_gumbel(seed: int, position: int, vocab: int) -> Array:
    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + golden) % 2**64) + (position + 1) * golden) % 2**64)
    start, step = np.uint64(key >> 32), np.uint64(key & 0xFFFFFFFF | 1)
    low = np.uint64(0xFFFFFFFF)
    x = (np.arange(vocab, dtype=np.uint64) * step + start) & low
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & low
    x ^= x >> np.uint64(14)
    u = ((x & np.uint64(0x7FFFFFFF)).astype(np.float64) + 0.5) / 2**31
    gumbel: Array = -np.log(-np.log1p(-u))
    return gumbel


def reference(line: Line) -> tuple[int, float]:
    """The token, and how close a call it was: the smallest distance to another answer, one being within rounding."""
    s, logits, vocab = line.sampling, line.logits.copy(), len(line.logits)
    ids = np.arange(vocab)
    if s.allowed_token_ids:
        logits[~np.isin(ids, s.allowed_token_ids)] = -np.inf
    for word in s.bad_words:
        *beginning, last = word
        if line.output[len(line.output) - len(beginning) :] == beginning:
            logits[last] = -np.inf
    if len(line.output) < s.min_tokens:
        logits[s.stop_token_ids] = -np.inf
    for token_id, bias in s.logit_bias.items():
        logits[token_id] += np.float32(bias)
    seen = np.isin(ids, line.prompt + line.output)
    repetition = np.float32(s.repetition_penalty)
    logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
    counts = np.bincount(line.output, minlength=vocab).astype(np.float32)
    logits = logits - np.float32(s.frequency_penalty) * counts
    logits = logits - np.float32(s.presence_penalty) * (counts > 0)
    if s.temperature < 1e-5:
        return int(np.argmax(logits)), np.inf
    margin = np.inf
    if s.top_n_sigma > 0:
        logits, margin = reference_top_n_sigma(s.top_n_sigma, logits)
    values = logits / np.float32(s.temperature)
    token, margin_of_draw = reference_draw(s, values, len(line.prompt) + len(line.output))
    return token, min(margin, margin_of_draw)


def reference_top_n_sigma(n: float, logits: Array) -> tuple[Array, float]:
    """Logits without those below the cut, and how close to it the next one is, in roundings of a float32."""
    wide = logits.astype(np.float64)
    there = wide[wide > -np.inf]
    if not len(there):
        return logits, np.inf
    cut = there.max() - n * there.std()
    others = there[there < there.max()]  # which is above any cut, without rounding
    margin = np.abs(others - cut).min(initial=np.inf) / (1e-6 * max(1, np.abs(cut)))
    return np.where(wide < cut, np.float32(-np.inf), logits), margin


# How much float32 may move a score of up to a few hundred, and the share of the mass before a token or its probability
# relative to the highest: about 1e-5 and 1e-7, times ten.
SCORE_ROUNDING, MASS_ROUNDING = 1e-4, 1e-6


def reference_draw(s: Sampling, values: Array, position: int) -> tuple[int, float]:
    margin = np.inf
    order = np.lexsort((np.arange(len(values)), -values))  # highest first, then lower id
    with np.errstate(invalid="ignore"):
        probs = np.nan_to_num(np.exp(values[order].astype(np.float64) - values.max()))
    kept = probs > 0
    if s.min_p > 0:
        kept &= probs >= s.min_p
        # equality with the highest is exact, so a min_p of 1 has no rounding in it
        margin = min(margin, np.abs(probs[probs < 1] / s.min_p - 1).min(initial=np.inf) / SCORE_ROUNDING)
    if s.top_k > 0:
        kept[s.top_k :] = False
    if s.top_p < 1:
        masses = np.where(kept, probs, 0) / max(probs[kept].sum(), 1e-300)
        before = np.cumsum(masses) - masses
        margin = min(margin, np.abs(before[kept] - s.top_p).min(initial=np.inf) / MASS_ROUNDING)
        kept &= before < s.top_p
    kept[0] = True
    scores = values[order] + reference_gumbel(s.seed, position, len(values))[order]
    scores = np.where(kept, scores, -np.inf)
    ranked = np.sort(scores)
    if ranked[-1] > -np.inf:
        margin = min(margin, (ranked[-1] - ranked[-2]) / SCORE_ROUNDING)
    best = order[scores == ranked[-1]]
    return int(best.min() if ranked[-1] > -np.inf else order[0]), margin


def random_line(rng: np.random.Generator) -> Line:
    """A request with every feature on or off by chance."""

    def maybe(chance: float, value: T, otherwise: T) -> T:
        return value if rng.random() < chance else otherwise

    def some_ids(most: int) -> list[int]:
        return [int(x) for x in rng.choice(VOCAB, rng.integers(1, most), replace=False)]

    logits = (rng.standard_normal(VOCAB) * rng.choice([0.1, 2.0, 8.0])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)  # many exact ties
    sampling = Sampling(
        temperature=maybe(0.75, float(rng.choice([0.3, 1.0, 2.0])), 0.0),
        top_k=maybe(0.3, int(rng.choice([1, 2, 20, 300, 990, 1000, 2000])), 0),
        top_p=maybe(0.4, float(rng.choice([1e-6, 0.3, 0.9, 0.999])), 1.0),
        min_p=maybe(0.3, float(rng.choice([1e-4, 0.1, 0.7, 1.0])), 0.0),
        top_n_sigma=maybe(0.3, float(rng.choice([0.1, 1.0, 2.5, 1e6])), 0.0),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        presence_penalty=maybe(0.2, 0.7, 0.0),
        frequency_penalty=maybe(0.2, -0.3, 0.0),
        repetition_penalty=maybe(0.2, 1.3, 1.0),
        logit_bias=maybe(0.2, {token_id: float(rng.uniform(-100, 100)) for token_id in some_ids(5)}, {}),
        allowed_token_ids=maybe(0.2, some_ids(30), []),
        min_tokens=maybe(0.3, int(rng.integers(1, 8)), 0),
        stop_token_ids=maybe(0.5, some_ids(8), []),
    )
    prompt = [int(x) for x in rng.integers(0, VOCAB, rng.integers(1, 40))]
    output = [int(x) for x in rng.integers(0, VOCAB // 10, rng.integers(0, 40))]
    if rng.random() < 0.3:
        words = bad_words(rng, prompt + output, logits)
        sampling = msgspec.structs.replace(sampling, bad_words=words)
    return Line(sampling, logits, prompt, output)


def bad_words(rng: np.random.Generator, known: list[int], logits: Array) -> list[list[int]]:
    """Words of up to five tokens that likely tokens would complete, some of them only with the prompt or not at all."""
    likely = np.argsort(-logits)[:20]
    words = []
    for last in rng.choice(likely, rng.integers(1, 30)):
        beginning = known[len(known) - min(int(rng.integers(0, 5)), len(known)) :]
        if beginning and rng.random() < 0.3:
            beginning = [*beginning[:-1], int(rng.integers(0, VOCAB))]
        words.append([*beginning, int(last)])
    return words


@pytest.mark.parametrize("size", [1, 2, 3])
def test_random_requests_draw_the_tokens_of_the_whole_vocabulary_reference(size: int) -> None:
    rng = np.random.default_rng(size)
    num_compared = num_skipped = 0
    for _ in range(60):
        lines = [random_line(rng) for _ in range(rng.integers(1, 9))]
        tokens, _ = sample(lines, size)
        for line, token in zip(lines, tokens, strict=True):
            expected, margin = reference(line)
            if margin < 1:  # either answer is right
                num_skipped += 1
                continue
            num_compared += 1
            assert token == expected, line.sampling
    assert num_compared > 200
    assert num_skipped < 0.05 * num_compared


def flat(vocab: int = VOCAB) -> Array:
    return np.zeros(vocab, np.float32)


def peaked(seed: int = 0, scale: float = 3.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3])
class TestExtremes:
    """Corners where the answer is known without a reference."""

    def test_greedy_ties_go_to_the_lower_id(self, size: int) -> None:
        logits = flat()
        logits[[650, 720, 999]] = 4.0
        greedy = Sampling(temperature=0.0)
        assert sample([Line(greedy, flat()), Line(greedy, logits)], size)[0] == [0, 650]

    def test_a_temperature_below_the_limit_is_greedy(self, size: int) -> None:
        lines = [Line(Sampling(temperature=9e-6, seed=seed), flat()) for seed in range(5)]
        assert sample(lines, size)[0] == [0] * 5  # a draw among ties would give any token

    @pytest.mark.parametrize(
        "narrow",
        [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(top_p=0.0), Sampling(min_p=1.0), Sampling(top_n_sigma=1e-9)],
    )
    def test_restricted_to_one_token_is_the_arg_max(self, size: int, narrow: Sampling) -> None:
        lines = [Line(msgspec.structs.replace(narrow, seed=seed), peaked(seed)) for seed in range(8)]
        assert sample(lines, size)[0] == [int(line.logits.argmax()) for line in lines]

    def test_ties_at_the_edge_of_top_k_and_top_p_keep_the_lower_ids(self, size: int) -> None:
        by_k = [Line(Sampling(top_k=3, seed=seed), flat()) for seed in range(60)]
        by_p = [Line(Sampling(top_p=0.0029, seed=seed), flat()) for seed in range(60)]
        assert set(sample(by_k, size)[0]) == {0, 1, 2}
        assert set(sample(by_p, size)[0]) == {0, 1, 2}

    def test_min_p_of_one_keeps_every_token_that_ties_for_the_highest(self, size: int) -> None:
        logits = flat()
        logits[[5, 650, 999]] = 1.0
        assert set(sample([Line(Sampling(min_p=1.0, seed=seed), logits) for seed in range(60)], size)[0]) == {
            5,
            650,
            999,
        }

    def test_top_n_sigma_keeps_what_is_near_the_highest_at_any_temperature(self, size: int) -> None:
        """Of 996 zeros and 10, 9, 8 and 0.5 the deviation is 0.495, so that 3 of them reach down to 8.5."""
        logits = flat()
        logits[[5, 650, 720, 999]] = 10.0, 9.0, 8.0, 0.5
        for temperature in (0.01, 1.0, 100.0):
            kept = [5] if temperature == 0.01 else [5, 650]
            cases: list[dict[str, Any]] = [{}, {"top_p": 0.99}, {"top_k": 900}, {"min_p": 1e-9}]
            for extra in cases:
                lines = [
                    Line(Sampling(temperature=temperature, top_n_sigma=3.0, seed=seed, **extra), logits)
                    for seed in range(60)
                ]
                assert set(sample(lines, size)[0]) == set(kept)

    def test_top_n_sigma_counts_no_masked_token(self, size: int) -> None:
        """The deviation of 10, 9 and 0 is 4.5; with the 997 zeros that are masked it would be 0.43."""
        logits = flat()
        logits[[5, 650]] = 10.0, 9.0
        sampling = Sampling(temperature=10.0, top_n_sigma=2.3, allowed_token_ids=[5, 650, 999])
        lines = [Line(msgspec.structs.replace(sampling, seed=seed), logits) for seed in range(60)]
        assert set(sample(lines, size)[0]) == {5, 650, 999}
        narrower = [Line(msgspec.structs.replace(line.sampling, top_n_sigma=2.2), logits) for line in lines]
        assert set(sample(narrower, size)[0]) == {5, 650}

    def test_top_n_sigma_of_large_logits_that_lie_close_together(self, size: int) -> None:
        """A deviation of 0.289, of logits that float32 rounds to steps of 0.001, which lie as far from each other."""
        logits = (1e4 + np.linspace(0, 1, VOCAB)).astype(np.float32)
        tokens = sample([Line(Sampling(top_n_sigma=1.0, seed=seed), logits) for seed in range(300)], size)[0]
        assert 709 <= min(tokens) < 720

    def test_only_allowed_tokens_are_drawn_though_one_rank_holds_them_all(self, size: int) -> None:
        lines = [
            Line(Sampling(temperature=t, allowed_token_ids=[998, 999], top_p=p, seed=seed), peaked())
            for t, p in ((0.0, 1.0), (1.0, 1.0), (5.0, 0.99))
            for seed in range(20)
        ]
        assert set(sample(lines, size)[0]) == {998, 999}

    def test_bias_of_a_hundred_forces_and_forbids(self, size: int) -> None:
        forced = Line(Sampling(logit_bias={777: 100.0}), peaked())
        allowed = Sampling(allowed_token_ids=[3, 777], logit_bias={777: -100.0})
        assert sample([forced, Line(allowed, peaked())], size)[0] == [777, 3]

    def test_a_bad_word_is_not_completed(self, size: int) -> None:
        best, second = (int(token_id) for token_id in np.argsort(-peaked())[:2])
        cases = [
            ([[best]], [], [7, 8], second),
            ([[7, 8, best]], [7, 8], [], best),  # the prompt is not a part of a word
            ([[7, 8, best]], [7], [8], best),
            ([[7, 8, best]], [], [8], best),
            ([[7, 8, best]], [], [7, 8], second),
            ([[7, 8, best]], [], [9, 7, 8], second),
            ([[7, 8, best]], [], [7, 8, 9], best),
            ([[7, best], [8, best], [6, 8, best]], [], [6, 8], second),  # one that is masked twice
            ([[best, 8]], [], [best], best),
        ]
        lines = [
            Line(Sampling(temperature=0.0, bad_words=words), peaked(), [1, *prompt], output)
            for words, prompt, output, _ in cases
        ]
        assert sample(lines, size)[0] == [expected for *_, expected in cases]

    def test_bias_does_not_bring_back_what_is_not_allowed(self, size: int) -> None:
        assert sample([Line(Sampling(allowed_token_ids=[3], logit_bias={777: 100.0}), peaked())], size)[0] == [3]

    def test_top_p_holds_for_the_mass_that_min_p_leaves(self, size: int) -> None:
        """Three tokens of e**5 against 997 of 1: without the many, two of the three hold half of the mass."""
        logits = flat()
        logits[[5, 650, 999]] = 5.0
        lines = [Line(Sampling(min_p=0.5, top_p=0.5, seed=seed), logits) for seed in range(40)]
        assert set(sample(lines, size)[0]) == {5, 650}

    def test_repetition_makes_unlikely_tokens_unlikelier(self, size: int) -> None:
        """A negative logit is multiplied: -1 becomes -3, below the -2 of all others."""
        logits = flat() - 2.0
        logits[1] = -1.0
        greedy = Sampling(temperature=0.0, repetition_penalty=3.0)
        assert sample([Line(greedy, logits, prompt=[1]), Line(greedy, logits, prompt=[2])], size)[0] == [0, 1]

    def test_stop_tokens_are_masked_until_min_tokens_were_generated(self, size: int) -> None:
        logits = flat()
        logits[800], logits[801], logits[20] = 50.0, 40.0, 30.0
        sampling = Sampling(min_tokens=3, stop_token_ids=[800, 801])
        lines = [Line(sampling, logits, output=[7] * num_generated) for num_generated in range(5)]
        assert sample(lines, size)[0] == [20, 20, 20, 800, 800]

    def test_impossible_tokens_are_never_drawn(self, size: int) -> None:
        logits = np.full(VOCAB, -1e30, np.float32)
        logits[[4, 650]] = 0.0
        for kind in (Sampling(), Sampling(top_p=0.99), Sampling(top_k=500), Sampling(min_p=1e-9)):
            lines = [Line(msgspec.structs.replace(kind, seed=seed), logits) for seed in range(30)]
            assert set(sample(lines, size)[0]) == {4, 650}

    def test_with_nothing_left_every_rank_knows(self, size: int) -> None:
        kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.5}]
        kinds.append({"top_n_sigma": 1.0})
        nothing: dict[str, Any] = {"allowed_token_ids": [720], "stop_token_ids": [720], "min_tokens": 1}
        lines = [Line(Sampling(**kind, **others), flat()) for kind in kinds for others in (nothing, {})]
        tokens = sample(lines, size, masked=range(0, len(lines), 2))[0]
        assert tokens[1::2] == sample(lines[1::2], size)[0]

    @pytest.mark.parametrize("where", [0, 5, 650, 720, 999])
    @pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, -np.inf])
    def test_broken_logits_are_noticed_by_every_rank(self, size: int, where: int, broken: float) -> None:
        """One is enough, wherever it is and whatever masks it; rows beside it draw what they would have drawn."""
        kinds = [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.9), Sampling(top_k=9), Sampling(min_p=0.5)]
        kinds += [Sampling(allowed_token_ids=[1]), Sampling(logprobs=2), Sampling(top_n_sigma=1.0)]
        logits = peaked()
        logits[where] = broken
        well = [Line(kind, peaked(1)) for kind in kinds]
        both = [line for kind, good in zip(kinds, well, strict=True) for line in (Line(kind, logits), good)]
        tokens, _ = sample(both, size, odd=range(0, len(both), 2))
        assert tokens[1::2] == sample(well, size)[0]
        assert all(0 <= token < VOCAB for token in tokens)

    def test_the_largest_logits_are_finite_though_their_sum_is_not(self, size: int) -> None:
        logits = np.full(VOCAB, np.finfo(np.float32).max, np.float32)
        assert sample([Line(Sampling(temperature=0.0), logits)] * 2, size)[0] == [0, 0]

    def test_a_nucleus_wider_than_the_candidates_is_drawn_from_whole_shards(self, size: int) -> None:
        """A flat distribution at top-p 0.9 keeps 900 tokens, far more than the ranks offer at first."""
        lines = [Line(Sampling(top_p=0.9, seed=seed), flat()) for seed in range(300)]
        tokens = sample(lines, size)[0]
        assert max(tokens) < 900
        assert max(tokens) > 850  # misses with probability (850 / 900) ** 300 < 1e-7, and the seeds are fixed

    def test_a_top_k_wider_than_the_candidates_counts_over_all_ranks(self, size: int) -> None:
        tokens = sample([Line(Sampling(top_k=900, seed=seed), flat()) for seed in range(300)], size)[0]
        assert 850 < max(tokens) < 900

    def test_top_p_holds_for_the_mass_within_a_top_k_wider_than_the_candidates(self, size: int) -> None:
        """Half the mass of the top 600 is 300 tokens; of the whole vocabulary it would be 500."""
        tokens = sample([Line(Sampling(top_k=600, top_p=0.5, seed=seed), flat()) for seed in range(300)], size)[0]
        assert 280 < max(tokens) < 300


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_request_draws_the_same_token_alone_and_among_any_others(size: int) -> None:
    rng = np.random.default_rng(7)
    lines = [random_line(rng) for _ in range(24)]
    together = sample(lines, size)[0]
    assert [sample([line], size)[0][0] for line in lines] == together
    assert sample(lines[::-1], size)[0] == together[::-1]


def test_a_row_with_top_n_sigma_is_not_left_to_the_kernel_of_plain_rows_unless_it_is_greedy() -> None:
    table = SamplingTable(4, range(VOCAB), torch.device("cpu"))
    table.set({0: Sampling(), 1: Sampling(top_n_sigma=1.0), 2: Sampling(temperature=0.0, top_n_sigma=1.0)})
    assert table.lines_not_plain(np.arange(3)).tolist() == [1]


def test_seeds_of_64_bits_and_positions_make_a_difference() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    tokens = sample([Line(Sampling(seed=seed), flat()) for seed in seeds])[0]
    assert len(set(tokens)) == len(seeds)
    at_positions = sample([Line(Sampling(seed=2**64 - 1), flat(), output=[0] * n) for n in range(7)])[0]
    assert len(set(at_positions)) >= 6  # two of seven draws from 1000 tokens may be equal
    assert at_positions[0] == tokens[-1]


def test_what_stands_behind_the_tokens_of_a_row_is_not_penalised() -> None:
    """The table's rows are filled with token 5 behind the tokens of their requests."""
    logits = flat()
    logits[5] = 1.0
    assert sample([Line(Sampling(temperature=0.0, repetition_penalty=100.0), logits)])[0] == [5]


def reference_logprobs(logits: Array, token: int, num: int) -> TokenLogprobs:
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    top = np.lexsort((np.arange(len(logits)), -logits))[:num]
    ids = [token, *(int(x) for x in top)]
    return TokenLogprobs(ids, [float(logprobs[i]) for i in ids], 1 + int((logits > logits[token]).sum()))


def assert_same_logprobs(ours: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert ours.token_ids == expected.token_ids
    assert ours.rank == expected.rank
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("size", [1, 2, 3])
def test_logprobs_are_of_the_raw_logits_for_the_rows_that_ask(size: int) -> None:
    rng = np.random.default_rng(3)
    lines = [random_line(rng) for _ in range(20)]
    for index, num in ((1, 0), (4, 5), (5, 20), (19, 3), (7, 2000)):
        lines[index].sampling = msgspec.structs.replace(lines[index].sampling, logprobs=num)
    tokens, logprobs = sample(lines, size)
    assert sorted(logprobs) == [1, 4, 5, 7, 19]
    for index, ours in logprobs.items():
        asked = lines[index].sampling.logprobs
        assert asked is not None
        assert_same_logprobs(ours, reference_logprobs(lines[index].logits, tokens[index], asked))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num", [0, 4, 2000])
def test_prompt_logprobs_equal_the_log_softmax_of_the_whole_vocabulary(size: int, num: int) -> None:
    rng = np.random.default_rng(num)
    logits = np.round(rng.standard_normal((9, VOCAB)) * 4, 1).astype(np.float32)
    targets = rng.integers(0, VOCAB, 9)

    def work(tp: TPGroup) -> list[TokenLogprobs]:
        shard = SHARDS[size][tp.rank]
        sampler = ReferenceSampler(SamplingTable(1, shard, torch.device("cpu")), shard, VOCAB, tp)
        whole = torch.from_numpy(logits)
        scored = sampler.prompt_logprobs(whole[:, shard.start : shard.stop], torch.from_numpy(targets), num)
        return scored.to_messages()

    results = on_ranks(size, work)
    assert all(result == results[0] for result in results)
    for ours, line, target in zip(results[0], logits, targets, strict=True):
        assert_same_logprobs(ours, reference_logprobs(line, int(target), num))
