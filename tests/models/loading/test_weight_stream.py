"""Shards that are streamed in parts hold the same bits as shards that are read whole."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagleray.models.loading.mapped_file import DTYPES
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
    wrong = float("nan") if dtype.is_floating_point else 0
    target = torch.full(tensor[region].shape, wrong, dtype=dtype)
    return WeightShard(name="weight", shape=tuple(tensor.shape), region=region, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", [40, 300, 1 << 20])
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@given(
    dims=st.lists(st.integers(1, 7), max_size=4),
    dtype=st.sampled_from(list(DTYPES.values())),
    buffer_bytes=st.integers(1, 80),
    before=st.integers(0, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_region_of_any_number_of_dimensions_arrives_to_the_bit(
    folder: Path, dims: list[int], dtype: torch.dtype, buffer_bytes: int, before: int, seed: int, data: st.DataObject
) -> None:
    """Against safetensors' own slices; rows are often longer than a buffer, and the tensor begins anywhere."""
    tensor = random_bits(tuple(dims), dtype, seed)
    save_file({"x": tensor, "before": torch.zeros(before, dtype=dtype)}, folder / "x.safetensors")
    starts = [data.draw(st.integers(0, size)) for size in dims]
    region = tuple(slice(at, data.draw(st.integers(at, size))) for at, size in zip(starts, dims, strict=True))
    wanted = shard(tensor, region, dtype)
    stream = WeightStream(CPU, num_threads=2, buffer_bytes=buffer_bytes)
    stream.fill(wanted, folder / "x.safetensors", "x")
    stream.finish()
    with safe_open(folder / "x.safetensors", framework="pt") as source:
        assert torch.equal(bits_of(wanted.target), bits_of(source.get_slice("x")[region]))


def test_a_strided_target_is_filled_in_place(tmp_path: Path) -> None:
    """As where experts are merged: the rows of one of two layers, of every expert."""
    experts = torch.randn(4, 6, 10)
    save_file({"x": experts}, tmp_path / "x.safetensors")
    merged = torch.zeros(4, 5, 10)
    region = (slice(0, 4), slice(3, 6), slice(0, 10))
    stream = WeightStream(CPU, buffer_bytes=100)
    half = WeightShard(name="x", shape=(4, 6, 10), region=region, target=merged[:, 2:])
    stream.fill(half, tmp_path / "x.safetensors", "x")
    stream.finish()
    assert torch.equal(merged, torch.cat((torch.zeros(4, 2, 10), experts[:, 3:]), dim=1))


@pytest.mark.parametrize("stored", [torch.float32, torch.int32])
def test_whole_numbers_come_from_their_own_dtype_only(tmp_path: Path, stored: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4, dtype=stored), "bytes": torch.arange(4, dtype=torch.uint8)}, path)
    packed = shard(torch.zeros(4), (slice(1, 3),), torch.uint8)
    stream = WeightStream(CPU)
    with pytest.raises(ValueError, match="has dtype"):
        stream.fill(packed, path, "x")
    stream.fill(packed, path, "bytes")
    stream.finish()
    assert packed.target.tolist() == [1, 2]
    with safe_open(path, framework="pt") as source:
        packed.load(source.get_slice("bytes"))
        with pytest.raises(ValueError, match=r"has dtype .*, but the model needs torch.uint8"):
            packed.load(source.get_slice("x"))


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
