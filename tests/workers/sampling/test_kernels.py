"""Drawing plain rows in one kernel against the sampler in PyTorch, and a worker that decodes with it."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import pytest
import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling
from eagleray.workers.sampling.gumbel import log_exponential, mixed_seed, random_bits, row_keys
from eagleray.workers.sampling.packed_pairs import marks_of, pack, unpack, unpack_ids
from eagleray.workers.sampling.reference import ReferenceSampler
from eagleray.workers.sampling.table import SamplingTable
from support.interpreter import DEVICE, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CPU = torch.device("cpu")
FIRST_ID = 300  # of the shard; nothing may depend on its being 0

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    import triton
    import triton.language as tl

    from eagleray.workers.sampling import kernels
    from eagleray.workers.sampling.kernels import best_plain_pairs

    @triton.jit
    def noise_kernel(seeds, positions, bits, logs, first_id, num: tl.constexpr):
        line = tl.program_id(0)
        key = kernels.row_key(tl.load(seeds + line), tl.load(positions + line))
        columns = tl.arange(0, num)
        x = kernels.random_bits(key, first_id + columns)
        tl.store(bits + line * num + columns, x.to(tl.int32, bitcast=True))
        tl.store(logs + line * num + columns, kernels.log_exponential(x))

    @triton.jit
    def log_exponential_kernel(bits, logs, num: tl.constexpr):
        columns = tl.arange(0, num)
        tl.store(logs + columns, kernels.log_exponential(tl.load(bits + columns)))

    @triton.jit
    def tanh_kernel(x, y, num: tl.constexpr):
        columns = tl.arange(0, num)
        tl.store(y + columns, kernels.tanh(tl.load(x + columns)))

    def test_noise_has_the_same_bits_and_nearly_the_same_logarithms() -> None:
        seeds = torch.tensor([mixed_seed(seed) for seed in (0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1)])
        positions = torch.tensor([0, 1, 4095, 2**31 - 1, 7, 131_071])
        first_id, num = 127_000, 4096
        bits = torch.zeros(len(seeds), num, dtype=torch.int32, device=DEVICE)
        logs = torch.zeros(len(seeds), num, device=DEVICE)
        noise_kernel[(len(seeds),)](seeds.to(DEVICE), positions.to(DEVICE), bits, logs, first_id, num)
        token_ids = torch.arange(first_id, first_id + num, dtype=torch.int32).unsqueeze(0)
        keys = row_keys(seeds, positions)
        assert torch.equal(bits.cpu(), random_bits(keys, token_ids))
        torch.testing.assert_close(logs.cpu(), log_exponential(keys, token_ids), rtol=1e-6, atol=5e-7)

    def test_logarithms_of_the_smallest_and_largest_noise() -> None:
        """Against float64: all random numbers at both ends, and some between."""
        ends = torch.cat([torch.arange(512), 2**31 - 1 - torch.arange(512), torch.arange(3072) * 699_050])
        logs = torch.zeros(4096, device=DEVICE)
        log_exponential_kernel[(1,)](ends.int().to(DEVICE), logs, 4096)
        # u is rounded to float32 before any logarithm, which below 1 is a step of 2**-24
        u = ((ends.float() + 0.5) * (2.0**-31 * (1 - 2.0**-24))).double()
        torch.testing.assert_close(logs.cpu().double(), (-torch.log1p(-u)).log(), rtol=5e-7, atol=5e-7)

    def test_the_hyperbolic_tangent_is_accurate_near_zero_and_far_from_it() -> None:
        x = torch.cat([torch.linspace(-12, 12, 2048), torch.linspace(-0.2, 0.2, 2046), torch.tensor([-400.0, 400.0])])
        y = torch.zeros(4096, device=DEVICE)
        tanh_kernel[(1,)](x.to(DEVICE), y, 4096)
        torch.testing.assert_close(y.cpu().double(), torch.tanh(x.double()), rtol=1e-6, atol=0)

    def draw(logits: Tensor, samplings: list[Sampling], soft_cap: float | None = None, offset: int = 0) -> Tensor:
        """Pairs [n] by the kernel. Rows are in falling order, and lines stand further apart than they are long."""
        num_lines, shard = logits.shape
        table = SamplingTable(num_lines, range(FIRST_ID, FIRST_ID + shard), DEVICE)
        rows = list(range(num_lines))[::-1]
        for row, sampling in zip(rows, samplings, strict=True):
            table.set({row: sampling})
        apart = torch.full((num_lines, shard + 13), torch.inf, dtype=logits.dtype)
        apart[:, :shard] = logits
        return best_plain_pairs(
            apart.to(DEVICE)[:, :shard],
            torch.tensor(rows, device=DEVICE),
            torch.arange(offset, offset + num_lines, dtype=torch.int32, device=DEVICE),
            table.temperatures,
            table.seeds,
            FIRST_ID,
            soft_cap,
        ).cpu()

    def expected_ids(logits: Tensor, samplings: list[Sampling], offset: int = 0) -> list[int]:
        num_lines, shard = logits.shape
        vocab_shard = range(FIRST_ID, FIRST_ID + shard)
        table = SamplingTable(num_lines, vocab_shard, CPU)
        for row, sampling in enumerate(samplings):
            table.set({row: sampling})
        sampler = ReferenceSampler(table, vocab_shard, FIRST_ID + shard, TPGroup())
        rows, num_tokens = list(range(num_lines)), list(range(offset, offset + num_lines))
        tokens = torch.zeros(num_lines, 1, dtype=torch.int32)
        return sampler(logits.float(), rows, tokens, [1] * num_lines, num_tokens).token_ids.tolist()

    def some_logits(num_lines: int, shard: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        return (3 * torch.randn(num_lines, shard, generator=torch.Generator().manual_seed(seed))).to(dtype)

    @pytest.mark.parametrize(
        ("dtype", "shard"),
        [
            (torch.bfloat16, 1),
            (torch.bfloat16, 127),
            (torch.float16, 1000),
            (torch.float32, 1000),
            (torch.bfloat16, 4099),
        ],
    )
    def test_tokens_are_those_of_the_sampler(dtype: torch.dtype, shard: int) -> None:
        temperatures = [0.0, 1.0, 1e-3, 0.3, 10.0, 1.7, 1.0, 9e-6]
        samplings = [Sampling(temperature=t, seed=seed * 2**61) for seed, t in enumerate(temperatures)]
        logits = some_logits(len(samplings), shard, dtype)  # with many ties in 16 bits
        logits[-2:] = 0.5  # one draws any token, the other is as good as greedy
        for offset in (1, 70_000):
            ids = unpack_ids(draw(logits, samplings, offset=offset)).tolist()
            assert ids == expected_ids(logits, samplings, offset)

    @pytest.mark.parametrize("num_lines", [1, 3, 40])
    def test_however_the_work_is_cut(num_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One tile a program, or several."""
        samplings = [Sampling(temperature=float(line % 2), seed=line) for line in range(num_lines)]
        logits = some_logits(num_lines, 2500, torch.float32).clamp(max=2.0)  # greedy rows have many ties
        expected = expected_ids(logits, samplings)
        for enough in (1, 2048):
            monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", enough)
            assert unpack_ids(draw(logits, samplings)).tolist() == expected

    def test_pairs_of_odd_values_are_those_of_pack() -> None:
        """Ties, zeros of both signs, the largest and the smallest: the very same integers for greedy rows."""
        logits = some_logits(6, 1100, torch.float32)
        logits[0] = torch.finfo(torch.float32).min
        logits[1] = 0.0
        logits[1, :500] = -0.0
        logits[2, 700] = torch.finfo(torch.float32).max
        logits[3, [3, 1050]] = 99.0
        logits[4] = 1e-45
        pairs = draw(logits, [Sampling(temperature=0.0)] * 6)
        token_ids = torch.arange(FIRST_ID, FIRST_ID + 1100, device=DEVICE)
        assert torch.equal(pairs, pack(logits.to(DEVICE), token_ids).amax(dim=1).cpu())

    @pytest.mark.parametrize("soft_cap", [None, 30.0])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_lines_with_a_logit_that_is_not_finite_are_marked(temperature: float, soft_cap: float | None) -> None:
        broken = torch.tensor([torch.nan, torch.nan, torch.inf, -torch.inf, 0.0])
        broken[1].neg_()
        broken[4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # the NaN that is the lowest integer
        logits = some_logits(len(broken) * 4, 1100, torch.float32)
        for line, column in enumerate([0, 255, 700, 1099] * len(broken)):
            if column != 255:  # every fourth line stays as it is
                logits[line, column] = broken[line // 4]
        pairs = draw(logits, [Sampling(temperature=temperature)] * len(logits), soft_cap)
        assert (marks_of(pairs) == pairs).tolist() == [True, False, True, True] * len(broken)
        assert all(FIRST_ID <= token_id < FIRST_ID + 1100 for token_id in unpack_ids(pairs).tolist())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_logits_are_capped_first(dtype: torch.dtype) -> None:
        samplings = [Sampling(temperature=t, seed=seed) for seed, t in enumerate([0.0, 0.0, 1.0, 2.0, 0.2])]
        logits = 20 * some_logits(5, 1100, dtype)
        capped = torch.tanh(logits.float() / 30.0) * 30.0
        values, ids = unpack(draw(logits, samplings, 30.0))
        assert ids.tolist() == expected_ids(capped, samplings)
        torch.testing.assert_close(values[:2], capped[:2].amax(dim=1), rtol=1e-6, atol=0)
