"""The model is one full graph with attention as an opaque op, and batches that change do not recompile it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RunRanks = Callable[..., list[Any]]

MAX_GRAPHS = 2  # one for a single token, whose size torch specialises, and one for any other number
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
BATCHES = [[1], [2], [7], [33], [1, 1], [1, 30, 1, 9], [5, 1], [1], [1, 1, 1], [17, 16]]
ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changing_batches_compile_no_more_than_two_graphs(
    architecture: str, size: int, tmp_path: Path, run_ranks: RunRanks
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **CONFIG}))
    for graphs, difference in run_ranks("compile_counts", size, path=str(tmp_path), batches=BATCHES):
        assert 1 <= graphs <= MAX_GRAPHS
        assert difference < 1e-5  # float32 sums, in another order at most
