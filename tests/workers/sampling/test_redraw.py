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
from eagleray.workers.sampling.top_k_top_p import TopKTopP, find_thresholds
from support.interpreter import DEVICE, RUNS_KERNELS, interpret_faster, run_in_interpreter

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    import triton
    import triton.language as tl

    from eagleray.workers.sampling import kernel_sampler
    from eagleray.workers.sampling.redraw import arithmetic
    from support.redraw import CPU, Kernels, Line, assert_same, by_reference, filled_table, rows_of, small

    interpret_faster()

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
            mass_kernel[(1,)](
                values.to(DEVICE), masses, most.to(DEVICE), 4096, **{"enable_fp_fusion": False}
            )
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
    MOST_TIES = [0.0, 0.25, 2.0]  # steps of logits

    @pytest.mark.parametrize("vocab", VOCABS)
    @pytest.mark.parametrize("step", MOST_TIES)
    def test_each_restriction(vocab: int, step: float) -> None:
        lines = []
        for index, kind in enumerate(RESTRICTED):
            logits = noise(vocab, index)
            logits = (logits / step).round() * step if step else logits
            lines.append(Line(Sampling(seed=index, **kind), logits.to(torch.bfloat16 if step else torch.float32)))
        assert_same_sets(lines)
