"""Finds the directory of a model on this node by the name that the user gave. Importing this needs no torch."""

from pathlib import Path

from eagleray.models.loading.demo_model import NAME, demo_model
from eagleray.models.loading.hub import fetch, is_repository

DEMO = "demo"


def model_dir(model: str, revision: str | None = None, weights: bool = False) -> Path:
    """The directory of `model`: that directory itself, the demo model's for "demo", or that of OWNER/NAME on the hub.

    What is not on this node yet is fetched, weights only if they are wanted. A directory comes before a model of the
    hub that has its name. Raises `ValueError` if there is neither, `DemoModelError` and `FetchError`.
    """
    if not model:
        raise ValueError("model is ''; name a directory, a model of the Hugging Face hub as OWNER/NAME, or demo")
    folder = Path(model).expanduser()
    if model == DEMO or folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {model} is not a model of the Hugging Face hub; leave it out"
            )
        return demo_model() if model == DEMO else folder
    if not is_repository(model):
        raise ValueError(
            f"there is no model directory {folder}; give one with config.json, safetensors and tokenizer.json, "
            "or a model of the Hugging Face hub as OWNER/NAME, such as Qwen/Qwen3-0.6B, or demo"
        )
    return fetch(model, revision, weights)


def is_of_hub(model: str) -> bool:
    """Whether `model_dir` looks for it on the hub."""
    return model != DEMO and not Path(model).expanduser().is_dir() and is_repository(model)


def public_name(model: str) -> str:
    """What clients call it, unless they are told otherwise: the last part of a directory, OWNER/NAME of the hub."""
    if model == DEMO:
        return NAME
    return model if is_of_hub(model) else Path(model).expanduser().resolve().name
