"""What a checkpoint's `config.json` says about the network, checked and in our words. Imports no torch.

Both spellings are read: `rope_theta` and `rope_scaling` beside the other keys, and `rope_parameters` as transformers 5
writes it. What Eagleray does not implement is an error here, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.models.json_file import read_object
from eagleray.models.registry import ARCHITECTURES
from eagleray.parallel.shares import share, share_heads

_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers takes where the file says nothing
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"head_dim": 128},
    "Gemma2ForCausalLM": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
_FAMILY_KEYS = {  # options that some families have: elsewhere they must be absent, or off
    "attention_bias": ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"),
    "mlp_bias": ("LlamaForCausalLM",),
    "attn_logit_softcapping": ("Gemma2ForCausalLM",),
    "final_logit_softcapping": ("Gemma2ForCausalLM",),
    "query_pre_attn_scalar": ("Gemma2ForCausalLM",),
    "use_sliding_window": ("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    "use_bidirectional_attention": (),
    "quantization_config": (),
}
_DTYPES = ("float32", "bfloat16", "float16")


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
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` in directory `path`. Raises `ValueError` that says what is wrong with which file."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise ValueError(f"there is no model directory {str(path)!r}; give a directory with config.json")
        if not file.is_file():
            raise ValueError(f"{str(path)!r} holds no config.json, so it is no model")
        raw = read_object(file)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """From the contents of `config.json`. Raises `ValueError` for what is missing, wrong or not supported."""
        architecture = _architecture(raw)
        raw = {**_FAMILY_DEFAULTS.get(architecture, {}), **raw}
        _check_supported(architecture, raw)
        hidden_size, num_heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
        head_size = _count(raw, "head_dim") if raw.get("head_dim") else hidden_size // num_heads
        bias = bool(raw.get("attention_bias", False))
        qwen2 = architecture == "Qwen2ForCausalLM"
        config = cls(
            architecture=architecture,
            vocab_size=_count(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(raw, "intermediate_size"),
            num_layers=_count(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_count(raw, "num_key_value_heads") if raw.get("num_key_value_heads") else num_heads,
            head_size=head_size,
            max_position_embeddings=_count(raw, "max_position_embeddings"),
            dtype=_dtype(raw),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope=_rope(raw),
            attention_scale=float(raw.get("query_pre_attn_scalar") or head_size) ** -0.5,
            sliding_windows=_sliding_windows(architecture, raw),
            attention_soft_cap=raw.get("attn_logit_softcapping"),
            final_soft_cap=raw.get("final_logit_softcapping"),
            qkv_bias=bias or qwen2,
            output_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads is {config.num_heads}, no multiple of num_key_value_heads {config.num_kv_heads}"
            )
        if config.head_size % 2:
            raise ValueError(f"head_dim is {config.head_size}; rotary positions need an even number")
        return config


def check_tp(config: ModelConfig, size: int) -> None:
    """Raise `ValueError` when the model cannot be shared among `size` ranks, saying what the limit is."""
    share_heads(config.num_heads, config.num_kv_heads, 0, size)
    for name in ("intermediate_size", "vocab_size"):
        try:
            share(getattr(config, name), 0, size)
        except ValueError as error:
            raise ValueError(f"tensor_parallel_size {size} is too large for {name}: {error}") from error


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ValueError(f"architectures is {names}, of which none is supported; supported are {', '.join(ARCHITECTURES)}")


def _check_supported(architecture: str, raw: Mapping[str, Any]) -> None:
    for key, families in _FAMILY_KEYS.items():
        if raw.get(key) and architecture not in families:
            raise ValueError(f"{key} is {raw[key]!r}, which is not supported for {architecture}")
    gemma = architecture == "Gemma2ForCausalLM"
    key = "hidden_activation" if gemma else "hidden_act"
    activation = "gelu_pytorch_tanh" if gemma else "silu"
    if (raw.get(key) or activation) != activation:
        raise ValueError(f"{key} is {raw[key]!r}, but {architecture} is supported with {activation!r} only")


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; a whole number of at least 1 is needed")
    return value


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; supported are {', '.join(_DTYPES)}")
    return name


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """One rotary embedding for all layers: `rope_parameters`, flat or per layer type, or the older keys."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    if nested:
        if any(value != nested[0] for value in nested) or len(nested) != len(rope):
            raise ValueError(f"rope_parameters is {rope}; one rotary embedding for all layers is supported")
        rope = dict(nested[0])
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {partial!r}; rotating a part of each head is not supported")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=_positive(rope, "factor"))
    if kind != "llama3":
        raise ValueError(f"rope type is {kind!r}; supported are default, linear and llama3")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=_positive(rope, "factor"),
        low_freq_factor=_positive(rope, "low_freq_factor"),
        high_freq_factor=_positive(rope, "high_freq_factor"),
        original_max_position_embeddings=_count({**raw, **rope}, "original_max_position_embeddings"),
    )


def _positive(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key} of the rope parameters is {value!r}; a number above 0 is needed")
    return float(value)


def _sliding_windows(architecture: str, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer: from `layer_types`, or else by the family's rule."""
    num_layers = _count(raw, "num_hidden_layers")
    off = architecture == "LlamaForCausalLM" or (architecture.startswith("Qwen") and not raw.get("use_sliding_window"))
    if off or raw.get("sliding_window") is None:
        return (None,) * num_layers
    window = _count(raw, "sliding_window")
    types = raw.get("layer_types") or _layer_types(architecture, raw, num_layers)
    if len(types) != num_layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types is {types}; {num_layers} of sliding_attention and full_attention are needed")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_types(architecture: str, raw: Mapping[str, Any], num_layers: int) -> list[str]:
    if architecture == "Gemma2ForCausalLM":
        windowed = [layer % 2 == 0 for layer in range(num_layers)]
    elif architecture.startswith("Qwen"):
        windowed = [layer >= raw.get("max_window_layers", 28) for layer in range(num_layers)]
    else:
        windowed = [True] * num_layers
    return ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]
