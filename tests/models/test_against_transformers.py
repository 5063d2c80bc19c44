"""Small random checkpoints of every family, written by transformers with its special features on, give transformers'
logits and tokens: at any tensor-parallel size, whole or in chunks, and with a prefix that another request computed.

Both sides compute in float32. Weights are scaled so that activations stay near one, and sums of at most a few hundred
products then differ by some 1e-6 with the order of summation; 1e-4 leaves room for several layers of that, while each
feature, left out, changes logits by at least 1e-3.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.random_checkpoint import make_model

pytestmark = pytest.mark.slow

RunRanks = Callable[..., list[Any]]

TOLERANCE = 1e-4
VISIBLE = 1e-3
PREFIX = 8  # tokens that every prompt begins with
WINDOW = 7
NUM_NEW_TOKENS = 16

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"sliding_window": WINDOW, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None, **QWEN_WINDOW},
    "qwen3": {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}, **QWEN_WINDOW},
    "gemma2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 60,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
}
DELIBERATE_ERRORS = [
    ("llama", "no rope scaling"),
    ("llama", "no qkv bias"),
    ("llama", "no output bias"),
    ("llama", "no gate and up bias"),
    ("llama", "no down bias"),
    ("llama", "no last norm"),
    ("mistral", "window one shorter"),
    ("mistral", "window one longer"),
    ("mistral", "no window"),
    ("qwen2", "no qkv bias"),
    ("qwen2", "windows in the other layers"),
    ("qwen2", "window one longer"),
    ("qwen3", "no q norm"),
    ("qwen3", "no k norm"),
    ("qwen3", "no output bias"),
    ("qwen3", "no rope scaling"),
    ("gemma2", "window one shorter"),
    ("gemma2", "window one longer"),
    ("gemma2", "windows in the other layers"),
    ("gemma2", "no attention soft cap"),
    ("gemma2", "no final soft cap"),
    ("gemma2", "scale of the head size"),
    ("gemma2", "no norm after attention"),
    ("gemma2", "no norm before the MLP"),
    ("gemma2", "no norm after the MLP"),
    ("gemma2", "no embedding scale"),
    ("gemma2", "silu for gelu"),
]


class Expected:
    """A checkpoint, and what transformers computes from it."""

    def __init__(self, family: str, path: Path) -> None:
        self.path = str(path)
        self.model = make_model({"model_type": family, **COMMON, **FAMILIES[family]})
        self.model.save_pretrained(path)
        self.prompts = make_prompts()
        self.logits = [self.logits_of(prompt) for prompt in self.prompts]

    @torch.inference_mode()
    def logits_of(self, tokens: list[int]) -> Tensor:
        logits: Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits

    @cached_property
    def answers(self) -> list[list[int]]:
        """To each prompt, greedily."""
        return [self.greedy(prompt, NUM_NEW_TOKENS) for prompt in self.prompts]

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Every token from scratch, so that no state of transformers comes in."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(int(self.logits_of(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def make_prompts() -> list[list[int]]:
    """Of 33, 12, 21 and 9 tokens, with a common prefix."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(0, COMMON["vocab_size"], (4, 33), generator=generator)
    draw[:, :PREFIX] = draw[0, :PREFIX]
    return [row[:length].tolist() for row, length in zip(draw, (33, 12, 21, 9), strict=True)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Expected]:
    made: dict[str, Expected] = {}

    def make(family: str) -> Expected:
        if family not in made:
            made[family] = Expected(family, tmp_path_factory.mktemp("checkpoint"))
        return made[family]

    return make


def largest_difference(shards: list[list[Tensor]], expected: list[Tensor]) -> float:
    """Of every prompt's logits, put together from the ranks' shards of the vocabulary."""
    whole = [torch.cat(parts, dim=-1) for parts in zip(*shards, strict=True)]
    assert [x.shape for x in whole] == [x.shape for x in expected]
    return max(float((x - y).abs().max()) for x, y in zip(whole, expected, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_whole_prompts(
    family: str, size: int, expected: Callable[[str], Expected], run_ranks: RunRanks
) -> None:
    reference = expected(family)
    shards = run_ranks("logits", size, path=reference.path, prompts=reference.prompts)
    assert largest_difference(shards, reference.logits) < TOLERANCE


@pytest.mark.parametrize(("size", "chunk"), [(1, 1), (1, 5), (2, 5), (3, 7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_chunks(
    family: str, size: int, chunk: int, expected: Callable[[str], Expected], run_ranks: RunRanks
) -> None:
    reference = expected(family)
    shards = run_ranks("logits", size, path=reference.path, prompts=reference.prompts, chunk=chunk)
    assert largest_difference(shards, reference.logits) < TOLERANCE


@pytest.mark.parametrize(("size", "chunk"), [(1, None), (2, 9)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_prefix_that_another_request_writes_in_the_same_batch(
    family: str, size: int, chunk: int | None, expected: Callable[[str], Expected], run_ranks: RunRanks
) -> None:
    reference = expected(family)
    shards = run_ranks("logits", size, path=reference.path, prompts=reference.prompts, chunk=chunk, prefix=PREFIX)
    logits = [reference.logits[0]] + [logits[PREFIX:] for logits in reference.logits[1:]]
    assert largest_difference(shards, logits) < TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, size: int, expected: Callable[[str], Expected], run_ranks: RunRanks) -> None:
    reference = expected(family)
    for ours in run_ranks("greedy", size, path=reference.path, prompts=reference.prompts, max_tokens=NUM_NEW_TOKENS):
        assert ours == reference.answers


@pytest.mark.parametrize(("family", "error"), DELIBERATE_ERRORS)
def test_a_deliberate_error_in_a_feature_shows(
    family: str, error: str, expected: Callable[[str], Expected], run_ranks: RunRanks
) -> None:
    reference = expected(family)
    shards = run_ranks("logits", 1, path=reference.path, prompts=reference.prompts, alter=error)
    assert largest_difference(shards, reference.logits) > VISIBLE
