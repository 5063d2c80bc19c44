"""A safetensors file in memory, of which only what is copied is read."""

import json
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}

Bytes = npt.NDArray[np.uint8]


class MappedFile:
    """The bytes of a safetensors file that was found to be whole."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        header = 8 + int.from_bytes(mapped[:8], "little")
        self._tensors = json.loads(mapped[8:header])
        self._data: Bytes = np.frombuffer(mapped, np.uint8)[header:]

    def region(self, name: str, region: tuple[slice, ...]) -> tuple[Bytes, torch.dtype]:
        """A view of a region of a tensor, with the bytes of a value as one dimension more, and the tensor's dtype.

        Raises `ValueError` for a dtype that weights never have.
        """
        entry = self._tensors[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"has dtype {entry['dtype']}, but weights are of {', '.join(DTYPES)}, not quantized")
        dtype = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        return self._data[begin:end].reshape(*entry["shape"], dtype.itemsize)[region], dtype
