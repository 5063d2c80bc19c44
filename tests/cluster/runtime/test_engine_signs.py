"""The whole engine on a local Ray cluster: what is stopped, or only silent, and what strangers can do."""

import asyncio
import logging
import os
import selectors
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from eagleray import LLM, AsyncLLM, EngineDeadError, SamplingParams
from support.small_engine import OPTIONS

PROMPT = [1, 2, 3]

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def token_ids(llm: LLM, max_tokens: int = 50) -> list[int]:
    (output,) = llm.generate([PROMPT], params(max_tokens), use_tqdm=False)
    return output.outputs[0].token_ids


def info(llm: LLM | AsyncLLM) -> Any:
    return llm._engine.info  # type: ignore[attr-defined]


class Told(logging.Handler):
    """An event for each piece of text that the log is to hold."""

    def __init__(self, **texts: str) -> None:
        super().__init__()
        self.texts = texts
        self.events = {name: threading.Event() for name in texts}

    def emit(self, record: logging.LogRecord) -> None:
        for name, text in self.texts.items():
            if text in record.getMessage():
                self.events[name].set()

    def __enter__(self) -> "Told":
        logging.getLogger("eagleray").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("eagleray").removeHandler(self)


def test_a_core_that_is_stopped_is_named_and_goes_on_once_continued(llm: LLM) -> None:
    expected = token_ids(llm)
    pid = info(llm).core_pid
    results: list[list[int]] = []
    with Told(stopped=f"(process {pid} is stopped); waiting for it", on="the engine core is responding again") as told:
        os.kill(pid, signal.SIGSTOP)
        thread = threading.Thread(target=lambda: results.append(token_ids(llm)))
        thread.start()
        assert told.events["stopped"].wait(30)
        os.kill(pid, signal.SIGCONT)
        assert told.events["on"].wait(30)
        thread.join(60)
    assert results == [expected]


def test_strangers_at_any_of_the_sockets_change_nothing(llm: LLM) -> None:
    expected = token_ids(llm)
    sockets = []
    for hub in Path(tempfile.gettempdir()).glob("eagleray-*/hub"):
        for name in (b"rank 0", b"rank 1", b"outputs", b"heartbeat 1", b"x"):
            stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
            stranger.setsockopt(zmq.IDENTITY, name)
            stranger.connect(f"ipc://{hub}")
            for frames in ([b"\xc1"], [b""], [b"a", b"b"], [b"\x91" * 10_000]):
                stranger.send_multipart(frames)
            sockets.append(stranger)
    assert len(sockets) >= 10
    assert token_ids(llm) == expected
    for stranger in sockets:
        stranger.close(linger=0)
    assert token_ids(llm) == expected


def test_ranks_of_one_machine_listen_on_loopback_alone(llm: LLM) -> None:
    listening = [
        connection.laddr.ip
        for pid in info(llm).rank_pids
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    beyond = [ip for ip in listening if ip not in ("127.0.0.1", "::1")]
    assert len(beyond) == 2, "each rank has one port of Ray's own, and nothing else for other machines"
    assert len(listening) >= 4, "the ranks have a store, and gloo a port on each"


@pytest.mark.parametrize(("load", "size"), [(0, 1), (1, 2)], ids=["idle", "running"])
async def test_a_stopped_rank_is_named_long_before_its_step_is_late(model_dir: Path, load: int, size: int) -> None:
    llm = AsyncLLM(model_dir, size, **OPTIONS)
    pid = info(llm).rank_pids[-1]
    try:
        stream = llm.generate(PROMPT, params(4000))
        await anext(stream)
        if not load:
            await stream.aclose()
        os.kill(pid, signal.SIGSTOP)
        cause = rf"rank {size - 1} has given no sign of life for \d s \(process {pid} is stopped\)"
        if load:
            output = await asyncio.wait_for(_last(stream), 30)
            assert output.outputs[0].finish_reason == "error"
        with pytest.raises(EngineDeadError, match=cause):
            await asyncio.wait_for(_until_dead(llm), 30)
    finally:
        llm.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).wait(15) is None


async def _last(stream: Any) -> Any:
    return [output async for output in stream][-1]


async def _until_dead(llm: AsyncLLM) -> None:
    while True:
        llm.check_health(1000)
        await asyncio.sleep(0.1)


class CountingSelector(selectors.DefaultSelector):
    """Counts how often the event loop turns."""

    num_turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.num_turns += 1
        return super().select(timeout)


def test_the_event_loop_rests_once_the_engine_is_dead(model_dir: Path) -> None:
    selector = CountingSelector()
    llm = AsyncLLM(model_dir, **OPTIONS)

    async def turns_in_half_a_second() -> int:
        stream = llm.generate(PROMPT, params(4000))
        await anext(stream)
        os.kill(info(llm).core_pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        await asyncio.sleep(0.1)
        before = selector.num_turns
        await asyncio.sleep(0.5)
        return selector.num_turns - before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        assert runner.run(turns_in_half_a_second()) < 50
    llm.close()
