"""A Llama whose heads have sinks, against transformers' Llama with the attention of its GPT-OSS, in float32.

Tolerances are those of `test_against_transformers.py`, for its reasons.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from eagleray.models.loading.loader import checkpoint_shards, load_model
from eagleray.parallel.group import TPGroup
from support import sink_llama
from support.random_checkpoint import make_model

pytestmark = pytest.mark.slow

RunRanks = Callable[..., list[Any]]

TOLERANCE = 1e-4
VISIBLE = 1e-2
OPTIONS = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
PROMPTS = [list(range(3, 3 + length)) for length in (40, 1, 25)]
SINKS = "model.layers.1.self_attn.sinks"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and beside it what transformers computes from it."""
    model = make_model(OPTIONS)
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.sinks = nn.Parameter(torch.randn(6, generator=generator) * 2)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", modeling_gpt_oss.eager_attention_forward)
    with torch.no_grad():
        torch.save([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS], tmp_path / "expected.pt")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [sink_llama.NAME]}))
    return tmp_path


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits_are_those_of_transformers(path: Path, size: int, chunk: int | None, run_ranks: RunRanks) -> None:
    """On 4 ranks, two share a KV head and have one of its query heads each."""
    shards = run_ranks("logits", size, path=str(path), prompts=PROMPTS, chunk=chunk)
    expected: list[Tensor] = torch.load(path / "expected.pt")
    for prompt, logits in enumerate(expected):
        ours = torch.cat([shard[prompt] for shard in shards], dim=-1)
        torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("alter", ["sinks of the next head", "no sinks"])
def test_wrong_sinks_show(path: Path, alter: str, run_ranks: RunRanks) -> None:
    (ours,) = run_ranks("logits", 1, path=str(path), prompts=PROMPTS, alter=alter)
    expected: list[Tensor] = torch.load(path / "expected.pt")
    assert max(float((one - other).abs().max()) for one, other in zip(ours, expected, strict=True)) > VISIBLE


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_a_rank_loads_the_sinks_of_its_heads(path: Path, size: int, dtype: torch.dtype, streamed: bool) -> None:
    """In float32, whatever the other weights are."""
    loaded: list[Tensor] = []
    for rank in range(size):
        model = load_model(path, tp=TPGroup(rank, size), dtype=dtype, device=torch.device("cpu"), streamed=streamed)
        layer = model.attentions[1]
        assert layer.sinks is not None
        assert layer.sinks.shape == (layer.spec.num_heads,)
        assert layer.sinks.dtype == torch.float32
        assert dict(checkpoint_shards(model))[SINKS].target.data_ptr() == layer.sinks.data_ptr()
        loaded.append(layer.sinks)
    assert torch.equal(torch.cat(loaded), load_file(path / "model.safetensors")[SINKS])


def test_a_family_without_sinks_has_no_place_for_them(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"self_attn\.sinks .* is left over: the model has no place for it"):
        load_model(path, tp=TPGroup(), dtype=torch.float32, device=torch.device("cpu"))
