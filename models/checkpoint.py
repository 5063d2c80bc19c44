"""A checkpoint on disk: safetensors in one file, or in several with `model.safetensors.index.json`.

Files are mapped, and a tensor's bytes are read only where a slice of it is taken.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from eagleray.models.weight_stream import WeightStream
from eagleray.parallel.piece import Piece


class Checkpoint:
    """Tensors by name. Use it as a context manager: files are opened once, when first needed, and closed at its end."""

    def __init__(self, path: str | Path, stream: WeightStream | None = None) -> None:
        """With a `stream`, pieces are filled by it, and are there once the context ends without an error."""
        self._stream = stream
        self._files: dict[Path, Any] = {}
        self.where = _locate(Path(path))  # tensor name -> file

    def load(self, name: str, piece: Piece) -> None:
        """Fill `piece` from tensor `name`. Raises `ValueError` naming tensor and file."""
        if name not in self.where:
            raise ValueError(f"tensor {name} is missing from {self._holder()}")
        file = self.where[name]
        try:
            source = self._open(file).get_slice(name)
            if self._stream is None:
                piece.load(source)
            else:
                piece.check_shape(source)
                self._stream.fill(piece, file, name)
        except SafetensorError as error:
            raise ValueError(f"tensor {name} cannot be read from {file}: {error}") from error
        except ValueError as error:
            raise ValueError(f"tensor {name} in {file} {error}") from error

    def check_left_over(self, loaded: set[str]) -> None:
        """Raise `ValueError` when the checkpoint holds a tensor that the model has no place for."""
        left_over = sorted(self.where.keys() - loaded)
        if left_over:
            name = left_over[0]
            others = f" (and {len(left_over) - 1} more)" if len(left_over) > 1 else ""
            raise ValueError(f"tensor {name}{others} in {self.where[name]} is left over: the model has no place for it")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, at)
        self._files.clear()
        if self._stream is not None:
            if error is None:
                self._stream.finish()
            else:
                self._stream.abandon()

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = open_file(file)
        return self._files[file]

    def _holder(self) -> str:
        return " and ".join(str(file) for file in sorted(set(self.where.values()))[:3]) or "the checkpoint"


def open_file(file: Path) -> Any:
    """A mapped safetensors file. Raises `ValueError` when it is missing, cut short, or no safetensors file."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(_explain(file) or f"{file} is no safetensors file: {error}") from error


def _locate(path: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no index of tensors: {error!r}") from error
        return {name: path / file for name, file in names.items()}
    if not single.is_file():
        raise ValueError(f"{path} holds neither {single.name} nor {index.name}")
    return dict.fromkeys(open_file(single).keys(), single)


def _explain(file: Path) -> str | None:
    """What is wrong with a file that does not open, if it is that its end is missing."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"{file} is cut short: it ends within its header, after {size} bytes"
        try:
            tensors = json.loads(stream.read(header_size))
        except ValueError:
            return None
    tensors.pop("__metadata__", None)
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        end = 8 + header_size + entry["data_offsets"][1]
        if end > size:
            return f"tensor {name} in {file} is cut short: it ends at byte {end}, but the file has {size} bytes"
    return None
