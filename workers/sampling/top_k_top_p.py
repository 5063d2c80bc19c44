"""Top-k and top-p without exchanging logits: ranks exchange the best few pairs of their shards and agree on a cut.

The cut of a line is the lowest (value, id) pair that may still be drawn. Each rank offers the `width` highest pairs of
its shard. Merged and sorted they start with the highest pairs of the whole vocabulary, exactly, down to the highest of
the ranks' last offers: below that some rank may hide a higher pair. If the cut lies in this certain part it is found.
Otherwise, when a top-k is huge or the distribution so flat that its nucleus is wider than the offers, the lines in
question offer eight times as many, and in the last resort their whole shards.

The mass of a token is an integer (`masses.py`), so the cut is the same on any number of ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.sampling.gumbel import log_exponential
from eagleray.workers.sampling.masses import mass_limits, token_masses
from eagleray.workers.sampling.packed_pairs import PAD, line_blocks, merge, pack, top_pairs, unpack
from eagleray.workers.sampling.table import NO_TOP_K

INITIAL_WIDTH = 256
_WIDENING = 8


@dataclass(frozen=True, slots=True)
class TopKTopP:
    """What restricts each of n lines, after temperature. A line without top-k has one of `NO_TOP_K`."""

    log_min_p: Tensor  # [n] float32, -inf where there is no min-p
    top_k: Tensor  # [n] int64
    top_p: Tensor  # [n] float64, inf where there is no top-p
    max_top_k: int  # the largest of `top_k`, known to the host
    has_min_p: bool  # any line

    def of(self, lines: Tensor) -> "TopKTopP":
        return replace(self, log_min_p=self.log_min_p[lines], top_k=self.top_k[lines], top_p=self.top_p[lines])


def draw_top_k_top_p(
    values: Tensor, keys: Tensor, restriction: TopKTopP, vocab_shard: range, max_shard: int, tp: TPGroup
) -> Tensor:
    """This rank's best pair [n] after noise among those at or above the cut; `PAD` where its shard has none.

    `values` [n, shard] float32 are logits over temperature, `keys` [n] int64 the noise keys, `max_shard` the widest
    shard of any rank. The ranks call this together, and agree about who needs more candidates.
    """
    widest = max_shard + 1  # one more than any shard: then every rank's last offer is `PAD`, and all is certain
    width = min(INITIAL_WIDTH, restriction.max_top_k, widest)
    offers = top_pairs(values, vocab_shard.start, width)
    cuts, is_open = find_thresholds(values, offers, restriction, tp)
    best = _best_at_or_above(cuts, offers, keys)
    while width < widest and bool(is_open.any()):
        lines = is_open.nonzero().squeeze(1)
        width = min(width * _WIDENING, widest)
        offers = top_pairs(values[lines], vocab_shard.start, width)
        cuts, still_open = find_thresholds(values[lines], offers, restriction.of(lines), tp)
        best[lines] = _best_at_or_above(cuts, offers, keys[lines])
        is_open = torch.zeros_like(is_open).index_copy_(0, lines, still_open)
    return best


def find_thresholds(values: Tensor, offers: Tensor, restriction: TopKTopP, tp: TPGroup) -> tuple[Tensor, Tensor]:
    """The cut [n] int64 of each line, and whether it needs wider offers [n] bool, the same on every rank.

    `values` [n, shard] is this rank's shard and `offers` [n, width] its highest pairs in order. Tokens below min-p are
    dropped, then all but the `top_k` highest, and of these the shortest prefix stays that holds `top_p` of their mass;
    a token stays when the mass before it is less than that. Equal values are in order of their ids. The first always
    stays.
    """
    gathered = tp.all_gather(offers)
    merged = merge(gathered)
    num_certain = (merged >= gathered[:, :, -1].amax(dim=0).unsqueeze(1)).sum(dim=-1)

    logits, _ = unpack(merged)
    highest = logits[:, :1]
    places = torch.arange(merged.shape[1], device=merged.device)
    is_candidate = (logits >= highest + restriction.log_min_p.unsqueeze(1)) & (places < restriction.top_k.unsqueeze(1))
    masses = torch.where(is_candidate, token_masses(logits, highest), 0)
    total = masses.sum(dim=-1)
    has_top_k = restriction.top_k < NO_TOP_K
    if restriction.max_top_k == NO_TOP_K:
        total = torch.where(has_top_k, total, tp.all_reduce(_shard_mass(values, highest, restriction)))
    mass_before = torch.nn.functional.pad(masses.cumsum(dim=-1)[:, :-1], (1, 0))
    stays = is_candidate & (mass_before < mass_limits(restriction.top_p, total).unsqueeze(1))

    num_staying = stays.sum(dim=-1).clamp_(min=1)
    cuts = merged.gather(1, (num_staying - 1).unsqueeze(1)).squeeze(1)
    is_open = torch.where(has_top_k, restriction.top_k > num_certain, num_staying >= num_certain)
    return cuts, tp.all_reduce(is_open.to(torch.int32), "max") > 0


def _shard_mass(values: Tensor, highest: Tensor, restriction: TopKTopP) -> Tensor:
    """The mass [n] int64 of this rank's shard, without what min-p drops."""
    lowest = highest + restriction.log_min_p.unsqueeze(1)
    sums = []
    for block in line_blocks(values):
        masses = token_masses(values[block], highest[block])
        if restriction.has_min_p:
            masses.masked_fill_(values[block] < lowest[block], 0)
        sums.append(masses.sum(dim=-1))
    return torch.cat(sums)


def _best_at_or_above(cuts: Tensor, offers: Tensor, keys: Tensor) -> Tensor:
    values, token_ids = unpack(offers)
    noisy = values - log_exponential(keys, token_ids.to(torch.int32))
    pairs = torch.where(offers >= cuts.unsqueeze(1), pack(noisy, token_ids), PAD)
    return pairs.amax(dim=-1)
