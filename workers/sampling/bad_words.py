"""Masks the last token of each bad word whose other tokens have just been drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagleray.workers.pinned_copy import to_device

ANY, NONE = -1, -2  # before a word that is shorter than others, and before the first generated token


@dataclass(frozen=True, slots=True)
class BadWords:
    """A row's words whose last tokens are in this rank's shard."""

    beginnings: Tensor  # [words, longest - 1] int32, each to the right, ANY before it
    columns: Tensor  # [words] int64, of the shard, of the last tokens; equal ones may come again

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], vocab_shard: range, device: torch.device) -> "BadWords":
        """`words` are tokens, at least one each."""
        here = [word for word in words if word[-1] in vocab_shard]
        width = max((len(word) - 1 for word in here), default=0)
        padded = [[ANY] * (width + 1 - len(word)) + [*word[:-1]] for word in here]
        beginnings = torch.tensor(padded, dtype=torch.int32).reshape(len(here), width)
        columns = torch.tensor([word[-1] - vocab_shard.start for word in here], dtype=torch.int64)
        return cls(to_device(beginnings, device), to_device(columns, device))

    def mask_(self, line: Tensor, tokens: Tensor, num_prompt_tokens: int, num_tokens: int) -> None:
        """In `line` [shard], mask what would complete a word after the first `num_tokens` of `tokens` [max_len].

        A word begins behind the prompt, as in vLLM. Nothing is read on the host.
        """
        width = self.beginnings.shape[1]
        drawn = tokens[max(num_prompt_tokens, num_tokens - width) : num_tokens]
        drawn = torch.nn.functional.pad(drawn, (width - len(drawn), 0), value=NONE)
        completes = ((self.beginnings == drawn) | (self.beginnings == ANY)).all(dim=1)
        line.index_add_(0, self.columns, torch.where(completes, -torch.inf, 0.0))
