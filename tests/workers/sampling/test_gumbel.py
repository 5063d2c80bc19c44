"""The parts of the sampler that have no vocabulary shards: pairs, noise, and the distribution of what is drawn."""

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling
from eagleray.workers.sampling.gumbel import add_gumbel_, mixed_seed, random_bits, row_keys
from eagleray.workers.sampling.packed_pairs import PAD, best_pairs, pack, top_pairs, unpack
from eagleray.workers.sampling.reference import ReferenceSampler
from eagleray.workers.sampling.table import SamplingTable


def ids(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32).unsqueeze(0)


def some_keys(num: int) -> Tensor:
    """Keys of neighbouring seeds and positions, the likeliest to be related."""
    seeds = torch.tensor([mixed_seed(i // 64) for i in range(num)])
    return row_keys(seeds, torch.arange(num) % 64)


def chi_square(counts: np.ndarray[tuple[int], np.dtype[np.float64]], expected: object) -> float:
    """How many standard deviations Pearson's statistic lies from its mean (Wilson and Hilferty's approximation)."""
    expectation = np.broadcast_to(np.asarray(expected, dtype=np.float64), counts.shape)
    freedom = len(counts) - 1
    statistic = ((counts - expectation) ** 2 / expectation).sum()
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))


def test_pairs_order_by_value_then_by_lower_id_and_come_back() -> None:
    values = torch.tensor([-torch.inf, -3.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, 2.0, 3e38, torch.inf])
    token_ids = torch.tensor([9, 0, 8, 4, 5, 7, 150_000, 2**32 - 1, 1, 3])
    pairs = pack(values, token_ids)
    assert pairs.argsort().tolist() == [0, 1, 2, 4, 3, 5, 7, 6, 8, 9]  # of equal values the lower id is the higher pair
    assert int(pairs.min()) > PAD
    back_values, back_ids = unpack(pairs)
    assert torch.equal(back_values, values)
    assert torch.equal(back_ids, token_ids)


@pytest.mark.parametrize("shard", [1, 15, 64, 1000, 5003, 20_000])
@pytest.mark.parametrize("width", [1, 3, 50, 1000])
def test_top_pairs_are_those_of_a_stable_sort(shard: int, width: int) -> None:
    """With ties, and in shards that are and are not large enough to look at groups of columns first."""
    values = np.round(np.random.default_rng(shard + width).standard_normal((5, shard)) * 20).astype(np.float32)
    values[4] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(shard), values.shape), -values))[:, :width]
    top = top_pairs(torch.from_numpy(values), 7, width)
    assert torch.equal(unpack(top[:, :shard])[1], torch.from_numpy(order + 7))
    assert bool((top[:, shard:] == PAD).all())
    assert torch.equal(best_pairs(torch.from_numpy(values), 7), top[:, 0])


def test_a_mixed_seed_uses_all_64_bits() -> None:
    mixed = {mixed_seed(seed) for seed in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)}
    assert len(mixed) == 7
    assert all(-(2**63) <= seed < 2**63 for seed in mixed)


def test_noise_of_a_shard_is_the_part_of_the_whole_noise() -> None:
    keys = some_keys(5)
    whole, whole_bits = add_gumbel_(torch.zeros(5, 70_000), keys, 0), random_bits(keys, ids(0, 70_000))
    for start, stop in ((0, 3), (3, 33_331), (33_331, 70_000)):
        assert torch.equal(random_bits(keys[2:], ids(start, stop)), whole_bits[2:, start:stop])
        part = add_gumbel_(torch.zeros(3, stop - start), keys[2:], start)
        # a logarithm may differ by an ulp between the body and the tail of a vector loop
        torch.testing.assert_close(part, whole[2:, start:stop], rtol=1e-6, atol=1e-6)


def test_noise_is_gumbel_up_to_its_upper_tail() -> None:
    """Quantiles of 13 million draws against exp(-exp(-x)); the last bin expects 13, which 16 bits could not resolve."""
    noise = add_gumbel_(torch.zeros(256, 50_000), some_keys(256), 0).flatten().double().numpy()
    assert np.isfinite(noise).all()
    edges = -np.log(-np.log1p(-np.array([0.999, 0.9, 0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-6])))
    counts = np.histogram(noise, [-np.inf, *edges, np.inf])[0].astype(np.float64)
    expected = len(noise) * -np.diff([1, 0.999, 0.9, 0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 0])
    assert abs(chi_square(counts, expected)) < 4


def test_random_bits_of_neighbouring_ids_positions_and_seeds_are_unrelated() -> None:
    """Top bytes of neighbours, and low with high bytes, fill a 16 by 16 table evenly."""
    bits = random_bits(some_keys(256), ids(0, 4096)).numpy().view(np.uint32)
    high, low = bits >> 28, bits & 15
    neighbours = [(high[:, :-1], high[:, 1:]), (high[:-1], high[1:]), (high[:-64], high[64:]), (high, low)]
    for one, other in neighbours:
        cells = (one * 16 + other).ravel()
        counts = np.bincount(cells, minlength=256).astype(np.float64)
        assert abs(chi_square(counts, len(cells) / 256)) < 4


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), 24),
        (Sampling(temperature=2.5), 24),
        (Sampling(top_k=7), 7),
        (Sampling(min_p=float(np.exp(-0.35 * 9.5))), 10),
        # of the first 12 tokens renormalised, 8 are needed for 0.95
        (Sampling(top_k=12, top_p=0.95), 8),
    ],
)
def test_draws_follow_the_softmax_of_what_is_allowed(sampling: Sampling, allowed: int) -> None:
    """20,480 draws of one seed at successive positions, and of successive seeds, by a chi-square test."""
    logits = -0.35 * torch.arange(24.0)
    probs = torch.softmax(logits.double()[:allowed] / sampling.temperature, dim=0).numpy()
    sampler_rows, steps = 64, 320
    table = SamplingTable(sampler_rows, range(24), torch.device("cpu"))
    sampler = ReferenceSampler(table, range(24), 24, TPGroup())
    tokens = torch.zeros(sampler_rows, 1, dtype=torch.int32)
    rows = list(range(sampler_rows))
    counts = np.zeros(24)
    for row in rows:
        seed = row // 2 if row % 2 else 2**64 - 1 - row
        table.set({row: msgspec.structs.replace(sampling, seed=seed)})
    for step in range(steps):
        drawn = sampler(logits.repeat(sampler_rows, 1), rows, tokens, [1] * sampler_rows, [1 + step] * sampler_rows)
        counts += np.bincount(drawn.token_ids.numpy(), minlength=24)
    assert counts[allowed:].sum() == 0
    assert abs(chi_square(counts[:allowed], probs * counts.sum())) < 4
