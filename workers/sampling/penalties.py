"""Repetition, frequency and presence penalties, counted from the token table at every step.

There is no counter to keep in step with preemption, replay or a dropped token.
"""

import torch
from torch import Tensor


def penalise(
    logits: Tensor,
    tokens: Tensor,
    num_prompt_tokens: Tensor,
    num_tokens: Tensor,
    penalties: tuple[Tensor, Tensor, Tensor],
    vocab_shard: range,
) -> Tensor:
    """Penalised `logits` [n, shard]; the work beyond a copy grows with the tokens, not with the vocabulary.

    `tokens` [n, length] int32 holds a request per line: prompt in [0, `num_prompt_tokens` [n]), output up to
    `num_tokens` [n] (both int64), anything after. `penalties` are one factor [n] float32 per line of each kind:
    repetition (Keskar et al., "CTRL", 2019) divides positive and multiplies other logits of every token seen in prompt
    or output; frequency is subtracted once per occurrence in the output, presence once if there is any.
    """
    length, shard = tokens.shape[1], len(vocab_shard)
    positions = torch.arange(length, device=tokens.device)
    columns = tokens.to(torch.int64) - vocab_shard.start
    is_seen = (columns >= 0) & (columns < shard) & (positions < num_tokens.unsqueeze(1))
    is_output = (positions >= num_prompt_tokens.unsqueeze(1)).float()
    columns = torch.where(is_seen, columns, shard)  # one column more takes what is not of this shard

    repetition, frequency, presence = (penalty.unsqueeze(1) for penalty in penalties)
    padded = torch.nn.functional.pad(logits, (0, 1))
    counts = torch.zeros_like(padded).scatter_add_(1, columns, is_output).gather(1, columns)
    values = padded.gather(1, columns)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    return padded.scatter_(1, columns, values)[:, :shard]  # a token seen twice is written twice, with the same value
