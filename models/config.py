"""Reads and checks what a checkpoint's `config.json` says about the network. Imports no torch.

It is read as transformers reads it: its defaults where a key is missing, and both spellings of rotary positions,
`rope_theta` and `rope_scaling` beside the other keys, and `rope_parameters`. What Eagleray does not implement is an
error here, never ignored, and so is a value of another type, or one so large that no model has it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from eagleray.models.architectures import ARCHITECTURES, OPTIONS, Architecture
from eagleray.models.json_file import flag, fraction, number, read_object, shown, whole
from eagleray.parallel.sharding import shard, shard_heads

_DEFAULTS: dict[str, Any] = {  # what transformers takes where the file says nothing
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_PARTS = ("per_layer_config", "text_config", "decoder", "generator")  # which only null leaves out
DTYPES = ("float32", "bfloat16", "float16")
_SLIDING, _FULL = "sliding_attention", "full_attention"  # of `layer_types`
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_WIDTH = 1 << 20  # of hidden states, and of what is within a layer
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 22  # a table of angles has a row for each


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is "default", "linear" or "llama3"; the rest belongs to the last two."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of one of the architectures in the registry."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    attention_scale: float
    sliding_windows: tuple[int | None, ...]  # of each layer: a token sees itself and the window - 1 tokens before it
    activation: str = "silu"  # of the MLP, by its name in transformers
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` in directory `path`. Raises `ValueError` that says what is wrong with which file."""
        file = Path(path) / "config.json"
        if not isdir(path):
            raise ValueError(f"there is no model directory {str(path)!r}; give a directory with config.json")
        if not isfile(file):
            raise ValueError(f"{str(path)!r} holds no config.json, so it is not a model")
        raw = read_object(file)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of `config.json`. Raises `ValueError` for what is missing, wrong or not supported."""
        name = _architecture(raw)
        architecture = ARCHITECTURES[name]
        _check_supported(name, architecture, raw)
        raw = {**_DEFAULTS, **architecture.defaults, **raw}
        num_heads = whole(raw, "num_attention_heads", MAX_HEADS)
        kv_heads = raw.get("num_key_value_heads")
        head_size = _head_size(architecture, raw, num_heads)
        bias = flag(raw, "attention_bias")
        config = cls(
            architecture=name,
            vocab_size=whole(raw, "vocab_size", MAX_VOCABULARY),
            hidden_size=whole(raw, "hidden_size", MAX_WIDTH),
            intermediate_size=whole(raw, "intermediate_size", MAX_WIDTH),
            num_layers=whole(raw, "num_hidden_layers", MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_heads if kv_heads is None else whole(raw, "num_key_value_heads", MAX_HEADS),
            head_size=head_size,
            max_position_embeddings=whole(raw, "max_position_embeddings", MAX_POSITIONS),
            dtype=_dtype(raw),
            rms_norm_eps=fraction(raw, "rms_norm_eps"),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            rope=_rope(raw),
            attention_scale=_attention_scale(architecture, raw, head_size),
            sliding_windows=_sliding_windows(name, architecture, raw),
            activation=architecture.activation[1],
            attention_soft_cap=_soft_cap(raw, "attn_logit_softcapping"),
            final_soft_cap=_soft_cap(raw, "final_logit_softcapping"),
            qkv_bias=bias or architecture.qkv_bias,
            output_bias=bias,
            mlp_bias=flag(raw, "mlp_bias"),
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads is {config.num_heads}, which is not a multiple of num_key_value_heads "
                f"{config.num_kv_heads}"
            )
        return config


def check_tp(config: ModelConfig, size: int) -> None:
    """Raise `ValueError` when the model cannot be shared among `size` ranks, saying what the limit is."""
    shard_heads(config.num_heads, config.num_kv_heads, 0, size)
    for name in ("intermediate_size", "vocab_size"):
        try:
            shard(getattr(config, name), 0, size)
        except ValueError as error:
            raise ValueError(f"tensor_parallel_size {size} is too large for {name}: {error}") from error


def _architecture(raw: Mapping[str, Any]) -> str:
    """The first name that is supported. transformers goes by `model_type`, so that must say the same if it is there."""
    names = raw.get("architectures")
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES] if type(names) is list else []
    if not known:
        raise ValueError(
            f"architectures is {shown(names)}, of which none is supported; supported are {', '.join(ARCHITECTURES)}"
        )
    needed = ARCHITECTURES[known[0]].model_type
    if needed is not None and raw.get("model_type", needed) != needed:
        raise ValueError(
            f"model_type is {shown(raw['model_type'])}, but architectures is {shown(names)}, whose type is "
            f"{needed!r}; fix the one that is wrong"
        )
    return known[0]


def _check_supported(name: str, architecture: Architecture, raw: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if (value := raw.get(key)) is not None:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            kind = f" of kind {method!r}" if isinstance(method, str) else ""
            raise ValueError(f"{key} is set, but quantized weights{kind} are not supported; use the unquantized model")
    for key in OPTIONS:
        off = raw.get(key) is None or (raw[key] is False and key not in _PARTS)
        if not off and key not in architecture.options:
            raise ValueError(f"{key} is {shown(raw[key])}, which is not supported for {name}")
    if raw.get("is_causal", True) is not True:
        raise ValueError(f"is_causal is {shown(raw['is_causal'])}; models that see later tokens are not supported")
    key, activation = architecture.activation
    if raw.get(key, activation) != activation:
        raise ValueError(f"{key} is {shown(raw[key])}, but {name} is supported with {activation!r} only")


def _head_size(architecture: Architecture, raw: Mapping[str, Any], num_heads: int) -> int:
    hidden_size = whole(raw, "hidden_size", MAX_WIDTH)
    if architecture.heads_divide_hidden_size and hidden_size % num_heads:
        raise ValueError(f"hidden_size is {hidden_size}, which is not a multiple of num_attention_heads {num_heads}")
    absent = "head_dim" not in raw or (raw["head_dim"] is None and architecture.head_dim_may_be_null)
    if not absent:
        size = whole(raw, "head_dim", MAX_WIDTH)
    elif hidden_size < num_heads:
        raise ValueError(f"hidden_size is {hidden_size}, less than num_attention_heads {num_heads}")
    else:
        size = hidden_size // num_heads
    if size % 2:
        raise ValueError(f"head_dim is {size}; rotary positions need an even number")
    if size * num_heads > MAX_WIDTH:
        raise ValueError(f"head_dim is {size} and num_attention_heads {num_heads}; at most {MAX_WIDTH} is supported")
    return size


def _attention_scale(architecture: Architecture, raw: Mapping[str, Any], head_size: int) -> float:
    key = architecture.scale_key
    return math.pow(head_size if key is None else whole(raw, key, MAX_WIDTH), -0.5)


def _soft_cap(raw: Mapping[str, Any], key: str) -> float | None:
    return fraction(raw, key) if raw.get(key) is not None else None


def _dtype(raw: Mapping[str, Any]) -> str:
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    name = raw.get(key)
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise ValueError(f"{key} is {shown(name)}; supported are {', '.join(DTYPES)}")
    return str(name)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """The older `rope_scaling` comes before `rope_parameters`, and what is within either before what is beside it."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and (not isinstance(raw[key], Mapping) or "__float__" in raw[key]):
            raise ValueError(f"{key} is {shown(raw[key])}; an object is needed")
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key)
    rope = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw} | dict(rope or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{key} is {shown(rope)}; one rotary embedding for all layers is supported")
    partial = rope.get("partial_rotary_factor")
    if partial is not None and (isinstance(partial, bool) or partial != 1.0):
        raise ValueError(f"partial_rotary_factor is {shown(partial)}; rotating a part of each head is not supported")
    return _rope_of(raw, {"rope_theta": RopeConfig.theta} | rope)


def _rope_of(raw: Mapping[str, Any], rope: dict[str, Any]) -> RopeConfig:
    theta = _in_rope(rope, "rope_theta")
    kind = rope["rope_type"] if "rope_type" in rope else rope.get("type", "default")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=_in_rope(rope, "factor"))
    if kind != "llama3":
        raise ValueError(f"rope type is {shown(kind)}; supported are default, linear and llama3")
    outside = "original_max_position_embeddings"
    if outside in raw and raw[outside] != rope.get(outside):
        raise ValueError(f"{outside} is {shown(raw[outside])}, and {shown(rope.get(outside))} in the rope parameters")
    low, high = _in_rope(rope, "low_freq_factor"), _in_rope(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor of the rope parameters is {low}, not less than high_freq_factor {high}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=_in_rope(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=whole(
            {outside: raw["max_position_embeddings"]} | rope, outside, MAX_POSITIONS
        ),
    )


def _in_rope(rope: Mapping[str, Any], key: str) -> float:
    name = f"{key} of the rope parameters"
    return number({name: rope.get(key)}, name)


def _sliding_windows(name: str, architecture: Architecture, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer: from `layer_types`, or else by the family's rule."""
    num_layers = whole(raw, "num_hidden_layers", MAX_LAYERS)
    off = "use_sliding_window" in architecture.options and not flag(raw, "use_sliding_window")
    window = None if raw.get("sliding_window") is None else whole(raw, "sliding_window", MAX_POSITIONS)
    window = None if off else window
    first = whole(raw, "max_window_layers", 1 << 31, least=0)
    types = raw.get("layer_types")
    if not architecture.has_layer_types and "layer_types" in raw:
        raise ValueError(f"layer_types is {shown(types)}, which is not supported for {name}")
    if types is None:
        has_window = window is not None or architecture.needs_window
        windowed = (has_window and architecture.windowed(layer, first) for layer in range(num_layers))
        types = [_SLIDING if is_windowed else _FULL for is_windowed in windowed]
    known = isinstance(types, list) and all(isinstance(kind, str) and kind in (_SLIDING, _FULL) for kind in types)
    if not known or len(types) != num_layers:
        raise ValueError(f"layer_types is {shown(types)}; {num_layers} of {_FULL}, {_SLIDING} are needed")
    if window is None and (_SLIDING in types or architecture.needs_window):
        raise ValueError(f"layer_types is {shown(types)}, but there is no sliding_window, or it is off")
    return tuple(window if kind == _SLIDING else None for kind in types)
