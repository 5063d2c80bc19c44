"""Rows with drafts draw what they draw without: once by the plain PyTorch sampler, once by the kernels.

The model is in float64, so that a place has the same logits up to some 1e-14, however many tokens ran with it; on GPUs,
where the kernels take none, in float32, and what they differ by turns a draw once in some 100,000. Few tokens are
allowed, so that drafts come true now and then under any other option.
"""

import json
from typing import Any

import pytest
import torch

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.interpreter import DEVICE, ON_GPU, RUNS_KERNELS
from support.interpreter_pool import RunFile
from support.worker_config import worker_config

pytestmark = pytest.mark.slow

VOCAB_SIZE, NUM_BLOCKS, MAX_ROWS = 200, 60, 16
MAX_LEN, BLOCK_SIZE = (512, 128) if ON_GPU else (160, 8)
DEPTHS = [2] if RUNS_KERNELS and not ON_GPU else [1, 2, 3]
DTYPE, TOLERANCE = (torch.float32, 1e-3) if ON_GPU else (torch.float64, 1e-5)
ON_DEVICE: dict[str, Any] = {"device": DEVICE.type, "dtype": str(DTYPE).removeprefix("torch.")}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FEW: dict[str, Any] = {"allowed_token_ids": [20, 21, 22]}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0} | FEW,
    {"temperature": 1.0, "seed": 1} | FEW,
    {"temperature": 0.8, "seed": 2, "top_p": 0.9, "logprobs": 2} | FEW,
    {"temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.1} | FEW,
    {"temperature": 1.0, "seed": 4, "bad_words": [[20, 21, 20], [22, 22]]} | FEW,
    {"temperature": 1.0, "seed": 5, "min_tokens": 12, "stop_token_ids": [22], "logprobs": 1} | FEW,
    {"temperature": 1.0, "seed": 6, "logprobs": 25} | FEW,  # more than the kernels give
]

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

elif not ON_GPU:
    from support.redraw import small

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the kernels that draw rows with options; one holds a line."""
        small(monkeypatch, capacity=256, tile=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return load_model(directory, tp=TPGroup(), dtype=DTYPE, device=DEVICE, load_format="dummy", seed=3)


def run(model: CausalLM, samplings: list[dict[str, Any]], most: int, depth: int, max_tokens: int) -> InlineEngine:
    limits: dict[str, Any] = {"max_num_seqs": MAX_ROWS, "max_num_batched_tokens": 64}
    config = worker_config(max_model_len=MAX_LEN, block_size=BLOCK_SIZE, **limits, **ON_DEVICE)
    scheduler = Scheduler(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_speculative_tokens=most, **limits)
    engine = InlineEngine(scheduler, Worker(config, model, TPGroup(), NUM_BLOCKS, graph_sizes=[]), depth)
    for index, sampling in enumerate(samplings):
        engine.add(index, [20 + index, 21, 20, 22, 21, 20, 22, 22], max_tokens, **sampling)
    engine.run()
    return engine


@pytest.mark.parametrize("depth", DEPTHS)
def test_tokens_and_log_probabilities_are_those_without_a_draft(model: CausalLM, depth: int) -> None:
    max_tokens = 60 if len(DEPTHS) > 1 else 12
    plain, drafted = (run(model, SAMPLINGS, most, depth, max_tokens) for most in (0, 5))
    assert drafted.scheduler.stats().num_accepted_tokens > 5
    for index in range(len(SAMPLINGS)):
        assert drafted.token_ids(index) == plain.token_ids(index)
        assert drafted.finish_reason(index) == plain.finish_reason(index)
        ours, theirs = (
            [each for tokens in engine.news[index] for each in tokens.logprobs] for engine in (drafted, plain)
        )
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("depth", DEPTHS[:2])
def test_whoever_may_draw_nothing_within_a_draft_has_what_came_before(model: CausalLM, depth: int) -> None:
    """Of the one allowed token, the 9th is not, and drafts are of several.

    Its noise would draw others, so whoever wrote what a plain row draws into the places of a draft would miss the word.
    """
    only = {"allowed_token_ids": [9], "bad_words": [[9] * 9], "temperature": 1.0, "seed": 1}
    engine = run(model, [only, *SAMPLINGS[:2]], 6, depth, 20)
    assert engine.token_ids(0) == [9] * 8
    assert engine.finish_reason(0) == "error"
    assert "no token is left to draw" in (engine.news[0][-1].error or "")
    assert engine.scheduler.stats().num_accepted_tokens > 2
    assert [engine.finish_reason(index) for index in (1, 2)] == ["length"] * 2
