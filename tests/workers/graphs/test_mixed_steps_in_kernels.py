"""Mixed steps as graphs see them, padded and with the decode kernel for chunks of one token, against plain PyTorch."""

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
from support.interpreter import INTERPRETED
from support.interpreter_pool import RunFile
from support.worker_config import worker_config

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
PROMPT_LENGTHS = [1, 40, 3, 17, 1, 25, 9]
NUM_BLOCKS, MAX_ROWS, MAX_LEN = 60, 5, 64

if not INTERPRETED:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:

    @pytest.fixture(scope="module")
    def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(CONFIG))
        cpu = torch.device("cpu")
        model = load_model(directory, tp=TPGroup(), dtype=torch.float32, device=cpu, load_format="dummy", seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)  # so that logits differ enough for tokens to depend on the whole context
        return model

    def make_worker(model: CausalLM, graph_sizes: list[int] | None = None) -> Worker:
        config = worker_config(
            max_model_len=MAX_LEN, block_size=16, max_num_seqs=MAX_ROWS, max_num_batched_tokens=64, dtype="float32"
        )
        return Worker(config, model, TPGroup(), NUM_BLOCKS, graph_sizes=graph_sizes)

    def run(model: CausalLM, graph_sizes: list[int] | None = None) -> list[list[int]]:
        """Prompts in chunks of seven tokens beside requests that are decoding, one step ahead."""
        scheduler = Scheduler(
            num_blocks=NUM_BLOCKS, block_size=16, max_num_seqs=MAX_ROWS, max_num_batched_tokens=64, max_chunk_tokens=7
        )
        engine = InlineEngine(scheduler, make_worker(model, graph_sizes), 2)
        for index, length in enumerate(PROMPT_LENGTHS):
            engine.add(index, [(7 * index + 3 * i) % 300 for i in range(length)], 4 + index % 3, temperature=0.0)
        engine.run()
        return [engine.token_ids(index) for index in range(len(PROMPT_LENGTHS))]

    def test_tokens_are_those_of_plain_attention(model: CausalLM) -> None:
        rank = make_worker(model)
        assert rank.graphs.has_mixed
        assert rank.graphs.attention == "Triton decode + plain PyTorch"
        in_kernels = run(model)
        expected = run(model, graph_sizes=[])
        assert in_kernels == expected
        assert len({token for tokens in expected for token in tokens}) > 10
