"""The token embedding and the output head, of which each rank owns some rows of the vocabulary."""

from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import linear
from eagleray.parallel.sharding import shard_columns
from eagleray.parallel.weight_shard import WeightShard, parameter, region


class VocabParallelHead(nn.Module):
    """Scores of this rank's rows of the vocabulary. Nothing is exchanged: the ranks agree on a token, not on scores."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TPGroup) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.tp = vocab_size, hidden_size, tp
        self.own = shard_columns(vocab_size, tp.rank, tp.size)
        self.weight = parameter(len(self.own), hidden_size)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, hidden_size]` to `[n, len(own)]`, in `out` if given."""
        return linear(hidden, self.weight, out=out)

    def weight_shards(self) -> list[WeightShard]:
        shape = (self.vocab_size, self.hidden_size)
        cut = region(self.own, range(self.hidden_size))
        return [WeightShard(name="weight", shape=shape, region=cut, target=self.weight.detach())]


class VocabParallelEmbedding(VocabParallelHead):
    """Token ids to vectors. Tied weights: the embedding is a head, too, so a model may use it as both."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[tokens]` to this rank's part of `[tokens, hidden_size]`: 0 but for the tokens that it owns."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.own.start
        elsewhere = (local < 0) | (local >= len(self.own))
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
