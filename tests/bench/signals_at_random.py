"""SIGTERM and Ctrl-C at random moments of a start and a run, of `eagleray generate` and of a script with `LLM`.

Each has to end within seconds, quietly, with status 143 or 130, and to leave no process and no socket.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from support.strikes import own_places, processes_in, title
from support.tiny_model import write_tiny_model

END_S = 60.0
OPTIONS = ("--tp", "2", "--threads-per-rank", "1", "--max-tokens", "3000", "--ignore-eos", "--raw")
SCRIPT = """
import sys
from eagleray import LLM, SamplingParams
if __name__ == "__main__":
    with LLM(sys.argv[1], 2, threads_per_rank=1) as llm:
        llm.generate([[1, 2]] * 8, SamplingParams(max_tokens=3000, ignore_eos=True), use_tqdm=False)
"""
CODES = {"SIGTERM": (143, -signal.SIGTERM), "SIGINT": (130, -signal.SIGINT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="*", default=("generate", "script"))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder, "model"))
        script = Path(folder, "script.py")
        script.write_text(SCRIPT)
        commands = {
            "generate": [
                sys.executable,
                "-m",
                "eagleray",
                "generate",
                "--model",
                str(model),
                *OPTIONS,
                "hi",
            ],
            "script": [sys.executable, str(script), str(model)],
        }
        for program in arguments.programs:
            whole = _struck(commands[program], "SIGTERM", None)
            print(f"{program} takes {whole['end_s']:.1f} s by itself", file=sys.stderr, flush=True)
            for number in range(arguments.moments):
                name = ("SIGTERM", "SIGINT")[number % 2]
                row = _struck(commands[program], name, rng.uniform(0.3, whole["end_s"]))
                table.append({"program": program, "signal": name} | row)
                print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    struck = [row for row in table if row["code"] != 0]  # the others had ended before
    figures = {
        "struck": len(struck),
        "right_code": sum(row["code"] in CODES[row["signal"]] for row in struck),
        "slowest_end_s": max(row["end_s"] for row in struck),
        "slowest_gone_s": max(row["gone_s"] for row in struck),
        "left": [row for row in struck if row["left"]],
        "most_lines": max(row["lines"] for row in struck),
    }
    record = {"date": datetime.now(UTC).date().isoformat(), "seed": arguments.seed, **figures, "table": table}
    print(json.dumps(record | {"versions": versions(), "hardware": hardware()}))


def _struck(command: list[str], name: str, moment: float | None) -> dict[str, Any]:
    """One run, struck after so many seconds, or left to its end."""
    with own_places() as (environment, folder):
        log = folder / "log"
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        begin = time.monotonic()
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            begin = time.monotonic()
            if name == "SIGINT":
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            else:
                process.terminate()
        try:
            process.wait(600 if moment is None else END_S)
        except subprocess.TimeoutExpired:
            print(f"still there after {END_S:g} s", file=sys.stderr)
            process.kill()
            process.wait()
        end_s = time.monotonic() - begin
        _, alive = psutil.wait_procs(processes_in(folder), timeout=20)
        left = [f"{each.status()} {title(each)}" for each in alive]
        gone_s = time.monotonic() - begin
        for each in alive:
            each.kill()
        left += [str(path) for path in Path(environment["TMPDIR"]).glob("eagleray-*")]
        lines = log.read_text().splitlines()
    return {
        "moment_s": moment and round(moment, 2),
        "code": process.returncode,
        "end_s": round(end_s, 2),
        "gone_s": round(gone_s, 2),
        "left": left,
        "lines": len(lines),
        "last_lines": [line[:200] for line in lines[-4:]],
    }


if __name__ == "__main__":
    main()
