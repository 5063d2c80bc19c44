"""`config.json` in every spelling that transformers has written, and clear errors for what is not supported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagleray.models.config import ModelConfig, RopeConfig, check_tp
from eagleray.models.layers import frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 2}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}
GEMMA2 = {**LLAMA, "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}


def config(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**raw, **changes})


def test_both_spellings_of_rope_are_the_same() -> None:
    old = config(LLAMA, rope_theta=5000.0, rope_scaling=LLAMA3)
    assert old == config(LLAMA, rope_parameters={"rope_theta": 5000.0, **LLAMA3})
    nested = {"full_attention": {"rope_theta": 5000.0, **LLAMA3}}
    assert old == config(LLAMA, rope_parameters=nested)
    assert old.rope.kind == "llama3"
    assert old.rope.theta == 5000.0
    older = {"type": "linear", "factor": 2.0}
    assert config(LLAMA, rope_scaling=older).rope == RopeConfig(theta=10000.0, kind="linear", factor=2.0)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    scaling = {**LLAMA3, "rope_type": kind} if kind == "llama3" else {"rope_type": kind, "factor": 8.0}
    changes = {"head_dim": 64, "rope_parameters": {"rope_theta": 5000.0, **scaling}}  # some frequencies are blended
    theirs = AutoConfig.for_model("llama", **LLAMA, **changes)
    expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    ours = config(LLAMA, **changes)
    torch.testing.assert_close(frequencies(ours.head_size, ours.rope), expected)


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (LLAMA, [None] * 4),
        (MISTRAL, [4096] * 4),
        ({**MISTRAL, "sliding_window": None}, [None] * 4),
        (QWEN2, [None] * 4),
        ({**QWEN2, "use_sliding_window": True}, [None, None, 8, 8]),
        (
            {
                **QWEN2,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            [8, None, None, 8],
        ),
        (GEMMA2, [4096, None, 4096, None]),
    ],
)
def test_the_window_belongs_to_the_layer(raw: dict[str, Any], windows: list[int | None]) -> None:
    assert list(config(raw).sliding_windows) == windows


def test_gemma_2_has_its_own_defaults() -> None:
    gemma = config(GEMMA2)
    assert (gemma.head_size, gemma.attention_scale, gemma.tie_word_embeddings) == (256, 1 / 16, True)
    assert (gemma.attention_soft_cap, gemma.final_soft_cap) == (50.0, 30.0)


def test_the_dtype_has_two_names() -> None:
    assert config(LLAMA, torch_dtype="bfloat16") == config(LLAMA, dtype="bfloat16")


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (LLAMA, {"architectures": ["BertModel"]}, "BertModel.*none is supported; supported are LlamaForCausalLM"),
        (LLAMA, {"architectures": None}, "none is supported"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*not supported"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "factor of the rope parameters is None"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}},
            "one rotary embedding for all layers",
        ),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0.*not supported for Llama"),
        (MISTRAL, {"attention_bias": True}, "attention_bias is True.*not supported for Mistral"),
        (QWEN2, {"mlp_bias": True}, "mlp_bias is True"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (LLAMA, {"num_key_value_heads": 4}, "no multiple of num_key_value_heads 4"),
        (LLAMA, {"head_dim": 7}, "even number"),
        (LLAMA, {"vocab_size": None}, "vocab_size is None"),
        (LLAMA, {"hidden_size": "many"}, "hidden_size is 'many'"),
        (LLAMA, {"dtype": "float8"}, "dtype is 'float8'"),
        (MISTRAL, {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        (MISTRAL, {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_an_error(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(raw, **changes)


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model directory.*nowhere"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no valid JSON"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 0}))
    with pytest.raises(ValueError, match=r"config.json: vocab_size is 0"):
        ModelConfig.from_dir(tmp_path)


def test_a_tensor_parallel_size_is_refused_by_what_limits_it() -> None:
    check_tp(config(LLAMA), 6)
    with pytest.raises(ValueError, match="tensor_parallel_size 7 is more than the model's 6 attention heads"):
        check_tp(config(LLAMA), 7)
    with pytest.raises(ValueError, match="tensor_parallel_size 6 is too large for intermediate_size"):
        check_tp(config(LLAMA, intermediate_size=5), 6)
