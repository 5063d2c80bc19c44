"""Steps that run out of memory in the model leave no trace in any request's tokens.

Memory runs out through a hook on the real model, before or after its forward pass; the tables of the rank have changed
by then. Numbers are float64, as in test_worker.py, so that tokens can be compared exactly.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.oom_guard import OomGuard
from eagleray.workers.protocol.messages import Step
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.worker_config import worker_config

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROWS, NUM_BLOCKS = 16, 300
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL))
    model = load_model(directory, tp=TPGroup(), dtype=torch.float64, device=CPU, load_format="dummy", seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def make_guard(model: CausalLM, *, alone: bool = True) -> OomGuard:
    config = worker_config(max_model_len=160, block_size=4, max_num_seqs=ROWS, max_num_batched_tokens=128)
    return OomGuard(Worker(config, model, TPGroup(), NUM_BLOCKS), max_rows=ROWS, alone=alone, device=CPU)


def make_engine(model: CausalLM, depth: int) -> InlineEngine:
    scheduler = Scheduler(num_blocks=NUM_BLOCKS, block_size=4, max_num_seqs=ROWS, max_num_batched_tokens=128)
    return InlineEngine(scheduler, make_guard(model), depth)


def run_requests(engine: InlineEngine) -> list[list[int]]:
    rng = Random(5)
    common = [rng.randrange(200) for _ in range(30)]
    for index in range(24):
        prompt = (common if index % 3 == 0 else []) + [rng.randrange(200) for _ in range(rng.randrange(1, 30))]
        sampling = {"temperature": 0.0} if index % 2 else SAMPLED | {"seed": index}
        engine.add(index, prompt, rng.randrange(5, 30), **sampling)
    engine.run()
    return [engine.token_ids(index) for index in range(24)]


@contextmanager
def short_of_memory(model: CausalLM, where: str, is_short: Callable[[int], bool]) -> Iterator[list[int]]:
    """While open, a forward pass fails whose number of tokens `is_short`; yields the numbers of those that did."""
    failures: list[int] = []

    def fail(_module: torch.nn.Module, inputs: tuple[Any, ...], *_output: Any) -> None:
        if is_short(len(inputs[0])):
            failures.append(len(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = model.register_forward_pre_hook(fail) if where == "before" else model.register_forward_hook(fail)
    try:
        yield failures
    finally:
        hook.remove()


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(3, marks=pytest.mark.soak)])
@pytest.mark.parametrize("where", ["before", "after"])
def test_all_requests_end_with_the_tokens_they_would_have_had(model: CausalLM, depth: int, where: str) -> None:
    expected = run_requests(make_engine(model, depth))
    rng = Random(1)
    with short_of_memory(model, where, lambda num_tokens: num_tokens > 1 and rng.random() < 0.15) as failures:
        assert run_requests(make_engine(model, depth)) == expected
    assert len(failures) >= 5


def test_memory_that_stays_short_makes_small_steps(model: CausalLM) -> None:
    expected = run_requests(make_engine(model, 2))
    with short_of_memory(model, "after", lambda num_tokens: num_tokens > 12) as failures:
        assert run_requests(make_engine(model, 2)) == expected
    assert failures[0] == 128
    assert 4 <= len(failures) <= 12  # 128, 64, 32, 16, and again whenever larger steps are tried


def test_a_request_that_never_fits_is_told_what_to_change(model: CausalLM) -> None:
    engine = make_engine(model, 2)
    with short_of_memory(model, "before", lambda _: True):
        engine.add(0, [1, 2, 3], 5, temperature=0.0)
        engine.run()
    assert engine.finish_reason(0) == "error"
    error = engine.news[0][-1].error or ""
    assert error.startswith("cpu has no memory left for a step (2.00 GiB more were asked for)")
    assert "lower gpu_memory_utilization" in error
    engine.add(1, [1, 2, 3], 5, temperature=0.0)
    engine.run()
    assert engine.finish_reason(1) == "length"


def test_among_several_ranks_the_rank_fails_with_the_same_words(model: CausalLM) -> None:
    engine = make_engine(model, 1)
    engine.add(0, [1, 2, 3], 5, temperature=0.0)
    step = engine.scheduler.schedule()
    assert isinstance(step, Step)
    with (
        short_of_memory(model, "before", lambda _: True),
        pytest.raises(MemoryError, match=r"no memory left for a step .* lower gpu_memory_utilization"),
    ):
        make_guard(model, alone=False).run(step)


def test_other_errors_are_not_swallowed(model: CausalLM) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    engine = make_engine(model, 1)
    engine.add(0, [1, 2, 3], 5)
    hook = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.run()
    finally:
        hook.remove()
