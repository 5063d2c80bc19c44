"""`eagleray batch` as a process: run to its end, or killed on the way."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.random_checkpoint import make_model

PATIENCE_S = 180.0
LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,  # the demo model's, whose tokenizer is used
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENGINE = ["--threads-per-rank", "1", "--kv-cache-bytes", "20000000", "--max-num-seqs", "4", "--device", "cpu"]


def small_checkpoint(directory: Path, demo_model: Path) -> Path:
    """Random weights, the demo model's tokenizer and chat template."""
    make_model(dict(LLAMA)).save_pretrained(directory)
    for file in demo_model.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, directory)
    return directory


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted, of good rows with bad ones between the first and the others."""

    said: str  # on standard error
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """One command, as often as it takes."""

    input: str
    output: str
    model: Path
    environment: dict[str, str]
    options: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        return [self.input, self.output, "--model", str(self.model), *ENGINE, *self.options]

    def start(self) -> "subprocess.Popen[str]":
        """Its standard error is a pipe."""
        command = [sys.executable, "-m", "eagleray", "batch", *self.words]
        return subprocess.Popen(
            command, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self) -> tuple[int, str]:
        """The exit code, and what it wrote to standard error."""
        with self.start() as process:
            try:
                _, err = process.communicate(timeout=PATIENCE_S)
            except BaseException:
                process.kill()
                raise
        return process.returncode, err

    def kill_once(self, moment: Callable[[], bool]) -> bool:
        """SIGKILL it as soon as `moment` has come; whether it came before the job's end."""
        with self.start() as process:
            deadline = time.monotonic() + PATIENCE_S
            while process.poll() is None and not moment():
                assert time.monotonic() < deadline, "the moment to kill the job never came"
                time.sleep(0.002)
            process.kill()
            process.communicate()
        return process.returncode == -signal.SIGKILL

    @property
    def num_written(self) -> int:
        """Bytes in the partial file."""
        try:
            return Path(f"{self.output}.partial").stat().st_size
        except FileNotFoundError:  # not yet, or it is the output by now
            return 0
