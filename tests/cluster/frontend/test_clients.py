"""`Client` and `AsyncClient` over a real scheduler in this process, whose rank's tokens can be foretold."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eagleray.cluster.core.messages import EngineOutputs, EngineStats, RequestMessage, Submit, Tokens
from eagleray.cluster.errors import EngineClosedError, EngineDeadError
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.client import Client
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import RequestOutput, RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams
from support.local_engine import LocalEngine
from support.toy_rank import generate

PROMPTS = [[20 + i, 30, *range(17, 17 + i)] for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(demo_model_dir)


@pytest.fixture
def engine() -> LocalEngine:
    return LocalEngine()


@pytest.fixture
def front_end(tokenizer: Tokenizer) -> FrontEnd:
    return FrontEnd(tokenizer, ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2})))


@pytest.fixture
def llm(engine: LocalEngine, front_end: FrontEnd) -> Client:
    return Client(engine, front_end)


@pytest.fixture
def async_llm(engine: LocalEngine, front_end: FrontEnd) -> Iterator[AsyncClient]:
    llm = AsyncClient(engine, front_end)
    yield llm
    assert engine.scheduler.num_unfinished == 0 or engine.failures, "a request was left running"


def params(max_tokens: int = 20, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **others)  # type: ignore[arg-type]


def test_without_parameters_the_models_own_count(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    limits = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))
    llm = Client(engine, FrontEnd(tokenizer, limits, defaults=params(7)))
    assert [len(token_ids(output)) for output in llm.generate(["a", "b"])] == [7, 7]
    assert [len(token_ids(output)) for output in llm.chat([{"role": "user", "content": "a"}])] == [7]
    mine = replace(llm.get_default_sampling_params(), max_tokens=3)
    assert [len(token_ids(output)) for output in llm.generate("a", mine)] == [3]
    assert llm.get_default_sampling_params() == params(7)


async def test_without_parameters_the_models_own_count_in_streams(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    limits = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))
    llm = AsyncClient(engine, FrontEnd(tokenizer, limits, defaults=params(7)))
    assert [len(token_ids(output)) async for output in llm.generate("a")][-1] == 7
    assert llm.get_default_sampling_params() == params(7)
    llm.close()


def token_ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_outputs_come_in_the_order_of_the_prompts(llm: Client, tokenizer: Tokenizer) -> None:
    each = [params(30 - 2 * i) for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, each, use_tqdm=False)
    for prompt, wanted, output in zip(PROMPTS, each, outputs, strict=True):
        expected = generate(prompt, wanted.max_tokens or 0)
        assert (output.prompt_token_ids, token_ids(output), output.finished) == (prompt, expected, True)
        assert output.outputs[0].text == tokenizer.decode(prompt + expected)[len(tokenizer.decode(prompt)) :]


def test_one_prompt_needs_no_list(llm: Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1+2=")
    for prompt in ("1+2=", ids, {"prompt": "1+2="}, {"prompt_token_ids": ids}, ["1+2="], [ids]):
        (output,) = llm.generate(prompt, params(5), use_tqdm=False)  # type: ignore[arg-type]
        assert token_ids(output) == generate(ids, 5)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (None, None, "prompts is None"),
        (b"abc", None, "prompts is b'abc'"),
        (["a"], {"max_tokens": 3}, "sampling_params is {'max_tokens': 3}; give SamplingParams"),
        (["a"], [None], r"sampling_params is \[None\]"),
    ],
)
def test_what_is_no_prompt_or_no_parameters_is_refused(llm: Client, prompts: Any, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)


def test_no_prompts_no_outputs(llm: Client) -> None:
    assert llm.generate([]) == []


def test_nothing_is_sent_if_one_prompt_is_bad(llm: Client, engine: LocalEngine, front_end: FrontEnd) -> None:
    with pytest.raises(ValueError, match="prompt 12: the prompt is empty"):
        llm.generate([*PROMPTS, []], params(), use_tqdm=False)
    with pytest.raises(ValueError, match=r"^the prompt holds the token id -1"):
        llm.generate([[5, -1]], params(), use_tqdm=False)
    with pytest.raises(ValueError, match="there are 12 prompts and 2 sampling_params"):
        llm.generate(PROMPTS, [params()] * 2, use_tqdm=False)
    assert engine.scheduler.num_unfinished == front_end.num_running == engine.num_calls == 0


def test_a_prompt_that_is_too_long_takes_no_other_along(
    llm: Client, engine: LocalEngine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """The model holds 256 tokens."""
    full, fits, over = [5] * 255, [6] * 250, [7] * 256
    outputs = llm.generate([PROMPTS[0], full, fits, over, PROMPTS[1]], params(20), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "length", "error", "length"]
    prompts, lengths = (PROMPTS[0], full, fits, over, PROMPTS[1]), (20, 1, 6, 0, 20)
    for prompt, output, length in zip(prompts, outputs, lengths, strict=True):
        assert output.prompt_token_ids == prompt
        assert token_ids(output) == generate(prompt, length)
        assert output.finished
    error = outputs[3].outputs[0].error or ""
    assert "the prompt has 256 tokens, but the model holds 256" in error
    assert caplog.messages == [f"1 of 5 requests failed: {error}"]
    text = " one more" * 200
    assert len(tokenizer.encode(text)) > 256
    (alone,) = llm.generate(text, params(20), use_tqdm=False)
    assert (alone.prompt, alone.outputs[0].finish_reason) == (text, "error")
    assert engine.scheduler.num_unfinished == 0


def test_threads_share_the_engine_and_each_gets_its_own(llm: Client, engine: LocalEngine) -> None:
    num_threads, failures = 8, {3: ValueError, 6: ValueError}
    engine.waits_for = 30

    def work(number: int) -> list[list[int]]:
        prompts = [[number, i, 3] for i in range(1, 6)]
        if number in failures:
            prompts[2] = []
        each = [params(20 + 3 * i + number) for i in range(5)]
        return [token_ids(output) for output in llm.generate(prompts, each, use_tqdm=False)]

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work, number) for number in range(num_threads)]
        for number, future in enumerate(futures):
            if number in failures:
                with pytest.raises(failures[number]):
                    future.result(60)
            else:
                expected = [generate([number, i, 3], 20 + 3 * (i - 1) + number) for i in range(1, 6)]
                assert future.result(60) == expected
    assert engine.scheduler.num_unfinished == 0
    assert engine.rank.largest_batch == 30 * 3, "what several threads ask for runs together"


def test_every_thread_hears_of_the_engines_death(llm: Client, engine: LocalEngine, front_end: FrontEnd) -> None:
    engine.failures = {30: EngineDeadError("rank 1 is gone")}
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(llm.generate, PROMPTS, params(200), use_tqdm=False) for _ in range(4)]:
            with pytest.raises(EngineDeadError, match="rank 1 is gone"):
                future.result(60)
    assert front_end.num_running == 0


def test_closing_ends_what_other_threads_wait_for(llm: Client, engine: LocalEngine) -> None:
    engine.waits_for = 1000
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(llm.generate, PROMPTS, params(200), use_tqdm=False) for _ in range(2)]
        assert engine.waited.wait(30)
        llm.close()
        for future in futures:
            with pytest.raises(EngineClosedError):
                future.result(60)


def test_a_chat_is_put_into_the_models_template(llm: Client, tokenizer: Tokenizer) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("Hello", "Bye")]
    outputs = llm.chat(chats, params(4), use_tqdm=False)
    for chat, output in zip(chats, outputs, strict=True):
        assert output.prompt == tokenizer.apply_chat_template(chat)
        assert output.prompt_token_ids == tokenizer.encode(output.prompt, add_special_tokens=False)
        assert token_ids(output) == generate(output.prompt_token_ids, 4)
    assert llm.chat(chats[1], params(4), use_tqdm=False)[0].prompt == outputs[1].prompt


def test_a_stop_string_frees_the_engine_at_once(llm: Client, engine: LocalEngine, tokenizer: Tokenizer) -> None:
    expected = generate(PROMPTS[0], 40)
    text = tokenizer.decode(expected[:12])
    (output,) = llm.generate(PROMPTS[0], params(200, stop=text[-3:]), use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(text[-3:])]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", text[-3:])
    assert engine.scheduler.num_unfinished == 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), MemoryError()])
def test_an_interruption_ends_what_runs(llm: Client, engine: LocalEngine, interruption: BaseException) -> None:
    engine.failures = {5: interruption}
    with pytest.raises(type(interruption)):
        llm.generate(PROMPTS, params(), use_tqdm=False)
    assert engine.scheduler.num_unfinished == 0
    assert token_ids(llm.generate(PROMPTS[3], params(), use_tqdm=False)[0]) == generate(PROMPTS[3], 20)


def test_a_dead_engine_says_why(llm: Client, engine: LocalEngine, front_end: FrontEnd) -> None:
    engine.failures = {5: EngineDeadError("rank 1 is gone")}
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="rank 1 is gone") as death:
            llm.generate(PROMPTS, params(), use_tqdm=False)
        assert death.value.__context__ is None, "one failure is one message"
        assert front_end.num_running == 0


def test_a_failed_request_keeps_the_others_outputs(
    llm: Client, engine: LocalEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fails_at = 5
    outputs = llm.generate(PROMPTS, [params(1), *[params()] * 11], use_tqdm=False)
    assert token_ids(outputs[0]) == generate(PROMPTS[0], 1)
    for prompt, output in zip(PROMPTS[1:], outputs[1:], strict=True):
        assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", "rank 1 says no")
        assert token_ids(output) == generate(prompt, len(token_ids(output)))
    assert caplog.messages == ["11 of 12 requests failed: rank 1 says no"]


def test_progress_is_shown_on_standard_error(llm: Client, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, params())
    shown = capfd.readouterr()
    assert (shown.out, "12/12" in shown.err, "tokens/s" in shown.err) == ("", True, True)


def test_closing_closes_the_engine(llm: Client, engine: LocalEngine) -> None:
    with llm:
        assert not engine.closed
    assert engine.closed


async def test_a_profile_needs_the_name_of_a_directory(llm: Client, async_llm: AsyncClient) -> None:
    with pytest.raises(ValueError, match="directory is ''; name one"):
        llm.start_profile("")
    with pytest.raises(ValueError, match="directory is ''; name one"):
        await async_llm.start_profile("")


HELLO = [{"role": "user", "content": "Hello"}]
CALLS: dict[str, Callable[[Client], object]] = {
    "generate": lambda llm: llm.generate("a", use_tqdm=False),
    "generate nothing": lambda llm: llm.generate([]),
    "generate what is refused": lambda llm: llm.generate(None),  # type: ignore[arg-type]
    "chat": lambda llm: llm.chat(HELLO),
    "start_profile": lambda llm: llm.start_profile("traces"),
    "stop_profile": lambda llm: llm.stop_profile(),
    "with": lambda llm: llm.__enter__(),
}
ASYNC_CALLS: dict[str, Callable[[AsyncClient], Awaitable[object]]] = {
    "generate": lambda llm: collect(llm.generate("a")),
    "chat": lambda llm: collect(llm.chat(HELLO)),
    "abort": lambda llm: llm.abort("mine"),
    "start_profile": lambda llm: llm.start_profile("traces"),
    "stop_profile": lambda llm: llm.stop_profile(),
    "with": lambda llm: llm.__aenter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_closed_engine_can_do_nothing_and_says_so(llm: Client, call: Callable[[Client], object]) -> None:
    for _ in range(2):
        llm.close()
    with pytest.raises(EngineClosedError, match="this Client is closed; make a new one"):
        call(llm)
    assert llm.tokenizer is not None


@pytest.mark.parametrize("call", ASYNC_CALLS.values(), ids=ASYNC_CALLS.keys())
async def test_a_closed_async_engine_can_do_nothing_and_says_so(
    async_llm: AsyncClient, call: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    for _ in range(2):
        async_llm.close()
    with pytest.raises(EngineClosedError, match="this AsyncClient is closed; make a new one"):
        await call(async_llm)
    assert async_llm.tokenizer is not None


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    collected = []
    async for output in outputs:
        collected.append(output)
        await asyncio.sleep(0)
    return collected


async def test_streams_grow_to_what_generate_returns(async_llm: AsyncClient) -> None:
    streams = await asyncio.gather(*(collect(async_llm.generate(prompt, params())) for prompt in PROMPTS))
    for prompt, outputs in zip(PROMPTS, streams, strict=True):
        assert token_ids(outputs[-1]) == generate(prompt, 20)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        for output in outputs:
            assert token_ids(outputs[-1])[: len(token_ids(output))] == token_ids(output)
            assert outputs[-1].outputs[0].text.startswith(output.outputs[0].text)


async def test_a_stream_goes_on_while_there_are_always_news(async_llm: AsyncClient, engine: LocalEngine) -> None:
    """An engine that is faster than its front end must not keep what it says from those who wait for it."""
    engine.pauses = False
    outputs = await collect(async_llm.generate(PROMPTS[0], params(200)))
    assert len(outputs) > 100


class Told:
    """A link to an engine that says what it is told to say."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.news: asyncio.Queue[list[Tokens]] = asyncio.Queue()

    def send(self, message: RequestMessage) -> None:
        if isinstance(message, Submit):
            self.ids += [request.id for request in message.requests]

    def wake(self) -> None:
        """Nobody waits elsewhere."""

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        raise AssertionError("nobody blocks here")

    async def areceive(self) -> list[EngineOutputs]:
        return [EngineOutputs(await self.news.get(), EngineStats())]

    def close(self) -> None:
        """Nothing is open."""


async def test_a_first_token_does_not_wait_for_those_of_others(front_end: FrontEnd) -> None:
    engine = Told()
    llm = AsyncClient(engine, front_end)
    came: asyncio.Queue[str] = asyncio.Queue()

    async def follow(name: str) -> None:
        async for _ in llm.generate([1, 2], params(8), output_kind=RequestOutputKind.DELTA):
            came.put_nowait(name)

    old = [asyncio.create_task(follow(f"old {number}")) for number in range(3)]
    while len(engine.ids) < len(old):
        await asyncio.sleep(0)
    engine.news.put_nowait([Tokens(id, [5]) for id in engine.ids])
    while came.qsize() < len(old):
        await asyncio.sleep(0)
    new = asyncio.create_task(follow("new"))
    while len(engine.ids) <= len(old):
        await asyncio.sleep(0)
    engine.news.put_nowait([Tokens(id, [6]) for id in engine.ids])
    while came.qsize() < 2 * len(old) + 1:
        await asyncio.sleep(0)
    assert [came.get_nowait() for _ in range(came.qsize())].index("new") == len(old)
    llm.close()
    await asyncio.gather(*old, new, return_exceptions=True)


async def test_a_slow_consumer_gets_merged_outputs_and_the_last(async_llm: AsyncClient, engine: LocalEngine) -> None:
    outputs = []
    async for output in async_llm.generate(PROMPTS[0], params(200)):
        outputs.append(output)
        seen = engine.num_calls
        while engine.num_calls < seen + 10:
            await asyncio.sleep(0)
    assert len(outputs) < 30
    assert token_ids(outputs[-1]) == generate(PROMPTS[0], 200)


