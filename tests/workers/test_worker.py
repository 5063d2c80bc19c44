"""One rank runs steps: a request's tokens do not depend on what runs beside it, on how it is cut, or on memory.

The model is small, random and in float64: different batch shapes sum in different orders, and in float64 that moves
logits by some 1e-14, so no near tie can flip and tokens are compared exactly.
"""

import json
from random import Random
from typing import Any

import pytest
import torch

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.kv_capacity import num_blocks_that_fit, run_largest_step
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.worker_config import worker_config

pytestmark = pytest.mark.slow

VOCAB_SIZE = 200
MAX_LEN = 160
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    model = load_model(
        directory, tp=TPGroup(), dtype=torch.float64, device=torch.device("cpu"), load_format="dummy", seed=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # so that logits differ enough for tokens to depend on the whole context
    return model


def config_of(**others: Any) -> WorkerConfig:
    return worker_config(max_model_len=MAX_LEN, block_size=4, max_num_seqs=40, max_num_batched_tokens=256, **others)


def make_engine(model: CausalLM, *, depth: int = 1, num_blocks: int = 2000, **options: Any) -> InlineEngine:
    config = config_of()
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=config.block_size,
        **{"max_num_seqs": config.max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens, **options},
    )
    return InlineEngine(scheduler, Worker(config, model, TPGroup(), num_blocks), depth)


def some_requests(count: int) -> list[tuple[list[int], int, dict[str, Any]]]:
    """Prompts of 1 to 70 tokens, some beginning alike; half of the requests greedy, half sampled with a seed."""
    rng = Random(5)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    return [
        (
            (common if index % 3 == 0 else []) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))],
            rng.randrange(5, 30),
            GREEDY if index % 2 else SAMPLED | {"seed": index},
        )
        for index in range(count)
    ]


REQUESTS = some_requests(33)


@pytest.fixture(scope="module")
def alone(model: CausalLM) -> list[list[int]]:
    """Every request's tokens when it is the only one, runs whole, and finds nothing cached."""
    tokens = []
    for prompt, max_tokens, sampling in REQUESTS:
        engine = make_engine(model, enable_prefix_caching=False)
        engine.add(0, prompt, max_tokens, **sampling)
        engine.run()
        tokens.append(engine.token_ids(0))
    return tokens


def test_requests_alone_give_varied_tokens(alone: list[list[int]]) -> None:
    assert all(len(tokens) == max_tokens for tokens, (_, max_tokens, _) in zip(alone, REQUESTS, strict=True))
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert len({token for tokens in alone for token in tokens}) > 50


@pytest.mark.parametrize("depth", [1, 2], ids=["one step at a time", "one step ahead"])
@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": False, "max_chunk_tokens": 7},
        {"num_blocks": 50, "enable_prefix_caching": False},
        {},
        {"num_blocks": 50, "max_chunk_tokens": 7},
    ],
    ids=["together", "in chunks of 7", "preempted", "prefixes cached", "all at once"],
)
def test_tokens_are_those_of_the_request_alone(
    model: CausalLM, alone: list[list[int]], options: dict[str, Any], depth: int
) -> None:
    engine = make_engine(model, depth=depth, **options)
    for index, (prompt, max_tokens, sampling) in enumerate(REQUESTS):
        engine.add(index, prompt, max_tokens, **sampling)
    engine.run()
    assert [engine.token_ids(index) for index in range(len(REQUESTS))] == alone
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == ("num_blocks" in options)
    assert (stats.num_prefix_hit_tokens > 0) == options.get("enable_prefix_caching", True)


def test_a_second_run_finds_its_prompts_cached_and_gives_the_same(model: CausalLM, alone: list[list[int]]) -> None:
    engine = make_engine(model, depth=2)
    for round_ in range(2):
        for index, (prompt, max_tokens, sampling) in enumerate(REQUESTS):
            engine.add(100 * round_ + index, prompt, max_tokens, **sampling)
        engine.run()
    for index, (prompt, _, _) in enumerate(REQUESTS):
        assert engine.token_ids(100 + index) == alone[index]
        assert engine.news[100 + index][0].num_cached_tokens == (len(prompt) - 1) // 4 * 4


def test_prompt_logprobs_do_not_depend_on_how_a_prompt_is_cut(model: CausalLM) -> None:
    prompt = REQUESTS[0][0]
    whole, chunked = make_engine(model), make_engine(model, max_chunk_tokens=7)
    for engine in (whole, chunked):
        engine.add(0, prompt, 3, prompt_logprobs=2, logprobs=1, temperature=0.0)
        engine.run()
    entries = [[e for tokens in engine.news[0] for e in tokens.prompt_logprobs] for engine in (whole, chunked)]
    assert [entry.token_ids[0] for entry in entries[0]] == prompt[1:]
    for one, other in zip(*entries, strict=True):
        assert one.token_ids == other.token_ids
        assert one.rank == other.rank
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    sampled = [tokens.logprobs for tokens in whole.news[0] if tokens.token_ids]
    assert [len(logprobs) for logprobs in sampled] == [1, 1, 1]
    assert [e[0].token_ids[0] for e in sampled] == whole.token_ids(0)


@pytest.mark.parametrize("num_requests", [300, pytest.param(2000, marks=pytest.mark.soak)])
def test_no_row_or_block_is_left_by_many_requests_with_aborts(model: CausalLM, num_requests: int) -> None:
    rng = Random(9)
    engine = make_engine(model, depth=2, num_blocks=120, max_num_seqs=16)
    added = 0
    aborted = 0
    while added < num_requests or engine.scheduler.num_unfinished:
        while added < num_requests and engine.scheduler.num_unfinished < 30:
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
            engine.add(added, prompt, rng.randrange(1, 16), **(SAMPLED if added % 5 == 0 else GREEDY))
            added += 1
        if rng.random() < 0.5:
            victim = rng.randrange(max(0, added - 30), added)
            engine.abort(victim)
            aborted += engine.finish_reason(victim) == "abort"
        engine.turn()
    engine.run()
    stats = engine.scheduler.stats()
    assert aborted > num_requests // 20
    assert stats.num_preemptions > 0
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert engine.scheduler.num_free_rows == 16
    assert all(engine.finish_reason(index) for index in range(num_requests))


def test_a_step_that_was_lost_is_noticed(model: CausalLM) -> None:
    engine = make_engine(model, depth=2)
    engine.add(0, [1, 2, 3], 9, temperature=0.0)
    engine.scheduler.schedule()  # and never sent
    with pytest.raises(RuntimeError, match="step 2 came after step 0"):
        engine.turn()


def test_the_kv_cache_takes_the_bytes_it_is_given(model: CausalLM) -> None:
    each = 2 * 2 * 8 * 8 * 4 * 2  # key and value, heads, head size, bytes of float64, tokens of a block, layers
    config = config_of(kv_cache_bytes=10 * each + each - 1)
    assert num_blocks_that_fit(config, model, TPGroup()) == 10


def test_the_largest_step_runs(model: CausalLM) -> None:
    run_largest_step(config_of(), model, TPGroup())
