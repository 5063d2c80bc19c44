"""Runs an API request on the engine and yields what is new of each choice."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from uuid import uuid4

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.inputs import derive_seed
from eagleray.cluster.frontend.prompts import TokensPrompt
from eagleray.cluster.outputs import NO_TOKEN_LEFT, CompletionOutput, Logprob, RequestOutput, RequestOutputKind
from eagleray.cluster.sampling_params import MAX_N, SamplingParams
from eagleray.deploy.openai.errors import ApiError, bad_requests
from eagleray.deploy.openai.limits import check_lists
from eagleray.deploy.openai.merge_streams import merged
from eagleray.deploy.openai.request_context import engine_time, place_taken, row_seed, tenant_asking
from eagleray.deploy.openai.requests import GenerationRequest
from eagleray.deploy.openai.responses import FinishReason, PromptTokensDetails, Usage
from eagleray.deploy.openai.sampling import FIELDS
from eagleray.deploy.openai.truncate import excerpt

LOGGED = ("user", "safety_identifier", "session_id", "metadata")  # fields that change nothing in an answer
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One request: prompts, and the parameters of all."""

    id: str  # for the client, who may have chosen it
    unique: str  # for the engine
    prompts: list[TokensPrompt]
    params: SamplingParams
    priority: int
    clip: bool  # end where the model does, rather than refuse more tokens

    @classmethod
    def of(
        cls,
        kind: str,
        request: GenerationRequest,
        prompts: list[TokensPrompt],
        params: SamplingParams,
        *,
        clip: bool = False,
    ) -> "Job":
        """One that has its places in the queue (`take_places`)."""
        unique = uuid4().hex
        job = cls(f"{kind}-{request.request_id or unique}", unique, prompts, params, request.priority or 0, clip)
        told = {name: excerpt(value) for name in LOGGED if (value := getattr(request, name))}
        if told:
            logger.info("%r is for %s", job.id, ", ".join(f"{name} {value}" for name, value in told.items()))
        return job

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.params.n

    def params_of(self, number: int) -> SamplingParams:
        """Of one prompt: a row of a batch may have a seed, of which each of its prompts has a share of its own."""
        if self.params.greedy or self.params.seed is not None or (seed := row_seed.get()) is None:
            return self.params
        return replace(self.params, seed=derive_seed(seed, number))


def take_places(params: SamplingParams, num_prompts: int) -> None:
    """Take a place in the queue for each choice.

    Raises `ApiError`: 400 if there are too many, or too much that ranks would be told for each, 429 if the queue has no
    places for them.
    """
    num_choices, param = num_prompts * params.n, "n" if params.n > 1 else "prompt"
    if num_choices > MAX_N:
        message = f"{num_prompts} prompts with n {params.n} are {num_choices} choices; ask for at most {MAX_N}"
        raise ApiError(400, message, param=param)
    check_lists(params, num_choices)
    if (place := place_taken.get()) is not None:
        place.take_further(num_choices - 1, param)


async def outputs(
    engine: AsyncClient, job: Job, kind: RequestOutputKind
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """News of every prompt, with its number, as soon as it is there. Leaving the iteration aborts what runs.

    Raises `ApiError` 400 for what the engine refuses, `EngineDeadError`, and `ApiError` 500 once a choice fails.
    """
    streams = [_outputs(engine, job, number, kind) for number in range(len(job.prompts))]
    async with aclosing(merged(streams)) as news:
        async for number, output in news:
            for sequence in output.outputs:
                _check(sequence)
            yield number, output


async def _outputs(
    engine: AsyncClient, job: Job, number: int, kind: RequestOutputKind
) -> AsyncGenerator[RequestOutput, None]:
    stream = engine.generate(
        job.prompts[number],
        job.params_of(number),
        f"{job.unique}-{number}",
        priority=job.priority,
        output_kind=kind,
        group=job.unique,
        tenant=tenant_asking.get(),
        clip=job.clip,
    )
    with bad_requests(FIELDS):
        async with aclosing(stream):
            async for output in stream:
                if output.finished and (in_engine := engine_time.get()) is not None:
                    in_engine.note(output.metrics)
                yield output


def _check(sequence: CompletionOutput) -> None:
    if sequence.error_code == NO_TOKEN_LEFT:
        raise ApiError(400, f"{sequence.error}")
    if sequence.finish_reason == "error":
        raise ApiError(500, f"the engine failed: {sequence.error}", "server_error", code="engine_error")
    if sequence.finish_reason == "abort":
        raise ApiError(503, "the server ended the request; try again later", "server_error", code="aborted")


@dataclass(frozen=True, slots=True)
class News:
    """What is new of one choice."""

    first: bool
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(slots=True)
class ChoiceProgress:
    """How much of one choice was handed on."""

    num_tokens: int = 0

    def news_of(self, delta: CompletionOutput) -> News | None:
        """What came since the last call; None if nothing did."""
        if not delta.token_ids and delta.finish_reason is None:
            return None
        news = News(
            first=self.num_tokens == 0,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=_finish_reason(delta),
            stop_reason=delta.stop_reason,
        )
        self.num_tokens += len(delta.token_ids)
        return news


NOTHING_ELSE: dict[str, None] = {"logprobs": None, "finish_reason": None, "stop_reason": None}  # beside the text


def is_text_alone(delta: CompletionOutput) -> bool:
    """Whether tokens came and the sequence goes on, so that only the text has to be sent."""
    return delta.finish_reason is None and bool(delta.token_ids)


def _finish_reason(sequence: CompletionOutput) -> FinishReason | None:
    match sequence.finish_reason:
        case "stop":
            return "stop"
        case "length":
            return "length"
        case other:
            assert other is None, f"{other} was checked before"
            return None


@dataclass(slots=True)
class Count:
    """Tokens of a job."""

    num_new: int = 0
    prompts: dict[int, RequestOutput] = field(default_factory=dict)  # the last output of each

    def add(self, number: int, output: RequestOutput) -> None:
        """Count what is new of a prompt."""
        self.prompts[number] = output
        self.num_new += sum(len(delta.token_ids) for delta in output.outputs)

    def usage(self, *, prompt_only: bool = False) -> Usage:
        """The usage of all that came."""
        num_prompt = sum(len(output.prompt_token_ids) for output in self.prompts.values())
        num_cached = sum(output.num_cached_tokens or 0 for output in self.prompts.values())
        return _usage(num_prompt, num_cached, 0 if prompt_only else self.num_new)


def usage(output: RequestOutput, num_new: int) -> Usage:
    """The usage of a prompt and this many generated tokens."""
    return _usage(len(output.prompt_token_ids), output.num_cached_tokens or 0, num_new)


def _usage(num_prompt: int, num_cached: int, num_new: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )
