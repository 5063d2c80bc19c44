"""Reads a checkpoint's `generation_config.json`: end-of-sequence ids and sampling defaults."""

import logging
from collections.abc import Collection
from os.path import isfile
from pathlib import Path
from typing import Any, Literal, get_args

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.models.json_file import read_object, shown

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
Choice = Literal["auto", "none"]  # whose sampling defaults hold
CHOICES: tuple[str, ...] = get_args(Choice)
CHOICE_HELP = "auto takes sampling defaults from the model's generation_config.json; none ignores that file"
MAX_EOS = 1000  # ends of a sequence, which go with every request
NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # each with its values that ask for nothing
    **dict.fromkeys(
        (
            *("bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "epsilon_cutoff", "eta_cutoff"),
            *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "force_words_ids"),
            *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "no_repeat_ngram_size"),
            *("penalty_alpha", "sequence_bias", "stop_strings", "suppress_tokens", "token_healing", "top_h"),
            "watermarking_config",
        ),
        NOTHING,
    ),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), (None, 1)),
}
DEFAULTED = tuple(name for name, option in options(SamplingParams).items() if option.of_model)


def eos_token_ids(model: str | Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every token that ends a sequence: generation_config.json's, or else config.json's, and the tokenizer's.

    Both files may hold one id or a list. Raises `ValueError` for anything else.
    """
    files = (Path(model) / FILE, Path(model) / "config.json")
    named = next(filter(None, [_eos_of(file) for file in files]), [])
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset(named).union(own)


def drawable(eos: frozenset[int], vocab_size: int) -> frozenset[int]:
    """The end tokens that a model of this vocabulary can draw; a request may name no others."""
    if beyond := sorted(token_id for token_id in eos if token_id >= vocab_size):
        logger.warning("%s can end no sequence: the model's vocabulary ends at %d", beyond[:10], vocab_size - 1)
    return eos.difference(beyond)


def sampling_defaults(model: str | Path) -> dict[str, Any]:
    """What generation_config.json says of the options in `DEFAULTED`, for requests that do not set them.

    As in transformers, `do_sample: false` means greedy, and without a generation_config.json, config.json is read,
    where older models have these. Limits of length are left to requests. Raises `ValueError` for values out of range
    and for what is not supported.
    """
    file = Path(model) / FILE
    if not isfile(file):
        file = Path(model) / "config.json"
    said = read_object(file)
    found = {name: value for name, value in said.items() if name in DEFAULTED and value is not None}
    if said.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
        for name, nothing in UNSUPPORTED.items():
            if (value := said.get(name)) not in nothing:
                raise ValueError(f"{name} is {shown(value)}, which Eagleray does not support; remove it")
    except ValueError as error:
        raise ValueError(f"{file}: {error}; fix the file, or ignore it with generation_config 'none'") from None
    return found


def default_params(model: str | Path, choice: str = "auto") -> SamplingParams:
    """The parameters of requests that bring none: the model's with `auto`, those of `SamplingParams` with `none`.

    Raises `ValueError` for another choice, and for a file that is wrong.
    """
    if choice not in CHOICES:
        raise ValueError(f"generation_config is {choice!r}; give 'auto' for the model's own sampling, or 'none'")
    return SamplingParams(**(sampling_defaults(model) if choice == "auto" else {}))


def chosen_defaults(model: str | Path, choice: str, overruled: Collection[str] = ()) -> dict[str, float]:
    """The sampling defaults of requests to a model: those of its generation_config.json with `auto`, none with `none`.

    The log names them; those that are `overruled` are left out. Raises `ValueError` for a file that is wrong.
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
