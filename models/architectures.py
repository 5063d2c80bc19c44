"""The supported architectures, by their name in `config.json`. Imports no torch until a class is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagleray.models.decoder import CausalLM

ARCHITECTURES = {
    "LlamaForCausalLM": "eagleray.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "eagleray.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "eagleray.models.qwen:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "eagleray.models.qwen:Qwen3ForCausalLM",
    "Gemma2ForCausalLM": "eagleray.models.gemma2:Gemma2ForCausalLM",
}
MODEL_TYPES = {  # what transformers calls them, and goes by
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}


def model_class(architecture: str) -> "type[CausalLM]":
    """The class of an architecture. Raises `ValueError` for one that is not supported."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    module, _, name = ARCHITECTURES[architecture].partition(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found
