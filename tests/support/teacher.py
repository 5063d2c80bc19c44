"""transformers as a judge: what it computes from a checkpoint in float32, and how far its own bfloat16 is from that."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Judged:
    """Log-probabilities of every token of a vocabulary, at each of n places: both [n, vocab] float32."""

    exact: Tensor  # computed in float32
    short: Tensor  # computed in bfloat16

    def errors(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """How far `logprobs` of `token_ids`, and those computed in bfloat16, are from float32: both [n]."""
        ids = torch.tensor(token_ids, device=self.exact.device).unsqueeze(1)
        exact = self.exact.gather(1, ids).squeeze(1)
        ours = torch.tensor(logprobs, device=exact.device)
        return (ours - exact).abs(), (self.short.gather(1, ids).squeeze(1) - exact).abs()

    def shortfall(self, token_ids: Tensor) -> Tensor:
        """How much less likely than the likeliest token each of `token_ids` [n] is, in float32: [n]."""
        return self.exact.amax(dim=-1) - self.exact.gather(1, token_ids.unsqueeze(1)).squeeze(1)


class Teacher:
    """A checkpoint in transformers, twice, with the same weights: those that are rounded to bfloat16.

    Attention is transformers' plain one, and float32 is multiplied as float32, which is torch's default on CUDA.
    """

    def __init__(self, path: Path, device: torch.device, **changes: Any) -> None:
        """`changes` are made to the checkpoint's configuration."""
        self._device = device
        self._exact, self._short = (_load(path, dtype, device, changes) for dtype in (torch.float32, torch.bfloat16))
        with torch.no_grad():
            for parameter in self._exact.parameters():
                parameter.copy_(parameter.bfloat16())

    @torch.inference_mode()
    def judge(self, token_ids: Sequence[int], num_places: int) -> Judged:
        """What follows each of the last `num_places` tokens but the very last one, of whom nothing comes after."""
        ids = torch.tensor([list(token_ids)[:-1]], device=self._device)
        both = (
            model(ids, logits_to_keep=num_places).logits[0].float().log_softmax(dim=-1)
            for model in (self._exact, self._short)
        )
        return Judged(*both)


def _load(path: Path, dtype: torch.dtype, device: torch.device, changes: dict[str, Any]) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        assert hasattr(config, name), f"{name} is not an option of this model"
        setattr(config, name, value)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation="eager"
    )
    return model.eval().to(device)


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
