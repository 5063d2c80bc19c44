"""The command line with a real engine: two ranks as Ray actors, the demo model, and a terminal where one belongs."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray

from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.processes import command_line
from support.screen import screen
from support.tiny_model import write_tiny_model

EAGLERAY = [sys.executable, "-m", "eagleray"]
# A Ray of its own, whatever else runs on the machine; one thread for each rank leaves room on two cores.
ENVIRONMENT = os.environ | {
    "RAY_ADDRESS": "local",
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm",
    "COLUMNS": "80",
    "LINES": "24",
}
OPTIONS = [
    *["--model", "demo", "--tp", "2", "--threads-per-rank", "1", "--temperature", "0"],
    *["--max-model-len", "1024", "--kv-cache-bytes", "50000000"],
]
PATIENCE_S = 180.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("demo_model_dir")]


@pytest.fixture
def joined(ray_cluster: None) -> dict[str, str]:
    """The environment of commands that join the tests' cluster, and need not start one."""
    return ENVIRONMENT | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


class Terminal:
    """A process on a pseudo-terminal. `sent` is all it wrote, `seen` the same without escape sequences."""

    def __init__(self, file: int, process: "subprocess.Popen[bytes]") -> None:
        self._file = file
        self.process = process
        self.seen = ""
        self.sent = ""

    def wait_for(self, pattern: str, start: int = 0) -> int:
        """Read until `pattern` occurs after `start`; returns where its first occurrence ends."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.compile(pattern).search(self.seen, start)) is None:
            assert self._read(deadline), f"{pattern!r} never came; seen:\n{self.seen}"
        return found.end()

    def press(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def wait_for_end(self) -> int:
        """The exit code, once everything is read."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass
        return self.process.wait(timeout=PATIENCE_S)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            read = os.read(self._file, 65536)
        except OSError:  # Linux's end of file on a pseudo-terminal
            return False
        self.sent += read.decode(errors="replace")
        self.seen += ESCAPES.sub("", read.decode(errors="replace"))
        return bool(read)


@contextmanager
def on_a_terminal(*words: str, environment: dict[str, str] = ENVIRONMENT) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*EAGLERAY, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=become_foreground,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        os.close(ours)


def become_foreground() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_json_answers_every_prompt_in_order_and_a_bad_one_hurts_no_other(
    tmp_path: Path, joined: dict[str, str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "What is the capital of France?\n"
        '{"prompt": [999999]}\n'
        '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}\n'
    )
    run = subprocess.run(
        [*EAGLERAY, "generate", *OPTIONS, "--max-tokens", "20", "--json", "--file", str(prompts)],
        capture_output=True, text=True, env=joined, stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
    )  # fmt: skip
    text, bad, messages = (json.loads(line) for line in run.stdout.splitlines())
    assert run.returncode == 1
    assert [entry["index"] for entry in (text, bad, messages)] == [0, 1, 2]
    assert text["outputs"][0]["text"] == "The capital of France is Paris."
    assert text["outputs"][0]["finish_reason"] == "stop"
    assert messages["outputs"] == text["outputs"]
    assert "999999" in bad["error"]
    defaults, ready, times, figures, complaint = run.stderr.splitlines()
    assert defaults == "eagleray: sampling defaults of the model's generation_config.json: top_p 0.9"
    assert ready.startswith("eagleray: engine ready: 2 ranks on cpu in float32")
    assert re.match(r"eagleray: ready in [\d.]+ s: Ray [\d.]+, processes and imports [\d.]+, joining", times)
    assert figures.startswith("2 requests · ")
    assert complaint.startswith("eagleray: prompt 2: ")


def test_a_raw_prompt_goes_through_no_template(joined: dict[str, str], demo_model_dir: Path) -> None:
    prompt = "def fibonacci(n):"
    run = subprocess.run(
        [*EAGLERAY, "generate", *OPTIONS, "--max-tokens", "1", "--json", "--raw", prompt],
        capture_output=True, text=True, env=joined, stdin=subprocess.DEVNULL, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    assert json.loads(run.stdout)["num_prompt_tokens"] == len(Tokenizer.from_dir(demo_model_dir).encode(prompt))


def test_on_a_terminal_answers_stream_beside_each_other_with_a_bar_and_figures(joined: dict[str, str]) -> None:
    words = ["--max-tokens", "48", "What is the capital of France?", "Tell me a long story."]
    with on_a_terminal("generate", *OPTIONS, *words, environment=joined) as terminal:
        assert terminal.wait_for_end() == 0
    seen = terminal.seen
    start = seen[: seen.index("eagleray: engine ready")]
    phases = ("Ray", "processes and imports", "joining", "weights", "memory profile", "graphs")
    assert re.search(".*".join(f"starting SmolLM2-135M-Instruct {phase} 0:0" for phase in phases), start, re.DOTALL)
    assert re.search(r"\d/\d{3}\.\d MB", start)
    first, second = screen(terminal.sent)[:2]  # and nothing of the progress above or beside
    assert first.startswith("eagleray: sampling defaults of the model")
    assert second.startswith("eagleray: engine ready")
    counts = {int(count) for count in re.findall(r"(\d+) tokens · ", seen)}
    assert len(counts) >= 4  # the bar moved while tokens came
    assert "2 requests · " in seen
    assert "p99" in seen
    assert "0/2 requests" in seen
    kept = seen[seen.rindex("What is the capital of France?") :]
    assert "The capital of France is Paris." in kept
    assert "(cut at 48 tokens)" in kept
    assert kept.index("Paris") < kept.index("Tell me a long story.")


def test_interrupting_generate_keeps_what_was_said_and_leaves_no_process(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    words = ["--model", str(model), "--max-model-len", "4096", "--max-tokens", "4000", "--ignore-eos"]
    with on_a_terminal("generate", *OPTIONS, *words, "Tell me a long story.") as terminal:
        terminal.wait_for(r"[1-9]\d* tokens · ")
        family = psutil.Process(terminal.process.pid).children(recursive=True)
        assert any("ray" in command_line(member) for member in family)
        terminal.press("\x03")
        assert terminal.wait_for_end() == 130
    assert "(interrupted)" in terminal.seen
    assert "eagleray: interrupted" in terminal.seen
    assert "Traceback" not in terminal.seen
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_chat_streams_remembers_stops_and_forgets(joined: dict[str, str]) -> None:
    with on_a_terminal("chat", *OPTIONS, "--tp", "1", environment=joined) as terminal:
        at = terminal.wait_for("\n> ")
        terminal.press("What is the capital of France?\n")
        at = terminal.wait_for(r"The capital of France is Paris\.\s+> ", at)
        terminal.press("Tell me a very long story.\n")
        at = terminal.wait_for(r"\w+ \w+ \w+ \w+", terminal.wait_for(r"story\.\r\n", at))
        terminal.press("\x03")
        at = terminal.wait_for(r"\(stopped\)\s+> ", at)
        terminal.press("/nonsense\n")
        at = terminal.wait_for(r"no command /nonsense.*\s+> ", at)
        terminal.press("/reset\n")
        at = terminal.wait_for("> ", terminal.wait_for("/reset", at))
        terminal.press("/exit\n")
        assert terminal.wait_for_end() == 0
    assert "Traceback" not in terminal.seen
