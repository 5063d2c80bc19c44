"""Which of some lines each rank draws from whole logits: the first ones rank 0, the next ones rank 1, and so on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from eagleray.parallel.group import TPGroup
from eagleray.parallel.sharding import shard_columns
from eagleray.workers.sampling.plain_draw import PlainDraw


@dataclass(frozen=True)
class LineShares:
    """How lines are shared out. All ranks call the same methods with as many lines. Nothing is asked of the host."""

    tp: TPGroup
    vocab_size: int
    spare_row: int  # fills up the last shares

    def own(self, lines: PlainDraw) -> PlainDraw:
        """This rank's share of `lines` [n, shard], with the logits [share, vocab] of all; of one rank, `lines`."""
        if self.tp.size == 1:
            return lines
        size, num_lines = self.tp.size, len(lines.rows)
        share = -(-num_lines // size)
        missing = share * size - num_lines
        shards = [shard_columns(self.vocab_size, rank, size) for rank in range(size)]
        width = max(map(len, shards))
        to_send = pad(lines.logits, (0, width - lines.logits.shape[1], 0, missing)).view(size, share, width)
        came = self.tp.all_to_all(to_send)
        whole = torch.cat([logits[:, : len(shard)] for logits, shard in zip(came, shards, strict=True)], dim=1)
        here = slice(self.tp.rank * share, (self.tp.rank + 1) * share)
        rows = pad(lines.rows, (0, missing), value=self.spare_row)
        num_tokens, pairs = (pad(each, (0, missing)) for each in (lines.num_tokens, lines.pairs))
        return PlainDraw(whole, rows[here], num_tokens[here], pairs[here])

    def all(self, own: Tensor, num_lines: int) -> Tensor:
        """What the ranks found for their lines, `own` [share, ...] this one, as [num_lines, ...]."""
        return self.tp.all_gather(own).flatten(0, 1)[:num_lines]
