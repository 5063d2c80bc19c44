"""Which `Weight` the layers of a model hold: the one place that chooses."""

from eagleray.models.config import ModelConfig
from eagleray.parallel.weight import DenseWeight, WeightFactory


def vocab_weight(config: ModelConfig) -> WeightFactory:
    """Weights of the embedding and the head: dense, too; formats that quantise linear layers often leave these two
    alone.
    """
    return DenseWeight


def linear_weight(config: ModelConfig) -> WeightFactory:
    """Weights of the linear layers in attention and MLP: dense, since `ModelConfig` refuses checkpoints in any other
    format.
    """
    return DenseWeight
