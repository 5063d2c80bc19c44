"""A request whose numbers overflow ends alone, with an error: whoever runs beside it or after it never notices.

Once with the plain PyTorch layers, and once with the kernels: on a GPU, or in Triton's interpreter. Token 7 has an
embedding of NaN and token 8 one of infinity. Others are compared with an engine that never saw either.
"""

import json
from pathlib import Path
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

NAN, INF = 7, 8
VOCAB_SIZE, NUM_BLOCKS, MAX_ROWS = 200, 40, 8
MAX_LEN, BLOCK_SIZE = (1024, 128) if ON_GPU else (640, 8)
DTYPE = torch.bfloat16 if ON_GPU else torch.float64
LLAMA = {
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
FOR_GPUS = {
    "heads of 128": LLAMA | {"num_attention_heads": 1, "head_dim": 128},
    "heads of 256": LLAMA | {"num_attention_heads": 1, "head_dim": 256},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    **(FOR_GPUS if ON_GPU else {}),
    "windows and soft caps": LLAMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "min_p": 0.01, "repetition_penalty": 1.1},
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


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    model = load_model(directory, tp=TPGroup(), dtype=DTYPE, device=DEVICE, load_format="dummy", seed=3)
    with torch.no_grad():
        embeddings = next(model.model.embed_tokens.parameters())
        if model.config.tie_word_embeddings:  # the head must not have them, or every logit were odd
            with DEVICE:
                model.lm_head = type(model.lm_head)(VOCAB_SIZE, 128, TPGroup()).to(DTYPE)
            next(model.lm_head.parameters()).copy_(embeddings)
        embeddings[NAN], embeddings[INF] = torch.nan, torch.inf
    return model


def make_engine(model: CausalLM, depth: int = 2, **options: Any) -> InlineEngine:
    config = worker_config(
        max_model_len=MAX_LEN, block_size=BLOCK_SIZE, max_num_seqs=MAX_ROWS, max_num_batched_tokens=256
    )
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=256,
        **({"max_chunk_tokens": 48} | options),
    )
    sizes = (1, MAX_ROWS) if ON_GPU else None
    return InlineEngine(scheduler, Worker(config, model, TPGroup(), NUM_BLOCKS, graph_sizes=sizes), depth)


def add_good(engine: InlineEngine, first: int = 0) -> None:
    """Requests of every kind, of lengths that leave blocks partly unwritten."""
    for index, sampling in enumerate(SAMPLINGS):
        engine.add(first + index, [20 + index, 31, 3, 44, 5, 60 + index] * (1 + 3 * index), 4 + index, **sampling)


def tokens_of_good(engine: InlineEngine, first: int = 0) -> list[list[int]]:
    tokens = [engine.token_ids(first + index) for index in range(len(SAMPLINGS))]
    assert all(engine.finish_reason(first + index) == "length" for index in range(len(SAMPLINGS)))
    return tokens


@pytest.fixture(scope="module")
def expected(model: CausalLM) -> list[list[int]]:
    engine = make_engine(model)
    add_good(engine)
    engine.run()
    return tokens_of_good(engine)


def assert_failed(engine: InlineEngine, request_id: int) -> None:
    assert engine.finish_reason(request_id) == "error"
    assert "NaN or infinite" in (engine.news[request_id][-1].error or "")


def test_they_end_alone_beside_others(model: CausalLM, expected: list[list[int]]) -> None:
    engine = make_engine(model)
    odd = [(token, sampling) for token in (NAN, INF) for sampling in SAMPLINGS]
    for request, (token, sampling) in enumerate(odd, start=100):
        engine.add(request, [1, 2, token], **sampling)
    add_good(engine)
    engine.run()
    for request in range(100, 100 + len(odd)):
        assert_failed(engine, request)
        assert engine.token_ids(request) == []
    assert tokens_of_good(engine) == expected


def test_it_ends_once_what_it_drew_is_not_finite(model: CausalLM, expected: list[list[int]]) -> None:
    """In a decode: its first token can be drawn, and nothing after it."""
    engine = make_engine(model)
    engine.add(100, [1, 2, 3], allowed_token_ids=[NAN])
    add_good(engine)
    engine.run()
    assert_failed(engine, 100)
    assert engine.token_ids(100) == [NAN]
    assert tokens_of_good(engine) == expected


def test_those_that_may_draw_no_token_end_alone(model: CausalLM, expected: list[list[int]]) -> None:
    engine = make_engine(model)
    for request, sampling in enumerate(SAMPLINGS, start=100):
        engine.add(request, [1, 2, 3], 8, **sampling, allowed_token_ids=[9], bad_words=[[9, 9, 9]])
    add_good(engine)
    engine.run()
    for request in range(100, 100 + len(SAMPLINGS)):
        assert (engine.token_ids(request), engine.finish_reason(request)) == ([9, 9], "error")
        assert "no token is left to draw" in (engine.news[request][-1].error or "")
    assert tokens_of_good(engine) == expected


def test_whoever_gets_its_blocks_never_notices(model: CausalLM, expected: list[list[int]]) -> None:
    """All blocks were full of NaN, of requests that ended by themselves, and of some that left before they drew."""
    engine = make_engine(model)
    for request in range(100, 104):
        engine.add(request, [request, *[NAN, INF] * (BLOCK_SIZE * NUM_BLOCKS // 8)][: MAX_LEN - 8], 8)
    engine.turn()
    for request in (101, 103):
        engine.abort(request)
    engine.run()
    assert_failed(engine, 100)
    for first in (0, 10):
        add_good(engine, first)
        engine.run()
        assert tokens_of_good(engine, first) == expected


def test_its_blocks_are_not_offered_as_prefixes_but_those_that_it_found_are(model: CausalLM) -> None:
    engine = make_engine(model)
    common = [9, 10, 11, 12] * BLOCK_SIZE
    for request, prompt in enumerate(
        (common, [*common, *[NAN] * (2 * BLOCK_SIZE)], [*common, *[NAN] * 2 * BLOCK_SIZE])
    ):
        engine.add(request, prompt, 2, temperature=0.0)
        engine.run()
    assert_failed(engine, 1)
    assert_failed(engine, 2)
    engine.add(3, [*common, 1], 2, temperature=0.0)
    engine.run()
    found = [news[0].num_cached_tokens for news in engine.news.values()]
    assert found == [0, None, None, 4 * BLOCK_SIZE]
    assert engine.scheduler.kv_cache.num_used == 0
    hits = engine.scheduler.stats().num_prefix_hit_tokens
    assert hits == 3 * 4 * BLOCK_SIZE  # and none of what request 1 wrote


def test_prompt_logprobs_that_are_not_finite_end_it(model: CausalLM) -> None:
    """Also where a sliding window lets the last logits be finite."""
    engine = make_engine(model)
    engine.add(0, [1, NAN, *[3] * 60], 2, temperature=0.0, prompt_logprobs=1)
    engine.run()
    assert_failed(engine, 0)


def test_a_block_that_it_fills_as_it_ends_is_not_offered_either(model: CausalLM) -> None:
    engine = make_engine(model, depth=1)
    prompt = [9] * (BLOCK_SIZE - 1)
    engine.add(0, prompt, 4, allowed_token_ids=[NAN])
    engine.run()
    assert_failed(engine, 0)
    engine.add(1, [*prompt, NAN, 3], 1)
    engine.run()
    assert engine.scheduler.stats().num_prefix_hit_tokens == 0
