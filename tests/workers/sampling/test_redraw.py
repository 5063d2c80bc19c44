"""Restricted rows drawn in kernels: exactly the tokens, and exactly the sets, of the sampler in PyTorch."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling
from eagleray.workers.sampling.masses import token_masses
from eagleray.workers.sampling.packed_pairs import NOT_FINITE, PAD, pack, top_pairs
from eagleray.workers.sampling.table import Feature
from eagleray.workers.sampling.top_k_top_p import TopKTopP, find_thresholds
from support.interpreter import DEVICE, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    import triton
    import triton.language as tl

    from eagleray.workers.sampling import kernel_sampler
    from eagleray.workers.sampling.redraw import arithmetic
    from support.redraw import CPU, Kernels, Line, assert_same, by_reference, filled_table, small

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        small(monkeypatch)

    @triton.jit
    def mass_kernel(values, masses, highest, num: tl.constexpr):
        lanes = tl.arange(0, num)
        tl.store(masses + lanes, arithmetic.token_masses(tl.load(values + lanes), tl.load(highest)))

    def test_masses_are_the_same_integers() -> None:
        odd = [0.0, -0.0, 1e-38, 1e-45, 31.19, 31.2, 43.66, 43.67, 62.0, 1e10, 3e38, torch.inf]
        distances = torch.cat([torch.linspace(0, 50, 4084, dtype=torch.float64).float(), torch.tensor(odd)])
        for highest in (0.0, 12.34567, -3.0, 1e-20, 3e38, -torch.inf):
            values = highest - distances
            masses = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
            most = torch.tensor([highest])
            mass_kernel[(1,)](values.to(DEVICE), masses, most.to(DEVICE), 4096, **{"enable_fp_fusion": False})
            assert torch.equal(masses.cpu(), token_masses(values.unsqueeze(0), most.unsqueeze(0))[0])

    def noise(num: int, seed: int = 0, scale: float = 3.0) -> Tensor:
        return torch.randn(num, generator=torch.Generator().manual_seed(seed)) * scale

    def kept_by_reference(line: Line) -> Tensor:
        """Which tokens may be drawn [vocab], of a line without edits."""
        s, vocab = line.sampling, len(line.logits)
        table = filled_table([line], CPU)
        values = (line.logits.float() / torch.tensor(s.temperature)).unsqueeze(0)
        top_k = s.top_k or 2**31 - 1
        restriction = TopKTopP(table.log_min_p[:1], table.top_k[:1], table.top_p[:1], top_k, s.min_p > 0)
        cuts, _ = find_thresholds(values, top_pairs(values, 0, vocab + 1), restriction, TPGroup())
        return pack(values[0], torch.arange(vocab)) >= cuts

    def assert_same_sets(lines: list[Line]) -> None:
        """All tokens at or above the cut, of restricted lines without edits; and the tokens drawn."""
        kernels = Kernels(lines)
        drawn = kernels.draw()
        assert drawn.token_ids == by_reference(lines).token_ids
        for index, line in enumerate(lines):
            values = line.logits.float() / torch.tensor(line.sampling.temperature)
            kept = pack(values, torch.arange(len(values))) >= kernels.sampler.cuts[index].cpu()
            assert torch.equal(kept, kept_by_reference(line)), line.sampling

    VOCABS = [50, 200]  # candidates hold all of the first
    RESTRICTED: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 33},  # of 64 lanes, more than half
        {"top_k": 1000},
        {"top_p": 1e-300},
        {"top_p": 0.3, "temperature": 0.7},
        {"top_p": 0.9},
        {"top_p": 0.9999999},
        {"top_k": 9, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 150, "top_p": 0.95, "temperature": 3.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 0.5, "min_p": 0.2, "temperature": 0.3},
        {"top_k": 5, "min_p": 1.0},
    ]

    @pytest.mark.parametrize(("vocab", "step"), [(50, 0.25), (200, 0.0), (200, 0.25), (200, 2.0)])
    def test_each_restriction(vocab: int, step: float) -> None:
        lines = []
        for index, kind in enumerate(RESTRICTED):
            logits = noise(vocab, index)
            logits = (logits / step).round() * step if step else logits
            lines.append(Line(Sampling(seed=index, **kind), logits.to(torch.bfloat16 if step else torch.float32)))
        assert_same_sets(lines)

    @pytest.mark.parametrize("kind", [{"top_k": 3}, {"top_k": 40}, {"top_p": 0.5}, {"top_k": 90, "top_p": 0.7}])
    @pytest.mark.parametrize("vocab", VOCABS)
    def test_where_all_are_equal_the_lower_ids_stay(kind: dict[str, Any], vocab: int) -> None:
        lines = [
            Line(Sampling(seed=seed, **kind), torch.full((vocab,), value)) for seed, value in enumerate([-7.0, 0.0])
        ]
        assert_same_sets(lines)

    def test_a_few_among_tokens_that_are_as_good_as_impossible() -> None:
        logits = torch.full((200,), -1e30)
        logits[[4, 150]] = 1.0
        assert_same_sets([Line(Sampling(seed=seed, **kind), logits) for seed, kind in enumerate(RESTRICTED[2:8])])

    def test_top_p_keeps_the_token_that_begins_below_the_limit_and_not_the_one_that_begins_at_it() -> None:
        """Two equal tokens hold all mass. The second begins at half of it, less than a limit that is rounded up."""
        logits = torch.full((60,), -100.0)
        logits[[20, 40]] = 3.0
        lines = [Line(Sampling(top_p=top_p, seed=seed), logits) for seed in range(8) for top_p in (0.5, 0.5 + 2.0**-50)]
        assert_same_sets(lines)
        drawn = Kernels(lines).draw().token_ids
        assert (set(drawn[::2]), set(drawn[1::2])) == ({20}, {20, 40})

    def test_min_p_alone_needs_no_cut() -> None:
        """Three tokens of e**2 against 97 of 1; the noise would often prefer one of the many."""
        logits = torch.zeros(100)
        logits[[5, 50, 99]] = 2.0
        lines = [Line(Sampling(min_p=min_p, seed=seed), logits) for seed in range(8) for min_p in (0.5, 0.1)]
        drawn = assert_same(lines).token_ids
        assert set(drawn[::2]) <= {5, 50, 99}
        assert len(set(drawn[1::2]) - {5, 50, 99}) > 2

    values = st.sampled_from([-torch.inf, -1e30, -60.0, -4.0, -0.125, -0.0, 0.0, 1e-40, 0.1, 0.125, 3.0, 3.0625, 29.5])

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_sets_of_any_values(data: st.DataObject) -> None:
        vocab = data.draw(st.integers(1, 130), "vocab")
        logits = torch.tensor(data.draw(st.lists(values, min_size=vocab, max_size=vocab)))
        logits[data.draw(st.integers(0, vocab - 1))] = data.draw(st.floats(-20, 20, width=32))
        allowed = logits > -torch.inf  # by a mask, since a raw logit must be finite
        sampling = Sampling(
            temperature=data.draw(st.sampled_from([0.01, 0.7, 1.0, 50.0])),
            top_k=data.draw(st.integers(0, vocab + 1)),
            top_p=data.draw(st.sampled_from([1e-9, 0.2, 0.9, 1 - 1e-12])),
            min_p=data.draw(st.sampled_from([0.0, 1e-9, 0.3, 1.0])),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            allowed_token_ids=allowed.nonzero().flatten().tolist(),
        )
        kernels = Kernels([Line(sampling, logits.masked_fill(~allowed, 5.0))])
        drawn = kernels.draw()
        masked = logits / torch.tensor(sampling.temperature)
        kept = pack(masked, torch.arange(vocab)) >= kernels.sampler.cuts[0].cpu()
        assert torch.equal(kept, kept_by_reference(Line(sampling, logits)))
        assert bool(kept[drawn.token_ids[0]])

    KINDS: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6},
        {"min_p": 0.1},
        {"top_k": 3},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_n_sigma": 1.0},
        {"top_n_sigma": 0.7, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
    ]

    def test_with_nothing_left_the_pair_says_so() -> None:
        nothing: dict[str, Any] = {"allowed_token_ids": [120], "stop_token_ids": [120], "min_tokens": 1}
        one: dict[str, Any] = {"allowed_token_ids": [120]}
        lines = [Line(Sampling(seed=3, **kind, **some), noise(200)) for kind in KINDS for some in (nothing, one)]
        drawn = assert_same(lines)
        assert drawn.all_masked == [True, False] * len(KINDS)
        assert drawn.token_ids[1::2] == [120] * len(KINDS)

    @pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
    def test_broken_logits_are_marked_whatever_masks_them(broken: float) -> None:
        """One is enough, in any tile; lines beside it draw what they would have drawn."""
        logits = noise(200)
        logits[{torch.inf: 0, -torch.inf: 199}.get(broken, 77)] = broken
        kinds = [kind | {"allowed_token_ids": [5, 6]} for kind in KINDS[::3]]
        lines = [Line(Sampling(seed=2, **kind), each) for kind in kinds for each in (logits, noise(200, 1))]
        assert assert_same(lines).not_finite == [True, False] * len(kinds)

    def test_a_line_that_is_marked_already_stays_marked() -> None:
        kernels = Kernels([Line(Sampling(top_k=3), noise(50)), Line(Sampling(top_k=3), noise(50))])
        marks = torch.tensor([(NOT_FINITE << 32) + 0xFFFFFFFF - 17, PAD], device=DEVICE)
        raw, rows, lengths = kernels.inputs()
        kernels.sampler.redraw(raw, rows, lengths, marks)
        assert (int(marks[0]) >> 32, int(marks[1]) >> 32 == NOT_FINITE) == (NOT_FINITE, False)
        assert kernels.tokens[kernels.rows[0], lengths[0]] == 17

    def test_plain_rows_are_left_alone_and_rows_beyond_the_tables_too() -> None:
        long = Sampling(seed=1, bad_words=[[1] * 2000, [3]])
        kinds = [
            Sampling(),
            Sampling(top_k=5),
            Sampling(logprobs=2),
            long,
            Sampling(temperature=0.0),
            Sampling(min_p=0.1),
        ]
        kernels = Kernels([Line(kind, noise(200, seed)) for seed, kind in enumerate(kinds)])
        raw, rows, lengths = kernels.inputs()
        pairs = torch.arange(6, device=DEVICE)
        kernels.sampler.redraw(raw, rows, lengths, pairs, kernels.sampler.features(np.array(kernels.rows)))
        assert (pairs == torch.arange(6, device=DEVICE)).tolist() == [True, False, True, True, True, False]
        new = kernels.tokens[rows, lengths.long()].tolist()
        assert [token == 1 for token in new] == [True, False, True, True, True, False]
        assert kernels.sampler.beyond(np.array(kernels.rows)).tolist() == [3]

    def test_who_asks_for_nothing_launches_nothing() -> None:
        kernels = Kernels(
            [Line(kind, noise(50)) for kind in (Sampling(), Sampling(logprobs=2), Sampling(temperature=0.0))]
        )
        assert not kernels.sampler.features(np.array(kernels.rows))
        assert not kernels.sampler.features(np.empty(0, np.int64))

    def test_more_lines_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_sampler, "LINES_AT_ONCE", 2)
        monkeypatch.setattr(kernel_sampler, "SCORED_AT_ONCE", 2)
        kinds: list[dict[str, Any]] = [
            {"top_k": 4},
            {"top_p": 0.4},
            {"repetition_penalty": 1.5},
            {"min_p": 0.3},
            {"top_p": 0.9},
        ]
        lines = [Line(Sampling(seed=9, logprobs=1, **kind), noise(200, seed)) for seed, kind in enumerate(kinds)]
        drawn = assert_same(lines)
        assert [drawn.logprobs[line].token_ids[0] for line in range(5)] == drawn.token_ids

    def test_draws_follow_the_softmax_of_what_is_kept() -> None:
        """100 draws, at positions in a row; of the five likeliest tokens four hold 0.93."""
        logits = -0.5 * torch.arange(12.0)
        lines = [Line(Sampling(seed=7, top_k=5, top_p=0.93), logits, [1], [2] * place) for place in range(100)]
        counts = np.bincount(Kernels(lines).draw(Feature.RESTRICTED).token_ids, minlength=12)
        expected = 100 * torch.softmax(logits[:4].double(), dim=0).numpy()
        assert counts[4:].sum() == 0
        assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # exceeded by one seed in a thousand
