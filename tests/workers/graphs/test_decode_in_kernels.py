"""A worker whose decodes end with the kernel's tokens gives the tokens of one that samples in PyTorch.

In Triton's interpreter: what a GPU would capture is called, padding and all. The model is in float64 for the reason
that `test_worker.py` gives.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import TokenLogprobs
from eagleray.workers.sampling import sampler
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.interpreter import INTERPRETED
from support.interpreter_pool import RunFile
from support.worker_config import worker_config

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

MAX_ROWS, MAX_LEN, NUM_BLOCKS = 6, 40, 60
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "sliding_window": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 3.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "torch_dtype": "float32",
}
RANDOM: dict[str, Any] = {"temperature": 0.8}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    RANDOM | {"seed": 1},
    RANDOM | {"seed": 2, "logprobs": 1},
    RANDOM | {"seed": 3, "top_k": 5},
    {"temperature": 0.0, "repetition_penalty": 2.0},
    RANDOM | {"seed": 4},
    {"temperature": 0.0},
    RANDOM | {"seed": 5, "min_p": 0.02, "allowed_token_ids": list(range(50, 150))},
    RANDOM | {"seed": 6, "top_p": 0.7, "logprobs": 2, "bad_words": [[word] for word in range(40)]},
    RANDOM | {"seed": 7, "top_k": 9, "logprobs": 25},  # more than the kernels give
]

if not INTERPRETED:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:

    @pytest.fixture(scope="module")
    def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(CONFIG))
        model = load_model(
            directory, tp=TPGroup(), dtype=torch.float64, device=torch.device("cpu"), load_format="dummy", seed=3
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)  # so that logits differ enough for tokens to depend on the whole context
        return model

    def make_worker(model: CausalLM, graph_sizes: list[int] | None = None) -> Worker:
        config = worker_config(max_model_len=MAX_LEN, block_size=4, max_num_seqs=MAX_ROWS, max_num_batched_tokens=64)
        return Worker(config, model, TPGroup(), NUM_BLOCKS, graph_sizes=graph_sizes)

    def run(
        model: CausalLM, samplings: list[dict[str, Any]], depth: int, graph_sizes: list[int] | None = None
    ) -> tuple[list[list[int]], list[list[TokenLogprobs]]]:
        """Tokens and log-probabilities of one request per sampling, of which at most `MAX_ROWS` run at a time."""
        scheduler = Scheduler(
            num_blocks=NUM_BLOCKS, block_size=4, max_num_seqs=MAX_ROWS, max_num_batched_tokens=64, max_chunk_tokens=7
        )
        engine = InlineEngine(scheduler, make_worker(model, graph_sizes), depth)
        for index, sampling in enumerate(samplings):
            engine.add(index, [3 + index, 7, 11, 2] * (1 + index % 3), 6 + index, **sampling)
        engine.run()
        logprobs = [
            [entry for tokens in engine.news[index] for entry in tokens.logprobs] for index in range(len(samplings))
        ]
        return [engine.token_ids(index) for index in range(len(samplings))], logprobs

    @pytest.mark.parametrize(
        "samplings", [SAMPLINGS, [s for s in SAMPLINGS if len(s) <= 1 or set(s) == {"temperature", "seed"}]]
    )
    def test_tokens_are_those_of_the_sampler(
        model: CausalLM, samplings: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Log-probabilities are float32 sums of exponentials in another order."""
        in_kernels, logprobs = run(model, samplings, 2)
        monkeypatch.setattr(sampler, "platform_of", lambda device: SimpleNamespace(runs_kernels=False))
        expected, expected_logprobs = run(model, samplings, 1, graph_sizes=[])
        assert in_kernels == expected
        assert len({token for tokens in expected for token in tokens}) > 10
        assert [len(entries) for entries in logprobs] == [len(entries) for entries in expected_logprobs]
        for ours, theirs in zip(logprobs, expected_logprobs, strict=True):
            assert [(each.token_ids, each.rank) for each in ours] == [(each.token_ids, each.rank) for each in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, rel=1e-5, abs=1e-5)

    def test_a_batch_that_no_graph_holds(model: CausalLM) -> None:
        """Graphs of one and of two rows, and four rows that decode."""
        samplings: list[dict[str, Any]] = [{"temperature": 0.0}] * MAX_ROWS
        assert run(model, samplings, 2, graph_sizes=[1, 2]) == run(model, samplings, 1, graph_sizes=[])

    def test_padding_leaves_the_spare_row_where_it_is(model: CausalLM) -> None:
        """More steps than a row holds tokens."""
        engine = InlineEngine(
            Scheduler(num_blocks=NUM_BLOCKS, block_size=4, max_num_seqs=MAX_ROWS, max_num_batched_tokens=64),
            make_worker(model),
        )
        for request in range(2):
            for index in range(3):  # of 4
                engine.add(10 * request + index, [1, 2], MAX_LEN - 2, temperature=0.0)
            engine.run()
            assert engine.token_ids(10 * request) == engine.token_ids(10 * request + 2)
        assert len(engine.token_ids(0)) == MAX_LEN - 2
