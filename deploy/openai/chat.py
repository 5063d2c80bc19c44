"""`/v1/chat/completions`: answer conversations."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import CompletionOutput, RequestOutput, RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.event_template import TEXT, EventTemplate
from eagleray.deploy.openai.generate import (
    NOTHING_ELSE,
    ChoiceProgress,
    Count,
    Job,
    News,
    is_text_alone,
    outputs,
    take_places,
    usage,
)
from eagleray.deploy.openai.large import SMALL, log_probabilities, parts, written
from eagleray.deploy.openai.limits import MAX_TOKENIZED
from eagleray.deploy.openai.logprobs import chat_logprobs, prompt_logprobs
from eagleray.deploy.openai.prompts import conversation_prompt
from eagleray.deploy.openai.requests import ChatRequest, StreamOptions
from eagleray.deploy.openai.responses import (
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
from eagleray.deploy.openai.served_model import ServedModel


async def chat_completion(served: ServedModel, request: ChatRequest) -> ChatCompletion | bytes:
    """The whole answer, or its JSON if it is large. Raises `ApiError` and `EngineDeadError`."""
    job = await _job(served, request)
    created, count = int(time.time()), Count()
    async with aclosing(outputs(served.engine, job, RequestOutputKind.FINAL_ONLY)) as news:
        async for number, output in news:
            count.add(number, output)
    output, params, tokenizer = count.prompts[0], job.params, served.engine.tokenizer
    whole = [_whole(sequence) for sequence in output.outputs]

    def reply(logprobs: list[ChatLogprobs | None]) -> ChatCompletion:
        return ChatCompletion(
            id=job.id,
            object="chat.completion",
            created=created,
            model=served.model_name,
            choices=[
                _choice(request, index, news, each)
                for index, (news, each) in enumerate(zip(whole, logprobs, strict=True))
            ],
            usage=count.usage(),
            prompt_logprobs=_prompt_logprobs(request, output),
            **_tier(request),
            **_prompt_ids(request, output),
        )

    def large_reply() -> bytes:
        if params.logprobs is None:
            return written(reply([None] * len(whole)), [])
        contents = [_parts(request, news, params, tokenizer) for news in whole]
        return written(reply([ChatLogprobs(content=[])] * len(whole)), contents)

    if log_probabilities(output, params) > SMALL:
        return await asyncio.to_thread(large_reply)
    return reply([_logprobs(request, news, params, tokenizer) for news in whole])


async def chat_chunks(
    served: ServedModel, request: ChatRequest
) -> AsyncGenerator[list[ChatCompletionChunk | bytes], None]:
    """What is new, choice by choice, as chunks or as events. Leaving the iteration aborts what runs.

    Raises as `chat_completion`.
    """
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
    growth: defaultdict[int, ChoiceProgress] = defaultdict(ChoiceProgress)
    text_alone = job.params.logprobs is None and not in_each and not request.return_token_ids
    templates: dict[int, EventTemplate] = {}  # of choices that have begun
    async with aclosing(outputs(served.engine, job, RequestOutputKind.DELTA)) as news_of_all:
        async for number, output in news_of_all:
            count.add(number, output)
            chunks: list[ChatCompletionChunk | bytes] = []
            for sequence in output.outputs:
                if text_alone and (template := templates.get(sequence.index)) and is_text_alone(sequence):
                    chunks.append(template.event(sequence.text))
                elif (news := growth[sequence.index].news_of(sequence)) is not None:
                    so_far = {"usage": usage(output, growth[sequence.index].num_tokens)} if in_each else {}
                    choice = _chunk_choice(request, sequence.index, news, job.params, served.engine.tokenizer)
                    ids = _prompt_ids(request, output) if news.first else {}
                    chunks.append(chunk([choice], **so_far, **ids))
                    if text_alone and news.first:
                        choice = ChunkChoice(index=sequence.index, delta=ChatDelta(content=TEXT), **NOTHING_ELSE)
                        templates[sequence.index] = EventTemplate(chunk([choice]))
            if chunks:
                yield chunks
    if options.include_usage:
        yield [chunk([], usage=count.usage())]


def _tier(request: ChatRequest) -> dict[str, Any]:
    """The only tier, for those who ask for one."""
    return {} if request.service_tier is None else {"service_tier": "default"}


async def _job(served: ServedModel, request: ChatRequest) -> Job:
    served.check_model(request.model)
    served.check_priority(request.priority)
    params = chat_params(request, served.defaults)
    take_places(params, 1)
    longest = None if request.truncate_prompt_tokens is None else MAX_TOKENIZED
    prompt = await conversation_prompt(served, request, longest)
    served.limits.check_reply([prompt], params, ids=bool(request.stream and request.return_token_ids))
    return Job.of("chatcmpl", request, [prompt], params)


def _prompt_ids(request: ChatRequest, output: RequestOutput) -> dict[str, Any]:
    return {"prompt_token_ids": output.prompt_token_ids} if request.return_token_ids else {}


def _prompt_logprobs(request: ChatRequest, output: RequestOutput) -> PromptLogprobs | None:
    wanted = request.prompt_logprobs
    return None if wanted is None else prompt_logprobs(output.prompt_logprobs or [], wanted)


def _token_ids(request: ChatRequest, news: News) -> dict[str, Any]:
    return {"token_ids": news.token_ids} if request.return_token_ids else {}


def _whole(sequence: CompletionOutput) -> News:
    news = ChoiceProgress().news_of(sequence)
    assert news is not None, "the output is the last"
    return news


def _choice(request: ChatRequest, index: int, news: News, logprobs: ChatLogprobs | None) -> ChatChoice:
    assert news.finish_reason is not None, "the output is the last"
    return ChatChoice(
        index=index,
        message=AnswerMessage(role="assistant", content=news.text),
        logprobs=logprobs,
        finish_reason=news.finish_reason,
        stop_reason=news.stop_reason,
        **_token_ids(request, news),
    )


def _parts(
    request: ChatRequest, news: News, params: SamplingParams, tokenizer: Tokenizer | None
) -> Iterator[ChatLogprobs]:
    """Log-probabilities of a choice, some tokens at a time."""
    assert news.logprobs is not None, "they are asked for"
    for part in parts(len(news.token_ids)):
        some = replace(news, token_ids=news.token_ids[part], logprobs=news.logprobs[part])
        if (found := _logprobs(request, some, params, tokenizer)) is not None:
            yield found


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
