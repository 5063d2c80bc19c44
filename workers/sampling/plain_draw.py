"""Lines drawn as if their rows asked for nothing but a temperature, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlainDraw:
    """What plain rows need no more of, and what others are drawn from anew."""

    logits: Tensor  # [n or more, shard], this rank's, as `CausalLM.raw_logits` gives them
    rows: Tensor  # [n] int64
    num_tokens: Tensor  # [n] int32, that come before
    pairs: Tensor  # [n] int64, the same on every rank

    @classmethod
    def buffers(
        cls, max_rows: int, shard: int, spare_row: int, dtype: torch.dtype, device: torch.device
    ) -> "PlainDraw":
        """Memory for up to `max_rows` lines, and one that stays spare: it fills up lists of lines."""
        return cls(
            torch.zeros(max_rows + 1, shard, dtype=dtype, device=device),
            torch.full((max_rows + 1,), spare_row, dtype=torch.int64, device=device),
            torch.zeros(max_rows + 1, dtype=torch.int32, device=device),
            torch.full((max_rows + 1,), 0xFFFFFFFF, dtype=torch.int64, device=device),  # of token 0
        )

    def of(self, lines: Tensor | slice) -> "PlainDraw":
        """Some lines: views of a slice, and copies of lines that a tensor [m] int64 names."""
        return PlainDraw(self.logits[lines], self.rows[lines], self.num_tokens[lines], self.pairs[lines])
