"""A worker whose layers have sinks: decode and mixed graphs' steps, by both of our kernels, against plain PyTorch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.interpreter import INTERPRETED
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not INTERPRETED:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.models.attention import AttentionSpec
    from eagleray.models.loading.loader import checkpoint_shards, load_model
    from eagleray.parallel.group import TPGroup
    from eagleray.workers.attention.backends import DecodeBackend, MixedBackend
    from eagleray.workers.attention.reference import ReferenceBackend
    from support import sink_llama
    from support.attention_requests import Requests
    from support.sink_llama import Run

    RunRanks = Callable[..., list[Any]]

    CONFIG: dict[str, Any] = {
        "architectures": [sink_llama.NAME],
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    PROMPTS = [[(7 * index + 3 * i) % 300 for i in range(length)] for index, length in enumerate([1, 12, 20, 9])]

    @pytest.fixture(scope="module")
    def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(CONFIG))
        cpu = torch.device("cpu")
        model = load_model(directory, tp=TPGroup(), dtype=torch.float32, device=cpu, load_format="dummy", seed=3)
        tensors = {name: shard.target for name, shard in checkpoint_shards(model)}
        for name, tensor in tensors.items():
            if name.endswith("sinks"):
                tensor.mul_(100)  # as large as scores are
            elif tensor.dim() > 1:
                tensor.mul_(8)  # so that logits differ enough for tokens to depend on the whole context
        save_file(tensors, directory / "model.safetensors")
        return directory

    @pytest.fixture(scope="module")
    def plain(path: Path) -> Run:
        return sink_llama.run_worker(TPGroup(), str(path), PROMPTS, in_kernels=False)

    def test_the_plain_way_is_that_of_the_model_by_hand(path: Path, plain: Run, run_ranks: RunRanks) -> None:
        """Whose logits `tests/models/test_sinks.py` compares with transformers'."""
        assert plain.captured == (False, False)
        (by_hand,) = run_ranks("greedy", 1, path=str(path), prompts=PROMPTS, max_tokens=6)
        assert plain.token_ids == [tokens[: len(ours)] for tokens, ours in zip(by_hand, plain.token_ids, strict=True)]
        assert len({token for tokens in plain.token_ids for token in tokens}) > 10

    @pytest.mark.parametrize("size", [1, 2])
    def test_tokens_are_those_of_plain_attention(path: Path, plain: Run, size: int, run_ranks: RunRanks) -> None:
        """Of two ranks, each has the sinks of two heads."""
        for run in run_ranks("run_worker", size, path=str(path), prompts=PROMPTS, in_kernels=True):
            assert run == Run(plain.token_ids, captured=(True, True), logprobs={})

    @pytest.mark.parametrize("size", [2, 3])
    def test_what_rows_with_options_draw_depends_on_no_number_of_ranks(
        path: Path, size: int, run_ranks: RunRanks
    ) -> None:
        """Whose shards of the vocabulary are unequal, too. One rank's draws are the reference's (`test_redraw.py`).

        Each rank draws some of three rows among five, one at a time, and some shares are filled up.
        """
        samplings = [
            {"top_p": 0.7, "temperature": 0.5, "seed": 1},
            {"temperature": 0.0},
            {"logit_bias": {7: 3.0, 250: 3.0}, "frequency_penalty": 2.0, "top_k": 20, "logprobs": 3, "seed": 3},
            {"seed": 4},
            {"min_p": 0.1, "logprobs": 1, "seed": 5},
        ]
        prompts = [[5], [250, 7, 9], [3, 4], [17], [100, 101, 102]]
        arguments = {"path": str(path), "prompts": prompts, "in_kernels": True, "samplings": samplings}
        (alone,) = run_ranks("run_worker", 1, **arguments)
        assert len({token for tokens in alone.token_ids for token in tokens}) > 5
        for run in run_ranks("run_worker", size, **arguments, lines_at_once=1):
            assert (run.token_ids, run.captured) == (alone.token_ids, alone.captured)
            assert run.logprobs.keys() == alone.logprobs.keys() == {2, 4}
            for index, ours in run.logprobs.items():
                assert [each.token_ids for each in ours] == [each.token_ids for each in alone.logprobs[index]]
                assert [each.rank for each in ours] == [each.rank for each in alone.logprobs[index]]
                values, expected = ([each.logprobs for each in those] for those in (ours, alone.logprobs[index]))
                torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), atol=2e-5, rtol=0)

    @pytest.mark.parametrize(
        ("lengths", "num_single"), [([(5, 9), (3, 3)], 0), ([(1, 9), (1, 4)], 2), ([(1, 9), (1, 4), (5, 9), (3, 3)], 2)]
    )
    def test_a_step_by_no_graph(lengths: list[tuple[int, int]], num_single: int) -> None:
        """Of chunks of several tokens, of one, and of both kinds."""
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125, has_sinks=True)
        requests, sinks = Requests(lengths, spec, block_size=16), torch.linspace(-3, 6, 4)
        whole = requests.metadata
        rest = replace(
            whole,
            query_start_loc=whole.query_start_loc[num_single:],
            seq_lens=whole.seq_lens[num_single:],
            block_table=whole.block_table[num_single:],
        )
        both = 0 < num_single < len(lengths)
        requests.metadata = replace(whole, num_single=num_single, rest=rest if both else None)
        decode = DecodeBackend(spec, 2, 64, torch.device("cpu"))
        if num_single:
            decode.plan(whole.seq_lens[:num_single])
        out = requests.run(backend=MixedBackend(decode, ReferenceBackend()), sinks=sinks)
        torch.testing.assert_close(out, requests.expected(sinks), atol=2e-5, rtol=2e-5)
