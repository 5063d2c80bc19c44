"""Converts a prompt and its sampling parameters to an engine request, checked against the model."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec
import numpy as np

from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.errors import ContextLengthError, counted
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import MAX_SEED, TOKEN_ID_OPTIONS, SamplingParams
from eagleray.workers.protocol.messages import Sampling

MAX_TOKEN_ID = 2**31 - 1  # ids travel as int32
_TOLD_HINTS = get_type_hints(Sampling)
PASSED_THROUGH = [  # options that have the same name and type on both sides
    option for name, option in options(SamplingParams).items() if _TOLD_HINTS.get(name) == option.hint
]


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What of the model a request is checked against."""

    max_model_len: int  # tokens of prompt and output together
    vocab_size: int
    eos_token_ids: frozenset[int]


def engine_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    limits: ModelLimits,
    sampling: Sampling,
    *,
    first_id: int,
    derived_seed: int,
    priority: int = 0,
    group: str = "",
    tenant: str = "",
    clip: bool = False,
) -> EngineRequest:
    """What is to run for the `n` sequences: one where all would be equal. Raises `ValueError` for what cannot run.

    `sampling` is that of `params`, but for the seed. With `clip` more `max_tokens` than the model has room for are as
    many as it has.
    """
    seed = (derived_seed if params.seed is None else params.seed) & MAX_SEED
    return EngineRequest(
        id=first_id,
        prompt_token_ids=_packed(prompt_token_ids, limits),
        sampling=sampling if params.greedy else msgspec.structs.replace(sampling, seed=seed),
        max_tokens=_max_tokens(len(prompt_token_ids), params, limits, clip),
        priority=priority,
        seeds=[derive_seed(seed, index) for index in range(1, params.num_distinct)],
        group=group,
        tenant=tenant,
    )


def derive_seed(seed: int, number: int) -> int:
    """The seed of this number that is made of another: splitmix64 (Steele, Lea, Flood 2014), so that all lie far apart.

    For the requests of an engine, and for the sequences of a request after its first.
    """
    mixed = seed + 0x9E3779B97F4A7C15 * (number + 1) & MAX_SEED
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MAX_SEED
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MAX_SEED
    return mixed ^ mixed >> 31


def _packed(prompt_token_ids: Sequence[int], limits: ModelLimits) -> bytes:
    if not prompt_token_ids:
        raise ValueError("the prompt is empty; give it at least one token")
    try:
        packed = array("i", prompt_token_ids)
    except (TypeError, OverflowError):
        odd = next(i for i in prompt_token_ids if not isinstance(i, int) or not -MAX_TOKEN_ID <= i <= MAX_TOKEN_ID)
        raise ValueError(f"the prompt holds {odd!r}; give token ids from 0 to {limits.vocab_size - 1}") from None
    ids = np.frombuffer(packed, np.int32)
    for token_id in (int(ids.min()), int(ids.max())):
        _check_token("the prompt", token_id, limits)
    return packed.tobytes()


def _check_token(where: str, token_id: int, limits: ModelLimits) -> None:
    if not 0 <= token_id < limits.vocab_size:
        raise ValueError(
            f"{where} holds the token id {token_id}, but the model's vocabulary ends at {limits.vocab_size - 1}; "
            "check that the tokenizer belongs to the model"
        )


def _max_tokens(num_prompt_tokens: int, params: SamplingParams, limits: ModelLimits, clip: bool) -> int:
    room = limits.max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {counted(num_prompt_tokens, 'token')}, but the model holds {limits.max_model_len} "
            f"with at least one generated; shorten the prompt by {1 - room}"
        )
    if params.max_tokens is not None and params.max_tokens > room and not clip:
        raise ContextLengthError(
            f"the prompt has {counted(num_prompt_tokens, 'token')} and max_tokens asks for {params.max_tokens} more, "
            f"but the model holds {limits.max_model_len}; shorten the prompt or lower max_tokens to {room}"
        )
    if params.min_tokens > room:
        raise ContextLengthError(
            f"the prompt has {counted(num_prompt_tokens, 'token')} and min_tokens asks for {params.min_tokens} more, "
            f"but the model holds {limits.max_model_len}; shorten the prompt or lower min_tokens to {room}"
        )
    return min(params.max_tokens or room, room)


def sampling_of(params: SamplingParams, limits: ModelLimits, bad_words: list[list[int]]) -> Sampling:
    """How tokens are drawn, the same for every prompt but for the seed, which is not here.

    `bad_words` are those of `params` as tokens. Raises `ValueError` for what the model cannot draw by.
    """
    stop_token_ids = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else limits.eos_token_ids)}
    for name in TOKEN_ID_OPTIONS:
        for token_id in getattr(params, name) or ():
            _check_token(name, token_id, limits)
    for word in bad_words:
        for token_id in word:
            _check_token("bad_words", token_id, limits)
    _check_drawable(params, limits, stop_token_ids if params.min_tokens else set(), bad_words)
    told = _passed_through(params) | {
        "top_k": 0 if params.greedy else max(params.top_k, 0),
        "logit_bias": {token_id: float(bias) for token_id, bias in (params.logit_bias or {}).items()},
        "bad_words": bad_words,
        "allowed_token_ids": sorted(set(params.allowed_token_ids or ())),
        "stop_token_ids": sorted(stop_token_ids),
    }
    return Sampling(**told)


def _check_drawable(
    params: SamplingParams, limits: ModelLimits, stop_token_ids: set[int], bad_words: list[list[int]]
) -> None:
    """Raise `ValueError` if no token could be drawn as the first. `stop_token_ids` are those that it may not be."""
    barred = stop_token_ids.union(word[0] for word in bad_words if len(word) == 1)
    allowed = params.allowed_token_ids
    if len(barred) < limits.vocab_size if allowed is None else not barred.issuperset(allowed):
        return
    names = ["bad_words"] * bool(bad_words) + [f"stop tokens before min_tokens {params.min_tokens}"] * bool(
        stop_token_ids
    )
    which = "every token of the vocabulary is" if allowed is None else "allowed_token_ids are all"
    raise ValueError(f"{which} among {' or '.join(names)}, so that nothing could be drawn; leave one of them out")


def _passed_through(params: SamplingParams) -> dict[str, Any]:
    """By name. Of a greedy request without those that matter only where chance decides, and its temperature is 0."""
    told = [option for option in PASSED_THROUGH if not (option.random and params.greedy)]
    values = {option.name: getattr(params, option.name) for option in told}
    values |= {option.name: float(values[option.name]) for option in told if option.hint is float}
    return values | {"temperature": 0.0} if params.greedy else values
