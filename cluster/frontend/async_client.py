"""`AsyncClient`, the streaming front end of a running engine, for asyncio."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eagleray.cluster.core.engine_link import EngineLink
from eagleray.cluster.core.messages import Abort, Control, EngineOutputs, EngineStats, Submit
from eagleray.cluster.errors import EngineClosedError, EngineDeadError, check_process, counted
from eagleray.cluster.frontend.chat import achat_prompt
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.prompts import Message, Prompt
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import RequestOutput, RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class AsyncClient:
    """All of `AsyncLLM` except its start; use it from one event loop.

    One task reads the engine's news; each request keeps only its latest state, so a slow consumer gets several steps in
    one output and memory stays bounded. Once it is closed, whatever needs the engine raises `EngineClosedError`.
    """

    def __init__(self, engine: EngineLink, front_end: FrontEnd) -> None:
        """A front end of an engine that runs; `close` closes the link. May be called before there is an event loop."""
        self._engine = engine
        self._front_end = front_end
        self._news: dict[RequestState, asyncio.Event] = {}  # of each request that somebody iterates
        self._replies: dict[int, asyncio.Event] = {}  # of each control that somebody awaits
        self._reader: asyncio.Task[None] | None = None  # runs from the first request on
        self._failure: str | None = None
        self._closed = False
        self._owner = os.getpid()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it was not skipped."""
        return self._front_end.tokenizer

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._front_end.stats

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._front_end.num_running

    @property
    def num_unfinished_tokens(self) -> int:
        """How many tokens requests have that have not ended."""
        return self._front_end.num_unfinished_tokens

    def check_health(self, max_silence_s: float) -> None:
        """Raise `EngineDeadError` if the engine is gone, or if requests run and it has said nothing for this long.

        Call it on the event loop. A death is noticed when it happens, from the first call on, even if nothing runs.
        """
        self._check_open()
        self._check_alive()
        self._start_reader()
        if (silence_s := self._front_end.silence_s) > max_silence_s:
            requests = counted(self.num_requests, "request")
            raise EngineDeadError(
                f"{requests} in progress, but the engine has said nothing for {silence_s:.0f} s, longer than "
                f"{max_silence_s:g} s"
            )

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return self._front_end.default_params

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        group: str | None = None,
        tenant: str = "",
        clip: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Cumulative outputs, or as `output_kind` says, the last one with `finished`.

        Cancelling or leaving the iteration aborts the request.
        Raises `ValueError` before anything is sent if the request cannot run, and `EngineDeadError` once the engine is
        gone. Without `request_id` requests are numbered.

        Running requests share the engine fairly: first the tenants, as a server has them, and then the groups of each.
        Requests of one `group` count as one; without it each is its own.

        With `clip` one that asks for more tokens than the model has room for ends there, with finish_reason "length".
        """
        self._check_open()
        self._check_alive()
        params = sampling_params or self._front_end.default_params
        generation = self._front_end.make_request(
            prompt, params, request_id, priority, output_kind, group=group, tenant=tenant, clip=clip
        )
        news = self._submit(generation)
        try:
            while True:
                await news.wait()
                news.clear()
                if not generation.finished:
                    self._check_alive()
                if not _is_awaited(generation):
                    continue
                yield (output := generation.output())
                if output.finished:
                    return
        finally:
            del self._news[generation]
            self._abort(generation)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, for a conversation; `template_options` are `Tokenizer.apply_chat_template`'s."""
        self._check_open()
        prompt = await achat_prompt(self.tokenizer, messages, template_options)
        async with aclosing(self.generate(prompt, sampling_params, request_id, priority=priority)) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str) -> None:
        """End a request: its iterator yields a last output with finish_reason "abort". Unknown ids are ignored."""
        self._check_open()
        generation = self._front_end.running(request_id)
        if generation is not None:
            self._abort(generation)

    async def start_profile(self, directory: str | Path) -> None:
        """As `LLM.start_profile`; requests that run go on."""
        self._check_open()
        await self._control(self._front_end.start_profile(directory))

    async def stop_profile(self) -> list[Path]:
        """As `LLM.stop_profile`; requests that run go on once the traces are written."""
        self._check_open()
        return [Path(file) for file in await self._control(self._front_end.stop_profile())]

    def close(self) -> None:
        """End the engine; callers that still wait get `EngineDeadError`. Call it on the event loop if one ran requests.

        Closing twice does nothing.
        """
        self._closed = True
        self._fail("the front end was closed")
        if self._reader is not None:
            self._reader.cancel()
        self._engine.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, generation: RequestState) -> asyncio.Event:
        request = self._front_end.add(generation)
        try:
            self._engine.send(Submit([request]))
        except EngineDeadError as error:
            self._fail(str(error))
            raise
        except BaseException:
            self._front_end.abort(generation)
            raise
        self._start_reader()
        return self._news.setdefault(generation, asyncio.Event())

    def _start_reader(self) -> None:
        if self._reader is None or self._reader.done():  # done with the event loop it ran on
            self._reader = asyncio.create_task(self._read(), name="eagleray news")

    async def _control(self, control: Control) -> list[str]:
        self._check_alive()
        news = self._replies[control.id] = asyncio.Event()
        try:
            self._engine.send(control)
            self._start_reader()
            while (results := self._front_end.reply(control)) is None:
                self._check_alive()
                await news.wait()
                news.clear()
            return results
        finally:
            del self._replies[control.id]

    async def _read(self) -> None:
        """Take the engine's news until it is gone; whatever ends this reaches every waiter.

        All news that are there at once, so that a stream which falls behind has several tokens in one output, and costs
        less for each: under any load the front end keeps up with the engine. A first token does not wait for the next
        tokens of others.
        """
        try:
            while True:
                changed: dict[RequestState, None] = {}
                for news in await self._engine.areceive():
                    changed |= dict.fromkeys(self._process(news))
                for generation in sorted(
                    changed, key=attrgetter("has_told")
                ):  # the one that has waited longest goes first
                    self._wake(generation)
                await asyncio.sleep(0)  # more news may be there already, and the readers of these need a turn
        except EngineDeadError as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("The front end failed; its requests end with this cause")
            self._fail(f"the front end failed: {error!r}")

    def _process(self, news: EngineOutputs) -> list[RequestState]:
        """Requests with news."""
        changed, aborts = self._front_end.process(news)
        if aborts:
            self._engine.send(Abort(aborts))
        for reply in news.replies:
            if reply.id in self._replies:
                self._replies[reply.id].set()
        return changed

    def _abort(self, generation: RequestState) -> None:
        """End a request here and in the engine, if it runs."""
        ids = self._front_end.abort(generation)
        self._wake(generation)
        if ids:
            try:
                self._engine.send(Abort(ids))
            except EngineDeadError as error:
                self._fail(str(error))

    def _wake(self, generation: RequestState) -> None:
        if generation in self._news and _is_awaited(generation):
            self._news[generation].set()

    def _fail(self, cause: str) -> None:
        self._failure = self._failure or cause
        self._front_end.forget()
        for news in (*self._news.values(), *self._replies.values()):
            news.set()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(f"this {type(self).__name__} is closed; make a new one")
        check_process(self._owner)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(self._failure)


def _is_awaited(generation: RequestState) -> bool:
    """Whether what is new is to be told now."""
    only_last = generation.output_kind is RequestOutputKind.FINAL_ONLY
    return not only_last or generation.finished or generation.failed
