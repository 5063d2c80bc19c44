"""`Client`, the blocking front end of a running engine: a list of prompts in, outputs back in the same order."""

import logging
import os
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from threading import Condition, get_ident
from types import TracebackType
from typing import Any, Self

from eagleray.cluster.core.engine_link import EngineLink
from eagleray.cluster.core.messages import (
    Abort,
    Control,
    EngineOutputs,
    EngineStats,
    RequestMessage,
    Submit,
)
from eagleray.cluster.errors import ContextLengthError, EngineClosedError, EngineDeadError, check_process, counted
from eagleray.cluster.frontend.chat import chat_prompt
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.progress_bar import BatchProgress
from eagleray.cluster.frontend.prompts import Message, Prompt, conversations, prompt_list
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import CompletionOutput, RequestMetrics, RequestOutput
from eagleray.cluster.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

WAKE_S = 1.0  # so that Ctrl-C, and an engine that is stopped, are noticed while it is silent
CLOSE_S = 5.0  # how long another thread may take to leave the engine


class Client:
    """All of `LLM` except its start; close it or use it as a context manager.

    Any number of threads may call it at once: what they ask for runs together. One of those that wait takes the
    engine's news for all.
    Once it is closed, whatever needs the engine raises `EngineClosedError`.
    """

    def __init__(self, engine: EngineLink, front_end: FrontEnd) -> None:
        """A front end of an engine that runs; `close` closes the link."""
        self._engine = engine
        self._front_end = front_end
        self._calls = count()  # of `generate`
        self._closed = False
        self._owner = os.getpid()
        self._failure: str | None = None
        self._turn = Condition()  # guards all of this, and is notified of news
        self._receiver: int | None = None  # the thread that uses the engine now
        self._unsent: list[RequestMessage] = []  # of other threads, meanwhile
        self._ended: dict[RequestState, list[RequestState]] = {}  # where a request's caller looks for its end

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it was not skipped."""
        return self._front_end.tokenizer

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers has it, with its own methods. Raises `ValueError` if it was skipped."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer, as skip_tokenizer_init is True; leave that out")
        return self.tokenizer.in_transformers()

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._front_end.stats

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` use if they get no parameters: those of the model's generation_config.json."""
        return self._front_end.default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Generate for every prompt, with one set of parameters for all or one for each; outputs in the prompts' order.

        Without parameters the model's own count, `get_default_sampling_params`.
        All prompts are checked before the first is sent. One that comes to the model's length before its `max_tokens`
        ends there, with finish_reason "length". A prompt that does not fit, or a request that fails once it runs, does
        not take the others' outputs with it: its finish_reason is "error", its `error` the cause, and the log says so.
        `use_tqdm` shows a progress bar. Raises `ValueError` for what the user gave otherwise, and `EngineDeadError` if
        the engine is gone.
        """
        self._check_open()
        all_prompts = prompt_list(prompts)
        all_params = _params_list(sampling_params or self._front_end.default_params, len(all_prompts))
        group = f"call {next(self._calls)}"
        prepared = []
        for number, (prompt, params) in enumerate(zip(all_prompts, all_params, strict=True)):
            try:
                prepared.append(self._make_request(prompt, params, priority, group))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}" if len(all_prompts) > 1 else str(error)) from None
        generations = [each for each in prepared if isinstance(each, RequestState)]
        alone = not self._front_end.num_running  # bars of several threads would write over each other
        with BatchProgress(generations, enabled=use_tqdm and bool(generations) and alone) as progress:
            self._run(generations, progress)
        outputs = [each.output() if isinstance(each, RequestState) else each for each in prepared]
        _log_failures(outputs)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or several, put into text by the model's chat template.

        `template_options` are `Tokenizer.apply_chat_template`'s, and variables of the template.
        """
        self._check_open()
        prompts = [chat_prompt(self.tokenizer, chat, template_options) for chat in conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def start_profile(self, directory: str | Path) -> None:
        """From the next step on, every rank runs torch's profiler; waits until all have started.

        Raises `ValueError` if a profile is already running or a rank cannot write into `directory`, which is made if
        need be.
        """
        self._check_open()
        self._control(self._front_end.start_profile(directory))

    def stop_profile(self) -> list[Path]:
        """Every rank writes a Chrome trace of the steps since `start_profile`: `rank0.json.gz`, … on its own node.

        Waits for that and returns the files. Raises `ValueError` if no profile is running or one cannot be written.
        """
        self._check_open()
        return [Path(file) for file in self._control(self._front_end.stop_profile())]

    def close(self) -> None:
        """End the engine. Closing twice does nothing; neither does closing a forked copy, whose lock may never be
        released.
        """
        if os.getpid() != self._owner:
            return
        with self._turn:
            self._closed = True
            if self._receiver is not None:  # another thread's, or this one's, which a signal brought here
                self._engine.wake()
            self._turn.wait_for(lambda: self._receiver in (None, get_ident()), CLOSE_S)
        self._engine.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(f"this {type(self).__name__} is closed; make a new one")
        check_process(self._owner)

    def _make_request(
        self, prompt: Prompt, params: SamplingParams, priority: int, group: str
    ) -> RequestState | RequestOutput:
        """A request that can run, or the output of one whose prompt does not fit."""
        with self._turn:
            try:
                return self._front_end.make_request(prompt, params, priority=priority, group=group, clip=True)
            except ContextLengthError as error:
                return _failed(prompt, str(error))

    def _control(self, control: Control) -> list[str]:
        with self._turn:
            self._send(control)
        while True:
            with self._turn:
                if (results := self._front_end.reply(control)) is not None:
                    return results
            self._take_turn()

    def _run(self, generations: list[RequestState], progress: BatchProgress) -> None:
        """Run requests to their end; if this is interrupted, they end in the engine, too."""
        ended: list[RequestState] = []
        num_running = len(generations)
        try:
            with self._turn:
                self._ended |= dict.fromkeys(generations, ended)
                requests = [self._front_end.add(generation) for generation in generations]
                if requests:
                    self._send(Submit(requests))
            while num_running:
                self._take_turn()
                finished, ended[:] = ended[:], []
                num_running -= len(finished)
                progress.update(finished)
        finally:
            with self._turn:
                for generation in generations:
                    self._ended.pop(generation, None)
                ids = [id for generation in generations for id in self._front_end.abort(generation)]
                if ids and self._failure is None and not self._closed:
                    self._send(Abort(ids))

    def _send(self, message: RequestMessage) -> None:
        """Hand over a message; if another thread uses the engine, that does it. Call it with the turn."""
        if self._receiver in (None, get_ident()):
            self._engine.send(message)
        else:
            self._unsent.append(message)
            self._engine.wake()

    def _take_turn(self) -> None:
        """Take the next news for all threads, or wait until another thread has; `WAKE_S` at most."""
        news = None
        try:
            with self._turn:
                self._check_usable()
                if self._receiver is not None:
                    self._turn.wait(WAKE_S)
                    return
                self._receiver = get_ident()
            news = self._engine.receive(WAKE_S)
        except EngineDeadError as error:
            with self._turn:
                if not self._closed:
                    self._failure = self._failure or str(error)
                    self._front_end.forget()
            raise
        finally:
            with self._turn:
                if self._receiver == get_ident():
                    self._end_turn(news)

    def _end_turn(self, news: EngineOutputs | None) -> None:
        try:
            changed, aborts = self._front_end.process(news) if news is not None else ([], [])
            for generation in changed:
                if generation.finished:
                    self._ended.pop(generation).append(generation)
            unsent, self._unsent = self._unsent, []
            if self._failure is None and not self._closed:
                for message in (*unsent, *([Abort(aborts)] if aborts else [])):
                    self._engine.send(message)
        finally:
            self._receiver = None
            self._turn.notify_all()

    def _check_usable(self) -> None:
        self._check_open()
        if self._failure is not None:
            raise EngineDeadError(self._failure)


def _failed(prompt: Prompt, error: str) -> RequestOutput:
    """The output of a request that was never sent."""
    now = time.monotonic()
    given = dict[str, Any](prompt) if isinstance(prompt, dict) else {}
    text = prompt if isinstance(prompt, str) else given.get("prompt")
    token_ids: Any = given.get("prompt_token_ids", []) if isinstance(prompt, str | dict) else prompt
    return RequestOutput(
        request_id="",
        prompt=text,
        prompt_token_ids=list(token_ids),
        prompt_logprobs=None,
        outputs=[CompletionOutput(0, "", [], None, None, finish_reason="error", error=error)],
        finished=True,
        num_cached_tokens=None,
        metrics=RequestMetrics(arrival_time=now, finished_time=now),
    )


def _log_failures(outputs: list[RequestOutput]) -> None:
    causes = [error for output in outputs if (error := next(filter(None, (o.error for o in output.outputs)), None))]
    if causes:
        logger.error(
            "%d of %s failed: %s", len(causes), counted(len(outputs), "request"), "; ".join(dict.fromkeys(causes))
        )


def _params_list(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise ValueError(f"sampling_params is {params!r}; give SamplingParams, or a list of them")
    if len(params) != num_prompts:
        raise ValueError(
            f"there are {num_prompts} prompts and {len(params)} sampling_params; give one for all or one each"
        )
    return list(params)
