"""Recognises weights that are not safetensors and says how to convert them. Imports no torch, so that it can be said
before anything starts.
"""

from os.path import isfile
from pathlib import Path

LOAD_FORMATS = ("safetensors", "dummy")  # what `load_model` takes
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH = ("pytorch_model*.bin", "consolidated*.pth", "*.pth", "*.pt")


def find_format(path: Path) -> str | None:
    """Which of the two names of safetensors a folder has; None for neither.

    Where it has both the single file counts and not the index, as in transformers. Raises `ValueError` with the remedy
    if weights of another format are there instead.
    """
    for name in (SINGLE, INDEX):
        if isfile(path / name):
            return name
    if remedy := _remedy(path):
        raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}, but {remedy}")
    return None


def _remedy(path: Path) -> str | None:
    for pattern in _TORCH:
        for file in sorted(path.glob(pattern)):
            load = f"AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype='auto')"
            return (
                f"{file.name}; convert it to safetensors: "
                f'python -c "from transformers import AutoModelForCausalLM; {load}.save_pretrained({str(path)!r})"'
            )
    for file in sorted(path.glob("*.safetensors")):
        return f"{file.name}; rename it if it is the only one, or fetch the index, too"
    for file in sorted(path.glob("*.gguf")):
        folder = path.parent / f"{path.name}-converted"
        return f"{file.name}; convert it: python -m eagleray.models.loading.convert_gguf {file} {folder}"
    return None
