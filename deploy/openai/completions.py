"""`/v1/completions`: continue prompts."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from eagleray.cluster.outputs import RequestOutput, RequestOutputKind
from eagleray.deploy.openai.echo import Echo
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
from eagleray.deploy.openai.large import SMALL, log_probabilities, written
from eagleray.deploy.openai.logprobs import Entry, Offsets, fewer, prompt_logprobs, text_logprobs
from eagleray.deploy.openai.prompts import completion_prompts, prompts_of
from eagleray.deploy.openai.requests import CompletionRequest, StreamOptions
from eagleray.deploy.openai.responses import Choice, Completion, TextLogprobs, Usage
from eagleray.deploy.openai.sampling import completion_params, prompt_only
from eagleray.deploy.openai.served_model import ServedModel


async def completion(served: ServedModel, request: CompletionRequest) -> Completion | bytes:
    """The whole answer, or its JSON if it is large. Raises `ApiError` and `EngineDeadError`."""
    reply = Reply(served, request, await _job(served, request))
    async with aclosing(outputs(served.engine, reply.job, RequestOutputKind.FINAL_ONLY)) as news:
        async for number, output in news:
            reply.count.add(number, output)
    last = sorted(reply.count.prompts.items())

    def whole() -> Completion:
        choices = [choice for number, output in last for choice in reply.news(number, output)]
        return reply.part(choices, reply.usage())

    if sum(log_probabilities(output, reply.job.params) for _, output in last) > SMALL:
        return await asyncio.to_thread(lambda: written(whole(), []))
    return whole()


async def completion_chunks(
    served: ServedModel, request: CompletionRequest
) -> AsyncGenerator[list[Completion | bytes], None]:
    """What is new of a prompt, choice by choice, as chunks or as events. Leaving the iteration aborts what runs.

    Raises as `completion`.
    """
    options = request.stream_options or StreamOptions()
    reply = Reply(served, request, await _job(served, request))
    async with aclosing(outputs(served.engine, reply.job, RequestOutputKind.DELTA)) as news:
        async for number, output in news:
            reply.count.add(number, output)
            in_each = options.continuous_usage_stats
            if not in_each and (events := reply.events(number, output)):
                yield events
            elif choices := reply.news(number, output):
                yield [reply.part([choice], reply.usage_of(choice, output) if in_each else None) for choice in choices]
    if options.include_usage:
        yield [reply.part([], reply.usage())]


async def _job(served: ServedModel, request: CompletionRequest) -> Job:
    served.check_model(request.model)
    served.check_priority(request.priority)
    params = completion_params(request, served.defaults)
    given = prompts_of(request)
    take_places(params, len(given))  # before anything slow
    prompts = await completion_prompts(served, request, given, params)
    echo, ids, stream = bool(request.echo), bool(request.return_token_ids), bool(request.stream)
    served.limits.check_reply(prompts, params, echo=echo, ids=ids, stream=stream)
    return Job.of("cmpl", request, prompts, params, clip=request.max_tokens is None)


class Reply:
    """An answer in the making."""

    def __init__(self, served: ServedModel, request: CompletionRequest, job: Job) -> None:
        self.job = job
        self.count = Count()
        self._served = served
        self._request = request
        self._echo = bool(request.echo)
        self._prompt_only = prompt_only(request)
        self._created = int(time.time())
        self._growth: defaultdict[int, ChoiceProgress] = defaultdict(ChoiceProgress)
        self._text_alone = job.params.logprobs is None and not (
            self._echo or self._prompt_only or request.return_token_ids
        )
        self._templates: dict[int, EventTemplate] = {}  # of choices
        self._prompts: dict[int, Echo] = {}
        self._echoes: dict[int, Echo] = {}  # of choices
        self._contexts: dict[int, Offsets] = {}  # of prompts
        self._offsets: dict[int, Offsets] = {}  # of choices

    def usage(self) -> Usage:
        """The usage of all that came."""
        return self.count.usage(prompt_only=self._prompt_only)

    def usage_of(self, choice: Choice, output: RequestOutput) -> Usage:
        """The usage of one choice so far, and of its prompt."""
        return usage(output, 0 if self._prompt_only else self._growth[choice.index].num_tokens)

    def part(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        """These choices as a body or as an event; without `usage` it is left out."""
        others = {} if usage is None else {"usage": usage}
        return Completion(
            id=self.job.id,
            object="text_completion",
            created=self._created,
            model=self._served.model_name,
            choices=choices,
            **others,
        )

    def events(self, number: int, output: RequestOutput) -> list[Completion | bytes]:
        """Events of one prompt's choices, if each has nothing new but text; otherwise none."""
        if not self._text_alone or not all(map(is_text_alone, output.outputs)):
            return []
        return [self._template(number * self.job.n + each.index).event(each.text) for each in output.outputs]

    def _template(self, index: int) -> EventTemplate:
        if index not in self._templates:
            self._templates[index] = EventTemplate(self.part([Choice(index=index, text=TEXT, **NOTHING_ELSE)]))
        return self._templates[index]

    def news(self, number: int, output: RequestOutput) -> list[Choice]:
        """The choices of one prompt that have news."""
        found = []
        for sequence in output.outputs:
            index = number * self.job.n + sequence.index
            news = self._growth[index].news_of(sequence)
            if news is not None:
                found.append(self._choice(index, number, output, news))
        return found

    def _choice(self, index: int, number: int, output: RequestOutput, news: News) -> Choice:
        text = "" if self._prompt_only else news.text
        if self._echo:
            token_ids = [] if self._prompt_only else news.token_ids
            text = self._echo_of(index, number).before(token_ids, ended=news.finish_reason is not None) + text
        return Choice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, number, output, news),
            finish_reason="length" if self._prompt_only and news.finish_reason else news.finish_reason,
            stop_reason=None if self._prompt_only else news.stop_reason,
            **self._extensions(output, news),
        )

    def _extensions(self, output: RequestOutput, news: News) -> dict[str, Any]:
        """What clients of vLLM may ask for."""
        found: dict[str, Any] = {}
        if self._request.return_token_ids:
            found["token_ids"] = [] if self._prompt_only else news.token_ids
            if news.first:
                found["prompt_token_ids"] = output.prompt_token_ids
        if not self._request.stream:
            wanted = self._request.prompt_logprobs
            found["prompt_logprobs"] = None if wanted is None else prompt_logprobs(output.prompt_logprobs or [], wanted)
        return found

    def _echo_of(self, index: int, number: int) -> Echo:
        """A choice's, made from its prompt's."""
        if index not in self._echoes:
            if number not in self._prompts:
                prompt, skip = self.job.prompts[number], self.job.params.skip_special_tokens
                self._prompts[number] = Echo(self._served.tokenizer, prompt, skip_special_tokens=skip)
            self._echoes[index] = self._prompts[number].copy()
        return self._echoes[index]

    def _offsets_of(self, index: int, number: int, prompt_token_ids: list[int]) -> Offsets:
        """A choice's, made from its prompt's."""
        if index not in self._offsets:
            if number not in self._contexts:
                tokenizer, skip = self._served.engine.tokenizer, self.job.params.skip_special_tokens
                echoed = self.job.prompts[number].get("prompt") if self._echo else None
                context = [] if self._echo and echoed is None else prompt_token_ids
                self._contexts[number] = Offsets(tokenizer, context, skip_special_tokens=skip, echoed=echoed)
            self._offsets[index] = self._contexts[number].copy()
        return self._offsets[index]

    def _logprobs(self, index: int, number: int, output: RequestOutput, news: News) -> TextLogprobs | None:
        if news.logprobs is None:
            return None
        tokenizer = self._served.engine.tokenizer
        offsets = self._offsets_of(index, number, output.prompt_token_ids)
        token_ids = [] if self._prompt_only else news.token_ids
        entries: list[Entry | None] = [] if self._prompt_only else [*news.logprobs]
        if self._echo and news.first:
            before = fewer(output.prompt_logprobs or [], self.job.params.logprobs or 0)
            token_ids, entries = output.prompt_token_ids + token_ids, before + entries
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return text_logprobs(token_ids, entries, offsets, tokenizer, as_ids=as_ids)