async def test_a_stop_string_ends_a_stream_and_frees_the_engine(
    async_llm: AsyncClient, engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    text = tokenizer.decode(generate(PROMPTS[0], 12))
    outputs = await collect(async_llm.generate(PROMPTS[0], params(200, stop=[text[-3:]])))
    assert outputs[-1].outputs[0].text == text[: text.index(text[-3:])]
    assert all(outputs[-1].outputs[0].text.startswith(output.outputs[0].text) for output in outputs)
    assert engine.scheduler.num_unfinished == 0


async def test_leaving_the_iteration_aborts_the_request(async_llm: AsyncClient, engine: LocalEngine) -> None:
    async for output in async_llm.generate(PROMPTS[0], params(200)):
        if len(token_ids(output)) >= 3:
            break
    while engine.scheduler.num_unfinished:  # the iterator is closed by the event loop
        await asyncio.sleep(0)
    assert engine.rank.num_tokens_run < 100, "it ran to its end"


async def test_cancelling_aborts_only_that_request(async_llm: AsyncClient, engine: LocalEngine) -> None:
    cancelled = asyncio.create_task(collect(async_llm.generate(PROMPTS[0], params(200))))
    other = asyncio.create_task(collect(async_llm.generate(PROMPTS[1], params(100))))
    while engine.scheduler.num_unfinished != 2:
        await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert engine.scheduler.num_unfinished == 1
    assert token_ids((await other)[-1]) == generate(PROMPTS[1], 100)


async def test_abort_gives_a_last_output(async_llm: AsyncClient) -> None:
    outputs = []
    async for output in async_llm.generate(PROMPTS[0], params(200), "mine"):
        outputs.append(output)
        if len(outputs) == 3:
            await async_llm.abort("mine")
    await async_llm.abort("mine")
    assert len(outputs) == 4
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert token_ids(outputs[-1]) == generate(PROMPTS[0], len(token_ids(outputs[-1])))


async def test_an_aborted_requests_id_is_free_while_its_stream_is_open(async_llm: AsyncClient) -> None:
    first = async_llm.generate(PROMPTS[0], params(200), "mine")
    await anext(first)
    await async_llm.abort("mine")
    second = asyncio.create_task(collect(async_llm.generate(PROMPTS[1], params(), "mine")))
    await asyncio.sleep(0)
    assert (await collect(first))[-1].outputs[0].finish_reason == "abort"
    assert token_ids((await second)[-1]) == generate(PROMPTS[1], 20)


async def test_a_bad_request_hurts_no_other(async_llm: AsyncClient) -> None:
    other = asyncio.create_task(collect(async_llm.generate(PROMPTS[0], params(50), "taken")))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        await collect(async_llm.generate([], params()))
    with pytest.raises(ValueError, match="request_id 'taken' is that of a running request"):
        await collect(async_llm.generate(PROMPTS[1], params(), "taken"))
    assert token_ids((await other)[-1]) == generate(PROMPTS[0], 50)


async def test_a_dead_engine_reaches_every_waiter(async_llm: AsyncClient, engine: LocalEngine) -> None:
    engine.failures = {9: EngineDeadError("rank 1 is gone")}
    finished = async_llm.generate(PROMPTS[0], params(2))
    await anext(finished)
    streams = [collect(async_llm.generate(prompt, params(200))) for prompt in PROMPTS]
    for result in await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 30):
        assert isinstance(result, EngineDeadError)
        assert "rank 1 is gone" in str(result)
    assert token_ids((await collect(finished))[-1]) == generate(PROMPTS[0], 2), "what was whole by then is delivered"
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        await collect(async_llm.generate(PROMPTS[0], params()))


