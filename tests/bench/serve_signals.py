"""Tells `eagleray serve` to end at random moments of its start and of its run, and looks at what is left over.

The moments are drawn over the time that a whole start takes, measured first, and half as much again, with streams
that run once it answers. Prints one JSON object per moment and one in all. Fails if a code is wrong or
anything is left.

Usage: python tests/bench/serve_signals.py [--times N] [--seed N] [--joined]
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from support.cluster_process import running_cluster
from support.served_command import ServedCommand, complaints
from support.tiny_model import write_tiny_model

CODES = {signal.SIGTERM: (0, -signal.SIGTERM, 143), signal.SIGINT: (130, -signal.SIGINT)}  # its own, or Python's
ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
PATIENCE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--joined", action="store_true", help="on a Ray that runs already")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with ExitStack() as held:
        model = write_tiny_model(Path(held.enter_context(tempfile.TemporaryDirectory()), "model"))
        environment = held.enter_context(running_cluster()).environment if arguments.joined else None
        begin = time.monotonic()
        with ServedCommand(model, environment=environment) as command:
            command.wait_until_it_answers()
            start_s = time.monotonic() - begin
            command.end()
        print(f"a start takes {start_s:.0f} s", file=sys.stderr, flush=True)
        cases = []
        for _ in range(arguments.times):
            moment = rng.uniform(0, 1.5 * start_s)
            cases.append(told(model, moment, rng.choice(list(CODES)), environment))
            print(json.dumps(cases[-1]), flush=True)
    wrong = [case for case in cases if case["left"] or case["code"] not in CODES[signal.Signals[str(case["signal"])]]]
    figures = {"moments": len(cases), "longest_s": max(float(str(case["seconds"])) for case in cases), "wrong": wrong}
    settings: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": arguments.seed,
        "joined": arguments.joined,
    }
    about = {"start_s": round(start_s), "versions": versions(), "hardware": hardware()}
    print(json.dumps(settings | figures | about))
    sys.exit(bool(wrong))


def told(model: Path, moment: float, number: signal.Signals, environment: dict[str, str] | None) -> dict[str, object]:
    """Tell a command to end so many seconds after it began."""
    with ServedCommand(model, environment=environment) as command:
        due = time.monotonic() + moment
        streams: list[threading.Thread] = []
        while time.monotonic() < due:
            command.family()
            if not streams and "answers at" in command.log.read_text():
                streams = [threading.Thread(target=stream, args=(command.url,)) for _ in range(4)]
                for each in streams:
                    each.start()
            time.sleep(0.05)
        seconds = command.end(number, PATIENCE_S)
        for each in streams:
            each.join()
        said = complaints(command.log.read_text())
        return {
            "moment_s": round(moment, 1),
            "serving": bool(streams),
            "signal": number.name,
            "code": command.process.returncode,
            "seconds": round(seconds, 1),
            "left": command.left(),
            "said": [line for line in said if not line.startswith(("starting", "ready"))],
        }


def stream(url: str) -> None:
    with suppress(httpx.TransportError):  # one that came too late
        httpx.post(f"{url}/v1/completions", json=ASKED, timeout=PATIENCE_S, trust_env=False)


if __name__ == "__main__":
    main()
