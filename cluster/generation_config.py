"""What a checkpoint says about how generation goes and ends."""

import logging
from collections.abc import Collection
from os.path import isfile
from pathlib import Path
from typing import Any

from eagleray.cluster.sampling_params import SamplingParams
from eagleray.cluster.tokenizer import Tokenizer
from eagleray.models.json_file import read_object, shown

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
MAX_EOS = 1000  # ends of a sequence, which go with every request
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # vLLM's, but for its limit of tokens


def eos_token_ids(model: str | Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every token that ends a sequence: generation_config.json's, or else config.json's, and the tokenizer's.

    Both files may hold one id or a list. Raises `ValueError` for anything else.
    """
    files = (Path(model) / FILE, Path(model) / "config.json")
    named = next(filter(None, [_eos_of(file) for file in files]), [])
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset(named).union(own)


def drawable(eos: frozenset[int], vocab_size: int) -> frozenset[int]:
    """Those ends that a model of this vocabulary can draw; a request must name no others."""
    if beyond := sorted(token_id for token_id in eos if token_id >= vocab_size):
        logger.warning("%s can end no sequence: the model's vocabulary ends at %d", beyond[:10], vocab_size - 1)
    return eos.difference(beyond)


def sampling_defaults(model: str | Path) -> dict[str, Any]:
    """What generation_config.json would have where a request does not say: those of `DEFAULTED` that it holds.

    As vLLM, this takes `do_sample: false` for no word on temperature. As transformers, it takes config.json, where
    older models have them, if there is no generation_config.json. Raises `ValueError` for values out of range.
    """
    file = Path(model) / FILE
    if not isfile(file):
        file = Path(model) / "config.json"
    found = {name: value for name, value in read_object(file).items() if name in DEFAULTED and value is not None}
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; mend the file, or leave it alone with generation_config 'none'") from None
    return found


def default_params(model: str | Path) -> SamplingParams:
    """Of requests that bring no parameters at all. Raises `ValueError` for values out of range."""
    return SamplingParams(**sampling_defaults(model))


def chosen_defaults(model: str | Path, choice: str, overruled: Collection[str] = ()) -> dict[str, float]:
    """Of requests to a model: its generation_config.json's with `auto`, with `none` OpenAI's.

    The log says which; those that are `overruled` are left out.
    Raises `ValueError` for a file that is wrong.
    """
    of_model = sampling_defaults(model) if choice == "auto" else {}
    found = {name: value for name, value in of_model.items() if name not in overruled}
    if found:
        words = ", ".join(f"{name} {value:g}" for name, value in found.items())
        logger.info("sampling defaults of the model's generation_config.json: %s", words)
    return found


def _eos_of(file: Path) -> list[int]:
    value = read_object(file).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"eos_token_id in {file} is {shown(value)}; write one token id or a list of up to {MAX_EOS}")
    return ids
