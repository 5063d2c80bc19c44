"""Repetition, frequency and presence penalties, counted from the token table at every step.

There is no counter to keep in step with preemption, replay or a dropped token.
"""

import torch
from torch import Tensor


def token_counts(
    tokens: Tensor, num_prompt_tokens: Tensor, num_tokens: Tensor, vocab_share: range
) -> tuple[Tensor, Tensor]:
    """How often each token of the share occurs in the prompt and in the output: two tensors [n, share] float32.

    `tokens` [n, length] int32 holds a request per line: prompt in [0, `num_prompt_tokens` [n]), output up to
    `num_tokens` [n] (both int64), anything after.
    """
    num_lines, length = tokens.shape
    share = len(vocab_share)
    positions = torch.arange(length, device=tokens.device)
    columns = tokens.to(torch.int64) - vocab_share.start
    is_counted = (columns >= 0) & (columns < share) & (positions < num_tokens.unsqueeze(1))
    is_output = positions >= num_prompt_tokens.unsqueeze(1)
    # prompt counts, then output counts, then one cell for whatever is not counted
    cells = torch.where(is_counted, columns + share * is_output, 2 * share)
    counts = torch.zeros(num_lines, 2 * share + 1, device=tokens.device)
    counts.scatter_add_(1, cells, torch.ones(1, 1, device=tokens.device).expand(num_lines, length))
    return counts[:, :share], counts[:, share : 2 * share]


def apply_penalties_(
    logits: Tensor, counts: tuple[Tensor, Tensor], repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Penalises `logits` [n, share] in place, given `token_counts` and one factor [n] per line of each kind.

    Repetition (Keskar et al., "CTRL", 2019) divides positive and multiplies other logits of every token seen in prompt
    or output; frequency is subtracted once per occurrence in the output, presence once if there is any.
    """
    in_prompt, in_output = counts
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    torch.where(in_prompt + in_output > 0, repeated, logits, out=logits)
    logits.sub_(frequency.unsqueeze(1) * in_output)
    return logits.sub_(presence.unsqueeze(1) * (in_output > 0))
