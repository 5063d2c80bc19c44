"""Builds one rank's shard of a model and fills its weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from eagleray.models.architectures import model_class
from eagleray.models.config import ModelConfig, check_tp
from eagleray.models.decoder import CausalLM
from eagleray.models.loading import dummy
from eagleray.models.loading.checkpoint import Checkpoint
from eagleray.models.loading.weight_formats import LOAD_FORMATS
from eagleray.models.loading.weight_stream import WeightStream
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import platform_of
from eagleray.parallel.weight_shard import HasWeightShards, WeightShard

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
logger = logging.getLogger(__name__)


@torch.no_grad()
def load_model(
    path: str | Path,
    *,
    tp: TPGroup,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "safetensors",
    seed: int = 0,
    streamed: bool | None = None,
    max_positions: int | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """This rank's shard of the model in directory `path`, in eval mode and without gradients.

    A rank reads only its own bytes of the safetensors files; `streamed`, which is the default where weights do not stay
    in the host's memory, several threads do. "dummy" needs `config.json` only and makes random weights that are, for
    the same `seed`, shards of the same whole tensors at any tensor-parallel size. No position of `max_positions` or
    above will be asked for. `on_bytes` hears, in this thread, how many bytes of the shard's weights are there and how
    many there will be. Raises `ValueError` for a directory, configuration or tensor that is missing, left over, of the
    wrong shape, or cut short, before anything of the model's size is allocated.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}; choose one of {', '.join(LOAD_FORMATS)}")
    config = ModelConfig.from_dir(path)
    if max_positions is not None and max_positions < config.max_position_embeddings:
        config = replace(config, max_position_embeddings=max_positions)
    if load_format == "dummy":
        model = build_model(config, tp=tp, dtype=dtype, device=device)
        count = _counter(model, on_bytes)
        for name, shard in checkpoint_shards(model):
            dummy.fill(name, shard, seed)
            count(shard.target.nbytes)
        return model
    with Checkpoint(path) as checkpoint:
        config = _with_own_head(config, checkpoint)
        outline = build_model(config, tp=tp, dtype=dtype, device=torch.device("meta"))
        checkpoint.check(checkpoint_shards(outline), _superfluous(config))
        model = build_model(config, tp=tp, dtype=dtype, device=device)
        count = _counter(model, on_bytes)
        if streamed or (streamed is None and platform_of(device).accelerator is not None):
            checkpoint.stream(WeightStream(device, on_bytes=count))
        for name, shard in checkpoint_shards(model):
            checkpoint.load(name, shard)
            if not checkpoint.streams:  # which counts by itself, when they are there
                count(shard.target.nbytes)
    return model


def build_model(config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model with its weights uninitialised. On the meta device it takes no memory."""
    check_tp(config, tp.size)
    with device, _default_dtype(dtype):
        return model_class(config.architecture)(config, tp).eval()


def checkpoint_shards(model: torch.nn.Module) -> Iterator[tuple[str, WeightShard]]:
    """Every tensor that the model is made of: its name in a checkpoint, and what this rank wants of it."""
    for path, layer in model.named_modules():
        if isinstance(layer, HasWeightShards):
            for shard in layer.weight_shards():
                yield shard.path(path), shard


def _counter(model: torch.nn.Module, on_bytes: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Takes the bytes that have come, and tells the sum of all so far and of all there will be."""
    done, total = 0, sum(shard.target.nbytes for _, shard in checkpoint_shards(model))

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_bytes is not None:
            on_bytes(done, total)

    return count


def _with_own_head(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """As in transformers, a stored head that differs from the embedding is not tied, whatever the file says."""
    if not config.tie_word_embeddings or not checkpoint.differ(EMBEDDING, HEAD):
        return config
    logger.warning("tie_word_embeddings is true, but %s differs from %s, so they are not tied", HEAD, EMBEDDING)
    return replace(config, tie_word_embeddings=False)


def _superfluous(config: ModelConfig) -> set[str]:
    """Tensors that some checkpoints hold although they follow from the rest."""
    names = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)}
    return names | {HEAD} if config.tie_word_embeddings else names


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
