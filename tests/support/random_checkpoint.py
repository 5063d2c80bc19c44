"""Checkpoints of random weights, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def make_model(options: dict[str, Any], head_gain: float = 1.5) -> PreTrainedModel:
    """transformers' model of `options`, of which those that are None are left out, with random weights in float32."""
    config = AutoConfig.for_model(**{k: v for k, v in options.items() if v is not None})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, head_gain)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, head_gain: float = 1.5) -> None:
    """Random biases and norms, too, which transformers starts at 0 and 1.

    Activations stay near one, and logits have a standard deviation near `head_gain`.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        noise = torch.randn(weights.shape, generator=generator)
        if weights.dim() == 2:
            gain = head_gain if "embed_tokens" in name or "lm_head" in name else 1.5
            weights.copy_(noise * gain / weights.shape[1] ** 0.5)
        elif name.endswith("bias"):
            weights.copy_(noise * 0.3)
        else:
            weights.add_(noise * 0.3)


def save_in_bfloat16(model: PreTrainedModel, path: Path) -> None:
    """As a checkpoint whose numbers are the same in either precision."""
    model.bfloat16().save_pretrained(path)
