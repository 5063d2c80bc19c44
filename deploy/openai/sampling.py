"""Converts a request's fields to `SamplingParams`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eagleray.cluster.options import NULL, Option
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.errors import ApiError, bad_requests
from eagleray.deploy.openai.field_types import DEFAULT_MAX_TOKENS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, SAMPLING
from eagleray.deploy.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from eagleray.deploy.openai.truncate import excerpt

OTHERWISE = {"max_tokens", "logprobs", "prompt_logprobs", "logit_bias"}  # whose meaning is another in requests
SAME_NAME = tuple(name for name in SAMPLING if name in GenerationRequest.model_fields and name not in OTHERWISE)
Defaults = Mapping[str, float]

COMPLETION_LENGTH = replace(SAMPLING["max_tokens"], none=f"for {DEFAULT_MAX_TOKENS}")  # what null stands for here
FIELDS = frozenset({*CompletionRequest.model_fields, *ChatRequest.model_fields})


def completion_params(request: CompletionRequest, defaults: Defaults) -> SamplingParams:
    """`defaults` are the model's own. Without max_tokens it is OpenAI's, which may be more than the model has room for.

    With `echo` and max_tokens 0, which asks for the prompt alone, the one token that is generated is to be dropped.
    """
    n = 1 if request.n is None else request.n
    if request.best_of not in (None, 1, n):
        message = f"best_of is {excerpt(request.best_of)}, but this server does not rank choices"
        raise ApiError(400, f"{message}; leave it out, or give 1 or n", param="best_of")
    max_tokens = request.max_tokens
    if max_tokens is None:
        least = request.min_tokens or 0
        _check("min_tokens", least, SAMPLING["min_tokens"])
        max_tokens = max(DEFAULT_MAX_TOKENS, least)
    if prompt_only(request):
        if request.min_tokens:
            message = f"min_tokens is {excerpt(request.min_tokens)}, more than max_tokens 0; leave one of them out"
            raise ApiError(400, message, param="min_tokens")
        max_tokens = 1
    _check("max_tokens", max_tokens, COMPLETION_LENGTH)
    wanted = [request.prompt_logprobs, request.logprobs if request.echo else None]
    most = max((each for each in wanted if each is not None), default=None)
    return _params(request, defaults, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=most)


def prompt_only(request: CompletionRequest) -> bool:
    """Whether nothing is to be generated, only the prompt echoed."""
    return bool(request.echo) and request.max_tokens == 0


def chat_params(request: ChatRequest, defaults: Defaults) -> SamplingParams:
    """Without a limit of the client's, the model's room is the limit; of two, that under the new name."""
    for name in ("max_completion_tokens", "max_tokens"):
        _check(name, getattr(request, name), SAMPLING["max_tokens"])
    if request.top_logprobs and not request.logprobs:
        message = f"top_logprobs is {excerpt(request.top_logprobs)} without logprobs; set logprobs to true"
        raise ApiError(400, message, param="top_logprobs")
    _check("top_logprobs", request.top_logprobs, SAMPLING["logprobs"])
    old, new = request.max_tokens, request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = old if new is None else new
    return _params(request, defaults, max_tokens=limit, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs)


def _check(name: str, value: object, option: Option) -> None:
    """Raise `ApiError` for a value that `option` does not take, which is called `name` here."""
    if not option.holds(value):
        raise ApiError(400, f"{name} is {excerpt(value)}; {option.remedy(NULL)}", param=name)


def _params(request: GenerationRequest, defaults: Defaults, **others: Any) -> SamplingParams:
    same = {name: value for name in SAME_NAME if (value := getattr(request, name)) is not None}
    same = {**defaults, **same}
    if request.stop == "":
        del same["stop"]
    if isinstance(request.stop, list) and len(request.stop) > MAX_STOP_STRINGS:
        message = f"stop has {len(request.stop)} texts; give at most {MAX_STOP_STRINGS}"
        raise ApiError(400, message, param="stop")
    num_characters = sum(map(len, request.stop or ()))  # of a text, too
    if num_characters > MAX_STOP_CHARACTERS:
        message = f"stop has {num_characters} characters in all; give at most {MAX_STOP_CHARACTERS}"
        raise ApiError(400, message, param="stop")
    if request.stream_options is not None and request.stream_options.asks and not request.stream:
        message = "stream_options are for streams; leave them out or set stream to true"
        raise ApiError(400, message, param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        message = "prompt_logprobs are not for streams; leave them out or set stream to false"
        raise ApiError(400, message, param="prompt_logprobs")
    with bad_requests(FIELDS):
        return SamplingParams(logit_bias=_biases(request.logit_bias), **same, **others)


def _biases(by_text: dict[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are text."""
    if by_text is None:
        return None
    if odd := next((key for key in by_text if not (key.isascii() and key.isdigit() and len(key) <= 10)), None):
        raise ValueError(f"logit_bias has the key {excerpt(odd)}; give token ids as keys")
    biases = {int(key): bias for key, bias in by_text.items()}
    if len(biases) < len(by_text):
        twice = next(key for key in by_text if key != str(int(key)))
        raise ValueError(f"logit_bias has the key {excerpt(twice)} beside {int(twice)}; give each token id once")
    return biases
