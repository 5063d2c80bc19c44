"""What a rank reads from a checkpoint, what it says when something is wrong with one, and weights made up."""

import json
import re
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagleray.models.decoder import CausalLM
from eagleray.models.loading import checkpoint
from eagleray.models.loading.loader import checkpoint_shards, load_model
from eagleray.parallel.group import TPGroup

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


WAY: dict[str, Any] = {}  # how the running test loads


@pytest.fixture(autouse=True, params=[False, True], ids=["read", "streamed"])
def way(request: pytest.FixtureRequest) -> None:
    """Both ways must give the same weights and the same complaints."""
    WAY["streamed"] = request.param


def load(path: Path, tp: TPGroup | None = None, **options: Any) -> CausalLM:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": CPU} | WAY | options
    return load_model(path, tp=tp or TPGroup(), **settings)


def whole_tensors(models: list[CausalLM]) -> dict[str, Tensor]:
    """The checkpoint's tensors, put together from every rank's shard."""
    whole: dict[str, Tensor] = {}
    for model in models:
        for name, shard in checkpoint_shards(model):
            whole.setdefault(name, torch.full(shard.shape, float("nan")))[shard.region] = shard.target
    return whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = whole_tensors([load(tmp_path, load_format="dummy")])
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_bytes_are_counted_up_to_all_of_the_shard(path: Path, load_format: str) -> None:
    counts: list[tuple[int, int, int]] = []
    model = load(
        path,
        TPGroup(1, 2),
        load_format=load_format,
        dtype=torch.bfloat16,
        on_bytes=lambda done, total: counts.append((done, total, threading.get_ident())),
    )
    size = sum(weights.nbytes for weights in model.parameters())
    assert {(total, thread) for _, total, thread in counts} == {(size, threading.get_ident())}
    done = [done for done, _, _ in counts]
    assert done == sorted(set(done))
    assert len(done) > 10
    assert done[-1] == size


def split(path: Path, tensors: dict[str, Tensor]) -> None:
    """The same checkpoint in two files with an index."""
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, path / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("files", ["one", "several"])
def test_the_shards_together_are_the_checkpoint(path: Path, tensors: dict[str, Tensor], size: int, files: str) -> None:
    if files == "several":
        split(path, tensors)
    whole = whole_tensors([load(path, TPGroup(rank, size)) for rank in range(size)])
    assert whole.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(whole[name], tensor), name


