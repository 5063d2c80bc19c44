"""Finds models of the Hugging Face hub in this node's cache, or downloads them.

`huggingface_hub` does the work and has its own settings: HF_HOME or HF_HUB_CACHE for the place, HF_TOKEN or
`hf auth login` for models that not everybody may have, HF_ENDPOINT for a mirror, HF_HUB_OFFLINE to ask nobody.
Its import takes half a second, so it waits until a model is named that is not a directory.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagleray.models.json_file import read_object

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SMALL_FILES = ["*.json", "*.jinja", "*.txt"]
NOT_OURS = ["*/*.json", "*/*.txt"]  # exports for other programs, in folders of their own
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """A model could not be fetched, though it may be there; the message says what was looked for, where, and why."""


def is_repository(name: str) -> bool:
    """Whether the hub may have a model of this name: OWNER/NAME, and not a path such as ./models/x."""
    return REPOSITORY.fullmatch(name) is not None


def fetch(repository: str, revision: str | None, weights: bool) -> Path:
    """The folder of a model, fetched as far as it is not there yet; its name is the commit.

    `revision` is a branch, a tag or a commit; without one it is what the hub has now. Without a network it is what was
    fetched last. `weights` are the safetensors; all else is small. A terminal shows a bar. Several processes may do
    this at once: each file is fetched by one of them. Raises `ValueError` if there is no such model or its owner lets
    only some people have it, `FetchError` if the hub cannot be reached or the disk is full.
    """
    with _explained(repository, revision):
        folder = _small_files(repository, revision)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{_about(repository, folder.name)} has no config.json, so it is not a model that can be run"
            )
        if weights:
            missing = [file for file in _weight_files(folder) if not (folder / file).is_file()]
            for file in missing[:1]:
                _look_for(repository, folder, file)
            for file in missing:
                _weights(repository, folder, file)
    return folder


def _small_files(repository: str, revision: str | None) -> Path:
    """All files but the weights; those in folders of their own are for other programs."""
    from huggingface_hub import snapshot_download

    with _without_bars():
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=NOT_OURS, max_workers=4
        )
    return Path(folder)


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors, which an index lists where there are several."""
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"weight_map in {index} is not a map from tensors to files; fetch the file again")
    return sorted(set(files.values()))


def _look_for(repository: str, folder: Path, file: str) -> None:
    """Ask once whether a file can be had: to fetch one, `huggingface_hub` asks for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=folder.name))
    except EntryNotFoundError as error:
        raise ValueError(
            f"{_about(repository, folder.name)} has no {file}, and safetensors are what Eagleray reads; name a model "
            "that has them, or load this one with transformers' AutoModelForCausalLM.from_pretrained(…) and give the "
            "directory of its save_pretrained(…)"
        ) from error


def _weights(repository: str, folder: Path, file: str) -> None:
    """One after another, so that Ctrl-C ends it at once; `huggingface_hub` would wait for all that it fetches."""
    from huggingface_hub import hf_hub_download

    logger.info("Fetching %s of %s from the Hugging Face hub", file, repository)
    hf_hub_download(repository, file, revision=folder.name)


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Errors, in words that say what was looked for, where, and what can be done."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, cache = _about(repository, revision), constants.HF_HUB_CACHE
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{what} is gated: request access on its page, and give a token of your account in HF_TOKEN or with "
            "`hf auth login`, on every node"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what} does not exist, though the model does; give another revision, or none") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no directory {repository}, and no {what}, or it is private: fix the name, or give a token in "
            "HF_TOKEN or with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # the first is a FileNotFoundError, too
        raise _unreachable(what, repository, error) from error
    except HfHubHTTPError as error:
        raise FetchError(f"{what} cannot be fetched: {_line(error)}; try again later") from error
    except ValueError:
        raise
    except OSError as error:
        remedy = "try again: what is whole stays" if error.errno is None else "make room there, or set HF_HOME"
        raise FetchError(f"{what} cannot be fetched into {cache}: {_line(error)}; {remedy}") from error
    except Exception as error:  # of its HTTP client, which is one in one version and another in the next
        raise _unreachable(what, repository, error) from error


def _unreachable(what: str, repository: str, error: Exception) -> FetchError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nobody is asked for it; unset it"
    else:
        why = f"the hub cannot be reached ({_cause(error)}); see to the network, or name a mirror in HF_ENDPOINT"
    return FetchError(
        f"{what} is not whole in {constants.HF_HUB_CACHE}, and {why}, or copy the model there "
        f"(`hf download {repository}`), or give a directory"
    )


def _about(repository: str, revision: str | None) -> str:
    from huggingface_hub import constants

    of = "" if revision is None else f", revision {revision},"
    return f"model {repository}{of} at {constants.ENDPOINT}"


def _cause(error: BaseException) -> str:
    """The innermost error, where its own words are about the network."""
    while (inner := error.__cause__) is not None:
        error = inner
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar for each of several small files."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