async def test_a_failure_of_the_front_end_itself_hangs_nobody(async_llm: AsyncClient, engine: LocalEngine) -> None:
    engine.failures = {5: MemoryError("no room")}
    with pytest.raises(EngineDeadError, match="the front end failed: MemoryError"):
        await asyncio.wait_for(collect(async_llm.generate(PROMPTS[0], params())), 30)


async def test_closing_ends_every_wait(async_llm: AsyncClient, engine: LocalEngine) -> None:
    engine.failures = {10**9: MemoryError()}  # requests are left in the engine, which ends with it
    waiting = asyncio.create_task(collect(async_llm.generate(PROMPTS[0], params(200))))
    while not engine.scheduler.num_unfinished:
        await asyncio.sleep(0)
    async_llm.close()
    with pytest.raises(EngineDeadError, match="the front end was closed"):
        await asyncio.wait_for(waiting, 30)
    assert engine.closed


def test_the_tokenizer_has_the_methods_of_transformers(llm: Client, demo_model_dir: Path) -> None:
    ours, theirs = llm.get_tokenizer(), AutoTokenizer.from_pretrained(demo_model_dir)
    chat = [{"role": "user", "content": "Hello 🦅"}]
    assert ours("Hello 🦅").input_ids == theirs("Hello 🦅").input_ids
    assert ours.decode([1, 2, 3]) == theirs.decode([1, 2, 3])
    assert ours.convert_ids_to_tokens([1, 500]) == theirs.convert_ids_to_tokens([1, 500])
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))


def test_without_a_tokenizer_there_is_none_to_get() -> None:
    limits = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        Client(LocalEngine(), FrontEnd(None, limits)).get_tokenizer()


@pytest.mark.parametrize(
    "prompt", ["A prompt of several words", [5, 6, 7, 8, 9, 10], {"prompt_token_ids": [5, 6, 7, 8]}]
)
@pytest.mark.parametrize("most", [1, 3, 6, 100])
def test_only_the_end_of_a_longer_prompt_is_taken(llm: Client, prompt: Any, most: int) -> None:
    (whole,) = llm.generate(prompt, params())
    (output,) = llm.generate(prompt, params(truncate_prompt_tokens=most))
    assert output.prompt_token_ids == whole.prompt_token_ids[-most:]
    assert token_ids(output) == generate(output.prompt_token_ids, 20)


def test_of_a_prompt_as_much_is_taken_as_fits(llm: Client) -> None:
    (output,) = llm.generate([[*range(20)] * 50], params(20, truncate_prompt_tokens=-1))
    assert output.prompt_token_ids == ([*range(20)] * 50)[-236:]
