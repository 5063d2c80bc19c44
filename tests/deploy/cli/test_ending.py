"""SIGTERM: commands end by an exception, and soon even where Ray's own code waits."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.deploy.cli.ending import Terminated, run_async
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

EAGLERAY = [sys.executable, "-m", "eagleray"]
WAITS = """
import asyncio, sys
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.ending import ending_on_sigterm, run_async

async def main():
    waits = asyncio.create_task(asyncio.sleep(600))
    try:
        print("ready", flush=True)
        await waits
    finally:
        print("closed", flush=True)

with ending_on_sigterm():
    sys.exit(cli.guarded(lambda _: run_async(main), cli.argparse.Namespace(debug=False)))
"""


def test_what_runs_is_closed_and_the_exit_code_says_why() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "closed\n", "eagleray: ended by SIGTERM\n")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_order_that_comes_while_a_loop_is_made_is_heeded_once_it_is_there(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []

    class Loop(asyncio.SelectorEventLoop):
        def __init__(self) -> None:
            signal.raise_signal(number)
            super().__init__()

    async def main() -> None:
        begun.append(True)

    monkeypatch.setattr(asyncio.events, "new_event_loop", Loop)

    def end(*_: object) -> None:
        raise Terminated(1)

    before = signal.signal(number, end)
    try:
        with pytest.raises(Terminated):
            run_async(main)
    finally:
        signal.signal(number, before)
    gc.collect()  # nothing that is half made complains
    assert begun == []


@pytest.mark.filterwarnings("error")
def test_a_coroutine_that_is_not_begun_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        return 7

    def fail(self: asyncio.Runner, coroutine: object) -> None:
        raise Terminated(1)

    assert run_async(main) == 7
    monkeypatch.setattr(asyncio.Runner, "run", fail)
    with pytest.raises(Terminated):
        run_async(main)
    gc.collect()


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_command_ends_though_the_ray_that_it_joins_says_nothing(tmp_path: Path, command: str) -> None:
    """Ray waits for it in code that no handler of Python's interrupts."""
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n')
    words = {"generate": ["hello"], "batch": [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]}[command]
    with socket.create_server(("", 0)) as silent:  # Ray asks at another of this machine's addresses
        silent.settimeout(120)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [*EAGLERAY, command, *words, "--model", str(model)],
            env=os.environ | {"RAY_ADDRESS": address},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            accepted = [silent.accept()[0] for _ in range(2)]  # a first look whether something listens, then Ray
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            code = process.returncode
            for connection in accepted:
                connection.close()
        finally:
            process.kill()
            process.communicate()
    assert code == 143
