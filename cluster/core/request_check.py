"""Refuses requests that the ranks could not run, or that would harm others.

Front ends check what users give, in words for users. This protects the engine from front ends that do not.
"""

from dataclasses import dataclass

import numpy as np

from eagleray.cluster.core.messages import MAX_PRIORITY, EngineRequest
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import MAX_BIAS, MAX_SEED, SamplingParams
from eagleray.workers.protocol.messages import Sampling

ITEM = 4  # bytes of an int32
_BOUNDS = {
    name: option.bounds
    for name, option in options(SamplingParams).items()
    if option.bounds and name in Sampling.__struct_fields__
}


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the model and the engine allow."""

    vocab_size: int
    max_model_len: int


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Raise `ValueError` naming what is out of range."""
    prompt = request.prompt_token_ids
    if not prompt or len(prompt) % ITEM:
        raise ValueError(f"the prompt has {len(prompt)} bytes; send {ITEM} for each token, and one token at least")
    length = len(prompt) // ITEM
    if not 1 <= request.max_tokens <= limits.max_model_len - length:
        raise ValueError(
            f"the prompt has {length} tokens and max_tokens is {request.max_tokens}, but the model holds "
            f"{limits.max_model_len} of both, with at least one generated"
        )
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise ValueError(f"priority is {request.priority}; send one from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    if not all(0 <= seed <= MAX_SEED for seed in request.seeds):
        raise ValueError("a seed does not fit in 64 bits")
    token_ids = np.frombuffer(prompt, np.int32)
    _check_ids("the prompt", (int(token_ids.min()), int(token_ids.max())), limits)
    _check_sampling(request.sampling, limits)


def _check_sampling(sampling: Sampling, limits: EngineLimits) -> None:
    for name, (low, high) in _BOUNDS.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # NaN is in no range
            raise ValueError(f"{name} is {value!r}; send one from {low:g} to {high:g}")
    if sampling.top_p == 0:
        raise ValueError("top_p is 0, so that nothing could be drawn")
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, limits)
    _check_ids("stop_token_ids", sampling.stop_token_ids, limits)
    for word in sampling.bad_words:
        if not word:
            raise ValueError("bad_words holds an empty word")
        _check_ids("bad_words", word, limits)
    _check_ids("logit_bias", sampling.logit_bias, limits)
    if not all(-MAX_BIAS <= bias <= MAX_BIAS for bias in sampling.logit_bias.values()):
        raise ValueError(f"logit_bias holds a number beyond {MAX_BIAS}")


def _check_ids(where: str, token_ids: "tuple[int, ...] | list[int] | dict[int, float]", limits: EngineLimits) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < limits.vocab_size:
            raise ValueError(
                f"{where} holds the token id {token_id}, but the vocabulary ends at {limits.vocab_size - 1}"
            )
