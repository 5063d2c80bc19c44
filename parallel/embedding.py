"""The token embedding and the output head, of which each rank owns some rows of the vocabulary."""

from torch import Tensor, nn

from eagleray.parallel.group import TPGroup
from eagleray.parallel.sharding import shard_columns
from eagleray.parallel.weight import DenseWeight, WeightFactory
from eagleray.parallel.weight_shard import Dim, WeightShard


class VocabParallelHead(nn.Module):
    """Scores of this rank's rows of the vocabulary. Nothing is exchanged: the ranks agree on a token, not on scores."""

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TPGroup, *, make_weight: WeightFactory = DenseWeight
    ) -> None:
        super().__init__()
        self.tp = tp
        self.own = shard_columns(vocab_size, tp.rank, tp.size)
        self.weight = make_weight({None: Dim(vocab_size, self.own)}, Dim.whole(hidden_size))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, hidden_size]` to `[n, len(own)]`, in `out` if given."""
        return self.weight.linear(hidden, out=out)

    def weight_shards(self) -> list[WeightShard]:
        return self.weight.shards()


class VocabParallelEmbedding(VocabParallelHead):
    """Token ids to vectors. Tied weights: the embedding is a head, too, so a model may use it as both."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[tokens]` to this rank's part of `[tokens, hidden_size]`: 0 but for the tokens that it owns."""
        if self.tp.size == 1:
            return self.weight.embed(input_ids)
        local = input_ids - self.own.start
        elsewhere = (local < 0) | (local >= len(self.own))
        rows = self.weight.embed(local.masked_fill(elsewhere, 0))
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
