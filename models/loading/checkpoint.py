"""A checkpoint on disk: safetensors in one file, or in several with `model.safetensors.index.json`.

Files are mapped, and a tensor's bytes are read only where a slice of it is taken.
"""

import json
import logging
from collections.abc import Iterable
from os.path import isfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eagleray.models.json_file import read_object, shown
from eagleray.models.loading.weight_formats import INDEX, SINGLE, find_format
from eagleray.models.loading.weight_stream import WeightStream
from eagleray.parallel.weight_shard import WeightShard

MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ROWS = 4096  # of a tensor that is compared with another, at a time
logger = logging.getLogger(__name__)


class Checkpoint:
    """Tensors by name. Use it as a context manager: files are opened once, when first needed, and closed at its end."""

    def __init__(self, path: str | Path) -> None:
        self._stream: WeightStream | None = None
        self._files: dict[Path, Any] = {}
        self.where = _locate(Path(path))  # tensor name -> file

    @property
    def streams(self) -> bool:
        """Whether shards are filled by a stream."""
        return self._stream is not None

    def stream(self, stream: WeightStream) -> None:
        """From now on `stream` fills shards, and they are there once the context ends without an error."""
        self._stream = stream

    def check(self, shards: Iterable[tuple[str, WeightShard]], superfluous: set[str]) -> None:
        """Raise `ValueError` unless the files hold every one of `shards` as it should be, and nothing else.

        Tensors named in `superfluous` may be there. Reads headers only.
        """
        known = set(superfluous)
        for name, shard in shards:
            known.add(name)
            try:
                self._slice(name, shard)
            except SafetensorError as error:
                raise self._unreadable(name, error) from error
            except ValueError as error:
                raise self._wrong(name, error) from error
        if left_over := sorted(self.where.keys() - known):
            name = left_over[0]
            others = f" (and {len(left_over) - 1} more)" if len(left_over) > 1 else ""
            raise ValueError(f"tensor {name}{others} in {self.where[name]} is left over: the model has no place for it")
        for file in sorted(set(self.where.values())):
            for name in sorted(self._open(file).keys()):
                if self.where.get(name) != file:
                    raise ValueError(f"tensor {name} is in {file}, but the index does not say so; fetch both again")

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and differ in at least one bit."""
        if one not in self.where or other not in self.where:
            return False
        first, second = (self._open(self.where[name]).get_slice(name) for name in (one, other))
        if (first.get_dtype(), first.get_shape()) != (second.get_dtype(), second.get_shape()):
            return True
        rows = first.get_shape()[0] if first.get_shape() else 0
        cuts = (slice(start, start + ROWS) for start in range(0, rows, ROWS))
        return not all(torch.equal(first[cut], second[cut]) for cut in cuts)

    def load(self, name: str, shard: WeightShard) -> None:
        """Fill `shard` from tensor `name`. Raises `ValueError` naming tensor and file."""
        try:
            source = self._slice(name, shard)
            if self._stream is None:
                shard.load(source)
            else:
                self._stream.fill(shard, self.where[name], name)
        except SafetensorError as error:
            raise self._unreadable(name, error) from error
        except ValueError as error:
            raise self._wrong(name, error) from error

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

    def _slice(self, name: str, shard: WeightShard) -> Any:
        """The tensor of `shard`, of which nothing is read yet, and which has the shape that the model needs."""
        if name not in self.where:
            holders = " and ".join(str(file) for file in sorted(set(self.where.values()))[:3]) or "the checkpoint"
            raise _Missing(f"tensor {name} is missing from {holders}")
        source = self._open(self.where[name]).get_slice(name)
        shard.check_shape(source)
        return source

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = open_file(file)
        return self._files[file]

    def _wrong(self, name: str, error: ValueError) -> ValueError:
        return error if isinstance(error, _Missing) else ValueError(f"tensor {name} in {self.where[name]} {error}")

    def _unreadable(self, name: str, error: SafetensorError) -> ValueError:
        return ValueError(f"tensor {name} cannot be read from {self.where[name]}: {error}")


class _Missing(ValueError):
    """Says by itself which tensor it is about."""


def open_file(file: Path) -> Any:
    """A mapped safetensors file. Raises `ValueError` when it is missing, cut short, or not a safetensors file."""
    try:
        if not isfile(file):
            raise ValueError(f"there is no file {file}")
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(_explain(file) or f"{file} is not a safetensors file: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _locate(path: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found = find_format(path)
    single, index = path / SINGLE, path / INDEX
    if found is None:
        raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}; fetch the weights, too")
    if found == SINGLE:
        if isfile(index):
            logger.warning("%s is taken, and %s beside it is not", single, INDEX)
        return dict.fromkeys(open_file(single).keys(), single)
    names = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is not an index of tensors: weight_map is {shown(names)}; fetch the file again")
    return {name: _within(path, index, name, file) for name, file in names.items()}


def _within(path: Path, index: Path, name: str, file: object) -> Path:
    """A file of the checkpoint's own folder."""
    if not isinstance(file, str) or not file or Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{index}: weight_map has {shown(file)} for tensor {shown(name)}; a file beside it is needed")
    return path / file


def _explain(file: Path) -> str | None:
    """The error for a file that does not open because its end is missing; None for another cause."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"{file} is cut short: it ends within its header, after {size} bytes"
        if header_size > MAX_HEADER_BYTES:
            return None
        header = stream.read(header_size)
    try:
        tensors = json.loads(header)
        ends = {name: entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"}
        for name, end in sorted(ends.items(), key=lambda item: item[1]):
            if 8 + header_size + end > size:
                at = 8 + header_size + end
                return f"tensor {name} in {file} is cut short: it ends at byte {at}, but the file has {size} bytes"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None  # the header cannot be read
    return None