class CountingFile:
    """A safetensors file that adds up the bytes that are read."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self.file, self.read = file, read

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> "CountingSlice":
        return CountingSlice(self.file.get_slice(name), self.read)

    def __exit__(self, *args: object) -> None:
        self.file.__exit__(*args)


class CountingSlice:
    def __init__(self, inner: Any, read: list[int]) -> None:
        self.inner, self.read = inner, read

    def get_shape(self) -> list[int]:
        return list(self.inner.get_shape())

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        tensor: Tensor = self.inner[region]
        self.read.append(tensor.nbytes)
        return tensor


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    bytes_read: list[int] = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: CountingFile(safe_open(*a, **k), bytes_read))
    return bytes_read


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_its_own_bytes_and_no_others(path: Path, size: int, read: list[int]) -> None:
    for rank in range(size):
        read.clear()
        model = load(path, TPGroup(rank, size), streamed=False)
        assert sum(read) == sum(parameter.nbytes for parameter in model.parameters())
    if size > 1:
        assert sum(read) < 0.6 * (path / "model.safetensors").stat().st_size


def test_weights_take_the_dtype_that_is_asked_for(path: Path, tensors: dict[str, Tensor]) -> None:
    model = load(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(whole_tensors([model])[UP].bfloat16(), tensors[UP].bfloat16())
    assert torch.get_default_dtype() == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_on_the_meta_device_a_model_takes_no_memory(path: Path) -> None:
    model = load(path, device=torch.device("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())


def rewrite(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_missing_tensor(path: Path, tensors: dict[str, Tensor]) -> None:
    del tensors[UP]
    with pytest.raises(ValueError, match=rf"tensor {UP} is missing from .*model.safetensors"):
        load(rewrite(path, tensors))


def test_a_left_over_tensor(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight in .*model.safetensors is left over"):
        load(rewrite(path, tensors))


@pytest.mark.parametrize("shape", [(64, 31), (65, 32), (64,)])
def test_a_misshapen_tensor(path: Path, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    tensors[UP] = torch.zeros(shape)
    message = rf"tensor {UP} in .*model.safetensors has shape \{list(shape)}, but the model needs \[64, 32\]"
    with pytest.raises(ValueError, match=message.replace("]", r"\]", 1)):
        load(rewrite(path, tensors), TPGroup(1, 2))


def test_a_file_cut_short_within_a_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    last = max(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")]).items(), key=_end)[0]
    with pytest.raises(ValueError, match=rf"tensor {last} in .*model.safetensors is cut short"):
        load(path)


def _end(entry: tuple[str, dict[str, Any]]) -> int:
    return int(entry[1].get("data_offsets", (0, 0))[1])


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_cut_short_within_its_header(path: Path, size: int) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short"):
        load(path)


def test_a_file_of_something_else(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x04\0\0\0\0\0\0\0oopsmore")
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load(path)


def test_a_file_that_the_index_names_is_missing(path: Path, tensors: dict[str, Tensor]) -> None:
    split(path, tensors)
    (path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tensor .* there is no file .*b.safetensors"):
        load(path)


def test_a_tensor_that_the_index_names_is_not_in_its_file(path: Path, tensors: dict[str, Tensor]) -> None:
    split(path, tensors)
    save_file({"other": torch.zeros(1)}, path / "b.safetensors")
    with pytest.raises(ValueError, match=r"tensor .* cannot be read from .*b.safetensors"):
        load(path)


def test_no_weights_at_all(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        load(path)


def test_a_stored_head_is_tied_only_if_it_is_the_embedding(
    path: Path, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    (path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    head, embedding = tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]
    tied = load(rewrite(path, tensors))
    assert tied.lm_head is tied.model.embed_tokens
    also_tied = load(rewrite(path, {**tensors, "lm_head.weight": embedding.clone()}))
    assert also_tied.lm_head is also_tied.model.embed_tokens
    assert not caplog.messages
    head = torch.cat((embedding[:-1], head[-1:]))  # the last row alone differs
    for size in (1, 3):
        models = [load(rewrite(path, {**tensors, "lm_head.weight": head}), TPGroup(rank, size)) for rank in range(size)]
        assert torch.equal(whole_tensors(models)["lm_head.weight"], head)
        assert torch.equal(whole_tensors(models)["model.embed_tokens.weight"], embedding)
    assert "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in caplog.text


def test_the_single_file_counts_where_there_is_an_index_too(
    path: Path, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    split(path, {name: tensor + 1 for name, tensor in tensors.items()})
    assert torch.equal(whole_tensors([load(rewrite(path, tensors))])[UP], tensors[UP])
    assert "model.safetensors is taken, and model.safetensors.index.json beside it is not" in caplog.text


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", r"but pytorch_model.bin; convert it to safetensors: python -c .*AutoModelForCausalLM"),
        ("pytorch_model-00001-of-00002.bin", "convert it to safetensors"),
        ("model-q4.gguf", "but model-q4.gguf; convert it: python -m eagleray.models.loading.convert_gguf"),
        ("model-00001-of-00002.safetensors", "fetch the index, too"),
    ],
)
def test_weights_of_another_format(path: Path, file: str, words: str) -> None:
    (path / "model.safetensors").rename(path / file)
    with pytest.raises(
        ValueError, match=f"holds neither model.safetensors nor model.safetensors.index.json, .*{words}"
    ):
        load(path)


def test_the_command_that_converts_them_does(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="python -c") as refusal:
        load(path)
    (command,) = re.findall(r'python -c "(.*)"', str(refusal.value))
    exec(command)
    assert torch.equal(whole_tensors([load(path)])[UP], tensors[UP])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": []}, r"weight_map is \[\]"),
        ({}, "weight_map is None"),
        ({"weight_map": {UP: 5}}, "weight_map has 5 for tensor 'model.layers.1.mlp.up_proj.weight'; a file beside it"),
        ({"weight_map": {UP: None}}, "weight_map has None"),
        ({"weight_map": {UP: "../secret.safetensors"}}, "weight_map has '../secret.safetensors'"),
        ({"weight_map": {UP: "/etc/passwd"}}, "weight_map has '/etc/passwd'"),
        ({"weight_map": {UP: "x" * 300}}, "cannot be read|is missing"),
        ([], "contains a list, not an object"),
    ],
)
def test_an_index_that_is_none(path: Path, index: object, words: str) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"(model\.safetensors\.index\.json.*)?{words}"):
        load(path)


def test_a_tensor_that_two_files_hold(path: Path, tensors: dict[str, Tensor]) -> None:
    split(path, tensors)
    own = load_file(path / "b.safetensors")
    other = next(name for name in tensors if name not in own)
    save_file({**own, other: tensors[other] + 1}, path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {other} is in .*b.safetensors, but the index does not say so"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_that_are_no_floating_point_numbers(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors[UP] = torch.ones(64, 32).to(dtype)
    with pytest.raises(ValueError, match=rf"tensor {UP} in .* has dtype .*, but weights are .*, not quantized"):
        load(rewrite(path, tensors))


def with_header(path: Path, header: bytes, size: int | None = None) -> Path:
    file = path / "model.safetensors"
    whole = file.read_bytes()
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    file.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b"5",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, "x"]}}',
        b"[" * 100_000,
        b"\xff\xfe{}",
    ],
)
def test_a_header_that_lies(path: Path, header: bytes) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(with_header(path, header))


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_a_header_of_a_size_that_no_file_has(path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
        load(with_header(path, b"{}", size))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "hidden_size", "num_hidden_layers"])
def test_a_size_that_the_weights_do_not_have_is_refused_before_memory_is_taken(path: Path, key: str) -> None:
    values = {"hidden_size": 1 << 18, "num_hidden_layers": 1000}
    (path / "config.json").write_text(json.dumps({**CONFIG, key: values.get(key, 1 << 20)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"tensor .* (has shape|is missing)"):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "in KiB"


def test_positions_that_nobody_asks_for_take_no_memory(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 1 << 20}))
    model = load(path, max_positions=100)
    assert model.model.rotary.cos.shape == (100, 8)
    assert torch.equal(model.model.rotary.cos, load(path).model.rotary.cos[:100])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_dummy_weights_are_the_same_whole_tensors_at_any_size(path: Path, size: int) -> None:
    whole = whole_tensors([load(path, load_format="dummy", seed=3)])
    for name, tensor in whole_tensors(
        [load(path, TPGroup(rank, size), load_format="dummy", seed=3) for rank in range(size)]
    ).items():
        assert torch.equal(tensor, whole[name]), name


def test_dummy_weights_are_normal_and_depend_on_seed_and_name(path: Path) -> None:
    big = {**CONFIG, "hidden_size": 256, "intermediate_size": 1024}
    (path / "config.json").write_text(json.dumps(big))
    weights = whole_tensors([load(path, load_format="dummy")])
    up = weights[UP].flatten()
    assert up.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(up.mean().item()) < 2e-4
    normal = torch.distributions.Normal(0.0, 0.02)
    for quantile in (0.01, 0.25, 0.75, 0.99):
        below = (up < normal.icdf(torch.tensor(quantile))).float().mean().item()
        assert below == pytest.approx(quantile, abs=0.005)
    assert weights["model.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    others = [
        weights["model.layers.0.mlp.up_proj.weight"],
        whole_tensors([load(path, load_format="dummy", seed=1)])[UP],
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((up, other.flatten())))[0, 1].item()) < 0.01


def test_an_unknown_load_format(path: Path) -> None:
    with pytest.raises(ValueError, match="load_format is 'gguf'; choose one of safetensors, dummy"):
        load(path, load_format="gguf")
