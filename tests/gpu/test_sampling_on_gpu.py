"""Kernels that draw rows with options, on a GPU: the tokens of the plain reference, which runs there, too."""

from typing import Any

import pytest
import torch

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import Sampling
from eagleray.workers.sampling.reference import ReferenceSampler
from eagleray.workers.sampling.table import SamplingTable
from support.gpu import needs_gpus

if torch.cuda.is_available():
    from eagleray.workers.sampling.kernel_sampler import KernelSampler
    from eagleray.workers.sampling.kernels import best_plain_pairs
    from eagleray.workers.sampling.packed_pairs import unpack_ids

pytestmark = needs_gpus(1)

DEVICE = torch.device("cuda", 0)
MAX_LEN = 600
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000, "temperature": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"top_k": 50, "top_p": 0.95},
    {"top_k": 100_000, "top_p": 0.5, "temperature": 1.5},
    {"min_p": 0.05},
    {"min_p": 0.02, "top_p": 0.9, "top_k": 200},
    {"top_n_sigma": 1.5},
    {"top_n_sigma": 3.0, "top_p": 0.9, "temperature": 2.0},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.9},
    {"logit_bias": {3: 5.0, 77: -100.0, 4999: 2.5}},
    {"logit_bias": {11: 4.0}, "temperature": 0.0, "repetition_penalty": 0.8},
    {"allowed_token_ids": [1, 2, 3, 999, 4999]},
    {"min_tokens": 500, "stop_token_ids": [5, 6, 7], "top_p": 0.8},
    {"bad_words": [[9], [4, 5], [1, 2, 3]]},
    {"logprobs": 0},
    {"logprobs": 5, "top_p": 0.9},
    {"logprobs": 20, "temperature": 0.0},
]


@pytest.mark.parametrize("vocab", [5000, 128_256])
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_are_the_references(vocab: int, spread: float, dtype: torch.dtype) -> None:
    """Logits without any spread are all equal; in bfloat16 many are."""
    num_rows = 3 * len(OPTIONS)
    generator = torch.Generator(DEVICE).manual_seed(vocab)
    raw = (spread * torch.randn(num_rows, vocab, generator=generator, device=DEVICE)).to(dtype)
    tokens = torch.randint(0, 5000, (num_rows + 1, MAX_LEN), generator=generator, device=DEVICE, dtype=torch.int32)
    tokens[::2] %= 7  # many of the same
    rows = torch.randperm(num_rows, generator=generator, device=DEVICE)
    samplings = {row: Sampling(**{"seed": row} | OPTIONS[row % len(OPTIONS)]) for row in range(num_rows)}
    num_prompt_tokens = [10 + row % 50 for row in range(num_rows)]
    num_tokens = [num_prompt_tokens[row] + 37 * row % 500 for row in range(num_rows)]
    table = SamplingTable(num_rows, range(vocab), DEVICE)
    table.set(samplings)
    kernels = KernelSampler(table, vocab, num_rows, tokens)
    kernels.set(samplings, dict(enumerate(num_prompt_tokens)))
    order = rows.tolist()
    lengths = torch.tensor([num_tokens[row] for row in order], dtype=torch.int32, device=DEVICE)
    reference = ReferenceSampler(table, range(vocab), vocab, TPGroup())
    expected = reference(
        raw.float().clone(), order, tokens, [num_prompt_tokens[row] for row in order], lengths.tolist()
    )
    expected_ids, expected_logprobs = expected.token_ids.tolist(), expected.logprobs
    pairs = best_plain_pairs(raw, rows, lengths, table.temperatures, table.seeds, 0)
    kernels.redraw(raw, rows, lengths, pairs)
    drawn = unpack_ids(pairs).tolist()
    wrong = [
        (order[line], OPTIONS[order[line] % len(OPTIONS)])
        for line in range(num_rows)
        if drawn[line] != expected_ids[line]
    ]
    assert not wrong
    kernels.logprobs(raw, rows, pairs)
    found = kernels.found_logprobs(slice(len(rows)))
    for line, row in enumerate(order):
        if row not in expected_logprobs:
            continue
        (entry,) = expected_logprobs[row]
        count = len(entry.token_ids)
        assert found.token_ids[line, :count].tolist() == entry.token_ids
        assert found.ranks[line].item() == entry.rank
        torch.testing.assert_close(found.logprobs[line, :count].cpu(), torch.tensor(entry.logprobs), atol=2e-5, rtol=0)
