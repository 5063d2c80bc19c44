"""Shards that are streamed in parts hold the same bits as shards that are read whole."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagleray.models.loading.weight_stream import WeightStream
from eagleray.parallel.weight_shard import WeightShard

CPU = torch.device("cpu")
TENSORS = {
    "first": torch.randn(7, dtype=torch.float64),  # so that the next ones begin anywhere
    "wide": torch.randn(37, 90),
    "half": torch.randn(64, 48, dtype=torch.bfloat16),
    "bias": torch.randn(100, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(TENSORS, path)
    return path


def shard(tensor: Tensor, region: tuple[slice, ...], dtype: torch.dtype) -> WeightShard:
    target = torch.full(tensor[region].shape, float("nan"), dtype=dtype)
    return WeightShard(name="weight", shape=tuple(tensor.shape), region=region, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_region_arrives(file: Path, dtype: torch.dtype, buffer_bytes: int, num_threads: int) -> None:
    stream = WeightStream(CPU, num_threads=num_threads, buffer_bytes=buffer_bytes)
    streamed, read = [], []
    for name, tensor in TENSORS.items():
        rows = [slice(0, len(tensor)), slice(5, 6), slice(3, len(tensor) - 1)]
        columns = [slice(0, 48), slice(16, 47)] if tensor.dim() == 2 else []
        regions = [(row, column) for row in rows for column in columns] if columns else [(row,) for row in rows]
        for region in regions:
            streamed.append(shard(tensor, region, dtype))
            stream.fill(streamed[-1], file, name)
            read.append(shard(tensor, region, dtype))
            with safe_open(file, framework="pt") as source:
                read[-1].load(source.get_slice(name))
    stream.finish()
    assert all(torch.equal(one.target, other.target) for one, other in zip(streamed, read, strict=True))


def test_a_failing_thread_is_heard(file: Path) -> None:
    stream = WeightStream(CPU)
    good = shard(TENSORS["half"], (slice(0, 64), slice(0, 48)), torch.float32)
    bad = WeightShard(name="weight", shape=(64, 48), region=good.region, target=torch.empty(64, 47))
    stream.fill(good, file, "half")
    stream.fill(bad, file, "half")
    with pytest.raises(RuntimeError, match="shape"):
        stream.finish()


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match="has dtype I32, but weights are of F64, F32"):
        WeightStream(CPU).fill(shard(torch.ones(4), (slice(0, 4),), torch.float32), path, "x")
