"""`/v1/chat/completions`: answer conversations."""

import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from eagleray.cluster.outputs import RequestOutput, RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.cluster.tokenizer import Tokenizer
from eagleray.deploy.openai.inputs import conversation_prompt
from eagleray.deploy.openai.jobs import Count, Growth, Job, News, outputs, usage
from eagleray.deploy.openai.limits import MAX_TOKENIZED
from eagleray.deploy.openai.logprobs import chat_logprobs, prompt_logprobs
from eagleray.deploy.openai.replies import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    PromptLogprobs,
)
from eagleray.deploy.openai.sampling import chat_params
from eagleray.deploy.openai.schema import ChatRequest, StreamOptions
from eagleray.deploy.openai.served import Served


async def chat_completion(served: Served, request: ChatRequest) -> ChatCompletion:
    """The whole answer. Raises `ApiError` and `EngineDeadError`."""
    job = await _job(served, request)
    created, count = int(time.time()), Count()
    async with aclosing(outputs(served.engine, job, RequestOutputKind.FINAL_ONLY)) as news:
        async for number, output in news:
            count.add(number, output)
    return ChatCompletion(
        id=job.id,
        object="chat.completion",
        created=created,
        model=served.model_name,
        choices=_choices(request, count.prompts[0], job.params[0], served.engine.tokenizer),
        usage=count.usage(),
        prompt_logprobs=_prompt_logprobs(request, count.prompts[0]),
        **_tier(request),
        **_prompt_ids(request, count.prompts[0]),
    )


async def chat_chunks(served: Served, request: ChatRequest) -> AsyncGenerator[ChatCompletionChunk, None]:
    """What is new, choice by choice. Raises as `chat_completion`. Leaving the iteration aborts what runs."""
    job = await _job(served, request)
    created, count = int(time.time()), Count()

    def chunk(choices: list[ChunkChoice], **others: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=job.id,
            object="chat.completion.chunk",
            created=created,
            model=served.model_name,
            choices=choices,
            **others,
            **_tier(request),
        )

    options = request.stream_options or StreamOptions()
    in_each = options.continuous_usage_stats
    growth: defaultdict[int, Growth] = defaultdict(Growth)
    async with aclosing(outputs(served.engine, job, RequestOutputKind.DELTA)) as news_of_all:
        async for number, output in news_of_all:
            count.add(number, output)
            for sequence in output.outputs:
                if (news := growth[sequence.index].take(sequence)) is not None:
                    so_far = {"usage": usage(output, growth[sequence.index].num_tokens)} if in_each else {}
                    choice = _chunk_choice(request, sequence.index, news, job.params[0], served.engine.tokenizer)
                    yield chunk([choice], **so_far, **(_prompt_ids(request, output) if news.first else {}))
    if options.include_usage:
        yield chunk([], usage=count.usage())


def _tier(request: ChatRequest) -> dict[str, Any]:
    """The only one, for those who ask."""
    return {} if request.service_tier is None else {"service_tier": "default"}


async def _job(served: Served, request: ChatRequest) -> Job:
    served.check_model(request.model)
    served.check_priority(request.priority)
    params = chat_params(request, served.defaults)
    longest = None if request.truncate_prompt_tokens is None else MAX_TOKENIZED
    prompt = await conversation_prompt(served, request, longest)
    served.limits.check_reply([prompt], [params])
    return Job.of("chatcmpl", request, [prompt], [params])


def _prompt_ids(request: ChatRequest, output: RequestOutput) -> dict[str, Any]:
    return {"prompt_token_ids": output.prompt_token_ids} if request.return_token_ids else {}


def _prompt_logprobs(request: ChatRequest, output: RequestOutput) -> PromptLogprobs | None:
    wanted = request.prompt_logprobs
    return None if wanted is None else prompt_logprobs(output.prompt_logprobs or [], wanted)


def _token_ids(request: ChatRequest, news: News) -> dict[str, Any]:
    return {"token_ids": news.token_ids} if request.return_token_ids else {}


def _choices(
    request: ChatRequest, output: RequestOutput, params: SamplingParams, tokenizer: Tokenizer | None
) -> list[ChatChoice]:
    choices = []
    for sequence in output.outputs:
        news = Growth().take(sequence)
        assert news is not None, "the output is the last"
        assert news.finish_reason is not None, "the output is the last"
        choices.append(
            ChatChoice(
                index=sequence.index,
                message=AnswerMessage(role="assistant", content=news.text),
                logprobs=_logprobs(request, news, params, tokenizer),
                finish_reason=news.finish_reason,
                stop_reason=news.stop_reason,
                **_token_ids(request, news),
            )
        )
    return choices


def _chunk_choice(
    request: ChatRequest, index: int, news: News, params: SamplingParams, tokenizer: Tokenizer | None
) -> ChunkChoice:
    return ChunkChoice(
        index=index,
        delta=ChatDelta(role="assistant", content=news.text) if news.first else ChatDelta(content=news.text),
        logprobs=_logprobs(request, news, params, tokenizer),
        finish_reason=news.finish_reason,
        stop_reason=news.stop_reason,
        **_token_ids(request, news),
    )


def _logprobs(
    request: ChatRequest, news: News, params: SamplingParams, tokenizer: Tokenizer | None
) -> ChatLogprobs | None:
    if news.logprobs is None or params.logprobs is None:
        return None
    skip, as_ids = params.skip_special_tokens, bool(request.return_tokens_as_token_ids)
    return chat_logprobs(
        news.token_ids, news.logprobs, params.logprobs, tokenizer, skip_special_tokens=skip, as_ids=as_ids
    )
