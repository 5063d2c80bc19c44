"""`config.json` in every spelling that transformers has written, and clear errors for what is not supported."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagleray.models.architectures import ARCHITECTURES
from eagleray.models.config import ModelConfig, RopeConfig, check_tp
from eagleray.models.layers import ACTIVATIONS, frequencies

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
    assert old == config(LLAMA, rope_theta=1.0, rope_parameters={"rope_theta": 5000.0, **LLAMA3})
    both = config(LLAMA, rope_scaling=LLAMA3, rope_theta=5000.0, rope_parameters={"rope_theta": 1.0})
    assert both == old, "transformers takes the older one where there are both"
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_activation_of_a_family_is_one_that_the_mlp_has(name: str) -> None:
    """And the network has the one that its file may name."""
    key, activation = ARCHITECTURES[name].activation
    config = ModelConfig.from_dict(LLAMA | {"architectures": [name], key: activation})
    assert config.activation == activation
    assert activation in ACTIVATIONS


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
        (LLAMA, {"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
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


NONSENSE: list[Any] = [
    None, 0, -1, True, False, 0.0, 0.5, 1e999, float("nan"), 10**9, 10**18, 10**400,
    "x", "4", "", [], [1], {}, {"x": 1},
]  # fmt: skip
KEYS = [
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "hidden_activation", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "quantization_config", "compression_config", "is_causal", "use_bidirectional_attention", "text_config",
]  # fmt: skip


@pytest.mark.parametrize("raw", [LLAMA, MISTRAL, QWEN2, GEMMA2], ids=lambda raw: str(raw["architectures"][0]))
@pytest.mark.parametrize("key", KEYS)
def test_any_value_is_read_or_refused_by_the_name_of_its_key(raw: dict[str, Any], key: str) -> None:
    for value in NONSENSE:
        try:
            assert config(raw, **{key: value}).num_layers < 2000
        except ValueError as error:
            about = {"hidden_size": "num_attention_heads", "rope_scaling": "rope"}.get(key, key)
            assert key in str(error) or about in str(error), (value, str(error))  # noqa: PT017
            assert len(str(error)) < 500, "a value of any length is shown by its beginning"  # noqa: PT017


@pytest.mark.parametrize("key", ["rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"])
def test_any_value_within_the_rope_parameters_is_read_or_refused_by_its_key(key: str) -> None:
    for value in NONSENSE:
        try:
            rope = config(LLAMA, rope_scaling={**LLAMA3, key: value}).rope
        except ValueError as error:
            assert "rope" in str(error), (key, value)  # noqa: PT017
            continue
        assert frequencies(8, rope).isfinite().all()


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 1024 is supported"),
        (LLAMA, {"num_hidden_layers": 10**5}, "num_hidden_layers is 100000; at most 1024"),
        (LLAMA, {"num_attention_heads": 64, "hidden_size": 32}, "hidden_size is 32, which is not a multiple"),
        (MISTRAL, {"num_attention_heads": 64, "hidden_size": 32}, "hidden_size is 32, less than num_att"),
        (LLAMA, {"architectures": 5}, "architectures is 5"),
        (LLAMA, {"layer_types": 5}, "layer_types is 5"),
        (LLAMA, {"head_dim": 0}, "head_dim is 0"),
        (GEMMA2, {"attn_logit_softcapping": "x"}, "attn_logit_softcapping is 'x'"),
        (LLAMA, {"max_position_embeddings": 10**18}, "max_position_embeddings is 1000000000000000000; at most"),
        (LLAMA, {"rope_scaling": [1]}, r"rope_scaling is \[1\]; an object is needed"),
        (LLAMA, {"model_type": "mistral"}, "model_type is 'mistral', but architectures"),
        (LLAMA, {"sliding_window": 8}, "sliding_window is 8, which is not supported for LlamaForCausalLM"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window, or it is off"),
        (GEMMA2, {"sliding_window": None}, "there is no sliding_window, or it is off"),
        (GEMMA2, {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "there is no sliding_window"),
        (QWEN2, {"head_dim": None}, "head_dim is None"),
        (LLAMA, {"attention_bias": "false"}, "attention_bias is 'false'; true or false"),
        (LLAMA, {"rope_parameters": {"full_attention": LLAMA3}}, "one rotary embedding for all layers"),
        (LLAMA, {"compression_config": {"format": "int-quantized"}}, "compression_config is set, but quantized"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "x": "y" * 9999}},
            "config is set, but quantized weights of kind 'gptq' are not supported; use the unquantized model$",
        ),
    ],
)  # fmt: skip
def test_what_no_model_has_is_refused_at_once(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(raw, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply|not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON: Unexpected UTF-8 BOM"),
        (b"\xff\xfe{\0}\0", "not UTF-8 text"),
        (b"", "not valid JSON"),
        (b"5", "contains a number, not an object"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "not valid JSON|digits"),
        (b" " * (16 << 20) + b"{}", "bytes, and 16777216 is the limit"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json.*({message})"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").mkdir() if kind == "folder" else os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model directory.*nowhere"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
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
