"""The front ends' shared bookkeeping, without I/O: what to send for a prompt, and what the core's outputs mean."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from eagleray.cluster.core.messages import (
    MAX_PRIORITY,
    Control,
    ControlReply,
    EngineOutputs,
    EngineRequest,
    EngineStats,
)
from eagleray.cluster.frontend.bad_words import bad_word_token_ids
from eagleray.cluster.frontend.detokenizer import Detokenizer
from eagleray.cluster.frontend.inputs import ModelLimits, derive_seed, engine_request, sampling_of
from eagleray.cluster.frontend.prompts import Prompt, num_to_take
from eagleray.cluster.frontend.request_state import Completion, RequestState
from eagleray.cluster.frontend.stop_strings import StopStrings
from eagleray.cluster.frontend.text_stream import TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.options import check_text
from eagleray.cluster.outputs import RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.workers.protocol.messages import Sampling

OnEnd = Callable[[RequestState], None]


def unwatched(_generation: RequestState) -> None:
    """The `on_end` of those who do not watch requests end."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Tables that are made of parameters once for all prompts of a group, since they may be large."""

    params: SamplingParams
    group: str
    sampling: Sampling
    stop: StopStrings


class FrontEnd:
    """Tokenises, checks, detokenises, finds stop strings and puts the sequences of a request together."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        seed: int | None = None,
        on_end: OnEnd = unwatched,
        defaults: SamplingParams | None = None,
    ) -> None:
        """Without a tokenizer prompts are token ids and outputs have no text. `defaults` are the model's own sampling.

        Requests without a seed draw by one that is made of `seed` and their number. Without that it is a fresh one, so
        that no other front end, before or beside this one, draws the same; two with the same seed do.

        `on_end` hears of every request that was taken in, once it has ended, or once the engine is gone.
        """
        self.tokenizer = tokenizer
        self.default_params = defaults or SamplingParams()  # of requests that bring none
        self.stats = EngineStats()  # of the engine, after the last step
        self._limits = limits
        self._seed = secrets.randbits(64) if seed is None else seed
        self._on_end = on_end
        self._heard = 0.0  # when the engine last said something, or began to have something to say
        self._compiled: Compiled | None = None  # the last
        self._numbers = count()  # of requests
        self._next_id = 0  # of sequences, as the engine knows them
        self._generations: dict[str, RequestState] = {}
        self._live: dict[int, tuple[RequestState, Completion]] = {}
        self._control_ids = count()
        self._control_replies: dict[int, ControlReply] = {}

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        *,
        group: str | None = None,
        tenant: str = "",
        clip: bool = False,
    ) -> RequestState:
        """Tokenise and check a request, without taking it in yet. Raises `ValueError`; other requests never notice.

        What runs is shared fairly among tenants, and of each among its groups: a request is one unless `group` says
        with which others it was asked for.

        With `clip` one that asks for more tokens than the model has room for ends there, with finish_reason "length".
        """
        if not isinstance(priority, int) or isinstance(priority, bool) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            within = f"from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            raise ValueError(f"priority is {priority!r}; give a whole number {within}, of which lower ones run first")
        names: dict[str, object] = {"request_id": request_id, "group": group, "tenant": tenant}
        for name, value in names.items():
            if isinstance(value, str):
                check_text(value, name)
            elif value is not None or name == "tenant":
                raise ValueError(f"{name} is {value!r}; give text")
        number = next(self._numbers)
        num_new = params.max_tokens or max(1, params.min_tokens)
        last = num_to_take(params.truncate_prompt_tokens, self._limits.max_model_len, num_new)
        text, token_ids = self._tokens(prompt, last)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {params.stop!r}, but there is no tokenizer to make text; use stop_token_ids")
        request_id = str(number) if request_id is None else request_id
        group = request_id if group is None else group
        compiled = self._compile(params, group)
        request = engine_request(
            token_ids,
            params,
            self._limits,
            compiled.sampling,
            first_id=self._next_id,
            derived_seed=derive_seed(self._seed, number),
            priority=priority,
            group=group,
            tenant=tenant,
            clip=clip,
        )
        self._next_id += params.num_distinct
        return RequestState(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self.tokenizer,
            output_kind=output_kind,
            request=request,
            completions=[
                Completion(index=index, id=request.id + index, detokenizer=detokenizer)
                for index, detokenizer in enumerate(self._detokenizers(token_ids, compiled))
            ],
        )

    def add(self, generation: RequestState) -> EngineRequest:
        """Take a request in; what to submit to the engine. Raises `ValueError` if a running request has its id."""
        if generation.request_id in self._generations:
            raise ValueError(f"request_id {generation.request_id!r} is that of a running request; choose another")
        if not self._generations:
            self._heard = time.monotonic()
        self._generations[generation.request_id] = generation
        for completion in generation.completions:
            self._live[completion.id] = (generation, completion)
        return generation.request

    def process(self, news: EngineOutputs) -> tuple[list[RequestState], list[int]]:
        """Requests with news, each once, and the engine ids that a stop string ended: the engine is to abort them."""
        now = time.monotonic()
        if news.outputs or news.replies:  # else it is only a sign of life
            self._heard = now
        self.stats = news.stats
        self._control_replies |= {reply.id: reply for reply in news.replies}
        changed: dict[str, RequestState] = {}
        aborts = []
        for tokens in news.outputs:
            if tokens.id not in self._live:  # ended here while the engine was a step ahead
                continue
            generation, completion = self._live[tokens.id]
            generation.apply(completion, tokens, self._limits.eos_token_ids, now)
            changed[generation.request_id] = generation
            if completion.finish_reason is not None:
                del self._live[tokens.id]
                if tokens.finish_reason is None:
                    aborts.append(tokens.id)
                if generation.finished:
                    generation.divide(completion, news.stats.spent, now)
                    del self._generations[generation.request_id]
                    self._on_end(generation)
        return list(changed.values()), aborts

    def start_profile(self, directory: str | Path) -> Control:
        """What to send the engine so that its ranks profile. A relative directory is this process's own.

        Raises `ValueError` for an empty name, which would be the working directory.
        """
        if not str(directory):
            raise ValueError(f"directory is {directory!r}; name one for the traces, or '.' for the working directory")
        check_text(str(directory), "directory")
        path = str(Path(directory).expanduser().absolute())
        return Control(next(self._control_ids), "start_profile", {"directory": path})

    def stop_profile(self) -> Control:
        """What to send the engine so that its ranks stop that and write their traces."""
        return Control(next(self._control_ids), "stop_profile")

    def reply(self, control: Control) -> list[str] | None:
        """The ranks' results; None before the engine's reply. Raises `ValueError` if that is a refusal."""
        reply = self._control_replies.pop(control.id, None)
        if reply is not None and reply.error is not None:
            raise ValueError(reply.error)
        return None if reply is None else reply.results

    def running(self, request_id: str) -> RequestState | None:
        """The running request of this id."""
        return self._generations.get(request_id)

    def abort(self, generation: RequestState) -> list[int]:
        """End a request with finish_reason "abort"; the engine ids to abort, none if it is not running."""
        if self._generations.get(generation.request_id) is not generation:
            return []
        del self._generations[generation.request_id]
        ids = [completion.id for completion in generation.completions if completion.finish_reason is None]
        for engine_id in ids:
            del self._live[engine_id]
        generation.end("abort")
        self._on_end(generation)
        return ids

    def forget(self) -> None:
        """The engine is gone: running requests never finish, and their callers have to be told."""
        lost = list(self._generations.values())
        self._generations.clear()
        self._live.clear()
        for generation in lost:
            self._on_end(generation)

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._generations)

    @property
    def num_unfinished_tokens(self) -> int:
        """How many tokens requests have that have not ended."""
        return sum(len(completion.token_ids) for _, completion in self._live.values())

    @property
    def silence_s(self) -> float:
        """Seconds for which requests have been running without any news; 0 if none runs."""
        return time.monotonic() - self._heard if self._generations else 0.0

    def _tokens(self, prompt: Prompt, last: int | None) -> tuple[str | None, list[int]]:
        """A prompt's text, where there is one, and its token ids, the `last` ones of more."""
        if isinstance(prompt, dict):
            given = dict[str, Any](prompt)
            if (ids := given.get("prompt_token_ids")) is not None:
                if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
                    raise ValueError(f"prompt_token_ids is {ids!r}; give a list of token ids")
                return given.get("prompt"), list(ids)[-last if last else 0 :]
            prompt = given.get("prompt", prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes):
            return None, list(prompt)[-last if last else 0 :]
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is {prompt!r}; give text or a list of token ids")
        if not prompt:
            raise ValueError("the prompt is empty; give it some text")
        if self.tokenizer is None:
            raise ValueError(f"the prompt is text, {prompt[:50]!r}, but there is no tokenizer; give token ids")
        return prompt, self.tokenizer.encode(prompt, last=last)

    def _compile(self, params: SamplingParams, group: str) -> Compiled:
        """What all requests of a group that have these very parameters share."""
        compiled = self._compiled
        if compiled is None or compiled.params is not params or compiled.group != group:
            sampling = sampling_of(params, self._limits, self._bad_words(params))
            self._compiled = compiled = Compiled(params, group, sampling, StopStrings(params.stop_strings))
        return compiled

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise ValueError(f"bad_words is {params.bad_words!r}, but there is no tokenizer to encode them")
        return bad_word_token_ids(params.bad_words, self.tokenizer)

    def _detokenizers(self, prompt_token_ids: list[int], compiled: Compiled) -> list[Detokenizer | None]:
        """One for each sequence; what they share is made once."""
        params = compiled.params
        if self.tokenizer is None or not params.detokenize:
            return [None] * params.num_distinct
        stream = TextStream(self.tokenizer, prompt_token_ids, params.skip_special_tokens)
        keep_stop = params.include_stop_str_in_output
        return [Detokenizer(stream.copy(), compiled.stop, keep_stop=keep_stop) for _ in range(params.num_distinct)]
