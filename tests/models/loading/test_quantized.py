"""A quantised weight comes in by one function, and loading treats its tensors like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagleray.models import decoder, layers, llama
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.embedding import VocabParallelHead
from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from support.random_checkpoint import make_model
from support.row_scaled_weight import RowScaledWeight, dense, quantized

OPTIONS: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
NUM_LINEAR = 2 * 4


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose matrices are quantised, and the same numbers in dense ones."""
    model = make_model(OPTIONS | {"tie_word_embeddings": request.param})
    folders = tmp_path / "quantized", tmp_path / "dense"
    for folder in folders:
        model.save_pretrained(folder)
    tensors = load_file(folders[0] / "model.safetensors")
    tensors |= quantized(tensors)
    save_file(tensors, folders[0] / "model.safetensors")
    save_file(dense(tensors), folders[1] / "model.safetensors")
    return folders


def load(folder: Path, tp: TPGroup, **options: Any) -> CausalLM:
    return load_model(folder, tp=tp, dtype=torch.float32, device=torch.device("cpu"), **options)


def load_quantized(folder: Path, tp: TPGroup, **options: Any) -> CausalLM:
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, llama):
            patch.setattr(module, "linear_weight", lambda config: RowScaledWeight)
        patch.setattr(decoder, "vocab_weight", lambda config: RowScaledWeight)
        return load(folder, tp, **options)


def matrices(model: CausalLM) -> dict[str, torch.Tensor]:
    """What every linear layer and the head multiply by, and the embedding's rows, seen from outside."""
    found = {"rows": model.model.embed_tokens(torch.arange(OPTIONS["vocab_size"]))}
    for path, layer in model.named_modules():
        if isinstance(layer, ColumnParallelLinear | QKVParallelLinear | RowParallelLinear | VocabParallelHead):
            found[path] = layer.weight.linear(torch.eye(layer.weight.shards()[0].target.shape[1]))
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_its_part_of_the_dense_matrices(folders: tuple[Path, Path], size: int, streamed: bool) -> None:
    for tp in [TPGroup(rank, size) for rank in range(size)]:
        model = load_quantized(folders[0], tp, streamed=streamed)
        ours, theirs = matrices(model), matrices(load(folders[1], tp, streamed=streamed))
        assert len(ours) == NUM_LINEAR + (2 if model.config.tie_word_embeddings else 3)
        assert all(torch.equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize("streamed", [False, True])
def test_bytes_are_counted_in_all_dtypes(folders: tuple[Path, Path], streamed: bool) -> None:
    counts: list[tuple[int, int]] = []
    model = load_quantized(folders[0], TPGroup(1, 3), streamed=streamed, on_bytes=lambda *count: counts.append(count))
    nbytes = sum(weights.nbytes for weights in model.parameters())
    assert counts[-1] == (nbytes, nbytes)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32, torch.uint8}
    assert model.dtype == torch.float32


def test_scales_that_are_missing_are_named(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight_scale is missing from"):
        load_quantized(folders[0], TPGroup())


def test_scales_are_left_over_where_weights_are_dense(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"weight_scale \(and \d+ more\) .* left over"):
        load(folders[0], TPGroup())


def test_made_up_weights_fill_the_scales_too(folders: tuple[Path, Path]) -> None:
    model = load_quantized(folders[0], TPGroup(), load_format="dummy")
    scales = [weights for name, weights in model.named_parameters() if name.endswith("scales")]
    assert len(scales) == NUM_LINEAR + (1 if model.config.tie_word_embeddings else 2)
    assert all(bool(each.isfinite().all()) and len(each.unique()) == len(each) for each in scales)
