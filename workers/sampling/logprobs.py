"""Log-probabilities of tokens under the raw logits, which no rank holds whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.messages import TokenLogprobs
from eagleray.workers.sampling.packed_pairs import merge, top_pairs, unpack


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Of n positions, the same on every rank: the token in question first, then the `width` most likely in order."""

    token_ids: Tensor  # [n, 1 + width] int64
    logprobs: Tensor  # [n, 1 + width] float32
    ranks: Tensor  # [n] int64, of the first

    def of(self, lines: Tensor) -> "LogprobTensors":
        """Those of `lines` [m] int64, in memory of their own."""
        return LogprobTensors(self.token_ids[lines], self.logprobs[lines], self.ranks[lines])

    def and_then(self, others: "LogprobTensors") -> "LogprobTensors":
        """These positions and `others`; what fills up the narrower ones means nothing."""
        width = max(self.token_ids.shape[1], others.token_ids.shape[1])
        token_ids, logprobs = (
            torch.cat([pad(one, (0, width - one.shape[1])) for one in both])
            for both in ((self.token_ids, others.token_ids), (self.logprobs, others.logprobs))
        )
        return LogprobTensors(token_ids, logprobs, torch.cat([self.ranks, others.ranks]))

    def map(self, change: Callable[[Tensor], Tensor]) -> "LogprobTensors":
        """The same with other tensors."""
        return LogprobTensors(change(self.token_ids), change(self.logprobs), change(self.ranks))

    def copy_(self, others: "LogprobTensors") -> None:
        """Become those of as many positions with the same width."""
        self.token_ids.copy_(others.token_ids)
        self.logprobs.copy_(others.logprobs)
        self.ranks.copy_(others.ranks)

    def to_messages(self, num_top: list[int] | None = None) -> list[TokenLogprobs]:
        """One struct a position, which keeps the first `num_top[i]` of the most likely tokens, or all of them."""
        num_top = num_top or [self.token_ids.shape[1] - 1] * len(self.token_ids)
        width = 1 + max(num_top, default=0)
        ids, logprobs = self.token_ids[:, :width].tolist(), self.logprobs[:, :width].tolist()
        lines = zip(ids, logprobs, self.ranks.tolist(), num_top, strict=True)
        return [TokenLogprobs(ids[: 1 + num], logprobs[: 1 + num], rank) for ids, logprobs, rank, num in lines]


def token_logprobs(logits: Tensor, targets: Tensor, num_top: int, vocab_shard: range, tp: TPGroup) -> LogprobTensors:
    """Log-softmax over the whole vocabulary at `targets` [n] int64 and at the `num_top` most likely tokens.

    `logits` [n, shard] float32 are this rank's. Ties among the most likely go to the lower id; a target's rank is one
    more than the number of tokens that are strictly more likely. `num_top` beyond the vocabulary means all of it.
    """
    offers = tp.all_gather(top_pairs(logits, vocab_shard.start, max(1, num_top)))
    merged = merge(offers)[:, : max(1, num_top)]
    top_values, top_ids = unpack(merged)
    highest = top_values[:, :1]
    total = tp.all_reduce((logits - highest).exp_().sum(dim=-1, keepdim=True))

    columns = (targets - vocab_shard.start).unsqueeze(1)
    is_here = (columns >= 0) & (columns < len(vocab_shard))
    here = logits.gather(1, columns.clamp(0, len(vocab_shard) - 1))
    target_values = tp.all_reduce(torch.where(is_here, here, -torch.inf), "max")
    num_above = tp.all_reduce((logits > target_values).float().sum(dim=-1))  # exact below 2**24, and vectorised

    token_ids = torch.cat([targets.unsqueeze(1), top_ids[:, :num_top]], dim=1)
    values = torch.cat([target_values, top_values[:, :num_top]], dim=1)
    return LogprobTensors(token_ids, values - highest - total.log(), num_above.to(torch.int64) + 1)
