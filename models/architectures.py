"""The supported architectures, by their name in `config.json`. Imports no torch until a class is asked for.

To add a family, write its model in a file of its own and its entry here: what `config.py` reads, which keys it refuses,
and which tokenizer is built all follow from the entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagleray.models.decoder import CausalLM

Windowed = Callable[
    [int, int], bool
]  # (layer, max_window_layers) -> whether a layer has the window, where there is one


def every_layer(_layer: int, _first: int) -> bool:
    """All layers have the window."""
    return True


def upper_layers(layer: int, first: int) -> bool:
    """Those from `max_window_layers` on have it."""
    return layer >= first


def every_second_layer(layer: int, _first: int) -> bool:
    """The first has it, the second has not, and so on."""
    return layer % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family, as transformers reads its `config.json` and chooses its tokenizer."""

    model: str  # module:class
    model_type: str | None = None  # transformers' name, which a file must not contradict
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # where the file says nothing, beside those of all families
    options: frozenset[str] = frozenset()  # of `OPTIONS`, those it has; the others must be absent, or off
    activation: tuple[str, str] = ("hidden_act", "silu")  # the key and the only value that is supported
    heads_divide_hidden_size: bool = False  # transformers insists on it
    head_dim_may_be_null: bool = False
    qkv_bias: bool = False  # q, k and v have biases whatever the file says
    scale_key: str | None = None  # scores are scaled by this value ** -0.5, not by the head size's
    has_layer_types: bool = True  # `layer_types` may say which layers have the window; else by the rule
    windowed: Windowed = every_layer
    needs_window: bool = False  # a file without one is an error
    tokenizer: str | None = (
        None  # class that `AutoTokenizer` has for the type; None: what the files name, or the plain one
    )
    tokenizer_overrules: bool = False  # this type's files are known to name wrong classes


OPTIONS = (  # keys that change the network and that not every family has, in the order in which they are checked
    "attention_bias",
    "mlp_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "use_sliding_window",
    "sliding_window",
    "use_bidirectional_attention",
    "is_encoder_decoder",
    "per_layer_config",  # layers that differ
    "text_config",  # a model within the model
    "decoder",
    "generator",
    "transformers_weights",  # another file of weights
    "fusion_config",
    "distributed_config",
)

_QWEN = frozenset({"use_sliding_window", "sliding_window"})
_QWEN_DEFAULTS: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        model="eagleray.models.llama:LlamaForCausalLM",
        model_type="llama",
        options=frozenset({"attention_bias", "mlp_bias"}),
        heads_divide_hidden_size=True,
        head_dim_may_be_null=True,
    ),
    "MistralForCausalLM": Architecture(
        model="eagleray.models.llama:LlamaForCausalLM",
        model_type="mistral",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        options=frozenset({"sliding_window"}),
        head_dim_may_be_null=True,
        has_layer_types=False,  # which make a Ministral of it in transformers
        tokenizer="TokenizersBackend",
    ),
    "Qwen2ForCausalLM": Architecture(
        model="eagleray.models.qwen:Qwen2ForCausalLM",
        model_type="qwen2",
        defaults=_QWEN_DEFAULTS,
        options=_QWEN,
        qkv_bias=True,
        windowed=upper_layers,
        tokenizer="Qwen2Tokenizer",
        tokenizer_overrules=True,
    ),
    "Qwen3ForCausalLM": Architecture(
        model="eagleray.models.qwen:Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        options=_QWEN | {"attention_bias"},
        windowed=upper_layers,
        tokenizer="Qwen2Tokenizer",
    ),
    "Gemma2ForCausalLM": Architecture(
        model="eagleray.models.gemma2:Gemma2ForCausalLM",
        model_type="gemma2",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        options=frozenset(
            {
                "attention_bias",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "query_pre_attn_scalar",
                "sliding_window",
            }
        ),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        heads_divide_hidden_size=True,
        scale_key="query_pre_attn_scalar",
        windowed=every_second_layer,
        needs_window=True,
        tokenizer="GemmaTokenizer",
    ),
}


def of_type(model_type: str) -> Architecture | None:
    """The architecture that transformers calls so; None if none is supported."""
    return next((each for each in ARCHITECTURES.values() if each.model_type == model_type), None)


def model_class(name: str) -> "type[CausalLM]":
    """The class of an architecture. Raises `ValueError` for one that is not supported."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    module, _, attribute = ARCHITECTURES[name].model.partition(":")
    found: type[CausalLM] = getattr(import_module(module), attribute)
    return found
