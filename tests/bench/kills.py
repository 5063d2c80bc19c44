"""Ranks, engine core and front end are killed, or stopped, under 32 streams: what was seen, how soon, what is left.

A front end or a core that is stopped is continued after `--pause` seconds, and then has to go on.
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.strikes import Struck, family, own_places, send, wait_until_gone

NUM_STREAMS = 32
MAX_TOKENS = 2000
VICTIMS = ("rank 0", "rank 1", "core", "front end")
SIGNALS = ("SIGKILL", "SIGSTOP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pause", type=float, default=12.0)
    parser.add_argument("--victims", nargs="*", default=VICTIMS)
    parser.add_argument("--signals", nargs="*", default=SIGNALS)
    parser.add_argument("--client", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        asyncio.run(client(arguments.client))
        return
    from eagleray.deploy.bench.environment import hardware, versions
    from support.tiny_model import write_tiny_model

    table = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder, "model"))
        for victim in arguments.victims:
            for name in arguments.signals:
                for _ in range(arguments.repeats):
                    table.append(strike(model, victim, name, arguments.pause).as_dict())
                    print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    settings = {"streams": NUM_STREAMS, "ranks": 2, "pause_s": arguments.pause}
    record = {"date": datetime.now(UTC).date().isoformat(), **settings, "table": table}
    print(json.dumps(record | {"versions": versions(), "hardware": hardware()}))


def strike(model: Path, victim: str, name: str, pause: float) -> Struck:
    """One engine in a process of its own, one signal."""
    struck = Struck(victim=victim, signal=name)
    with own_places() as (environment, folder):
        command = [sys.executable, __file__, "--client", str(model)]
        log = Path(folder, "log")
        with (
            log.open("w") as err,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True) as process,
        ):
            events = _events(process)
            begun = [event for event in (next(events, None), next(events, None)) if event]  # pids, and all streams run
            if len(begun) < 2:
                print(log.read_text(), file=sys.stderr)  # Ray itself may give up its start on a busy machine
                return strike(model, victim, name, pause)
            pids = begun[0]["pids"]
            processes = family(process.pid)
            send(pids[victim], name)
            begin = time.time()
            if name == "SIGSTOP" and victim in ("core", "front end"):
                time.sleep(pause)
                send(pids[victim], "SIGCONT")
            for event in events:
                if "end" in event:
                    struck.see(event["end"], event["at"] - begin)
                else:
                    struck.again_s = round(event["again"] - begin, 2)
            process.wait(60)
            wait_until_gone(processes, struck)
        struck.left += [str(path.relative_to(folder)) for path in Path(environment["TMPDIR"]).glob("eagleray-*")]
        lines = Counter(line for line in log.read_text().splitlines() if line)
        struck.seen |= {f"log: {line}": count for line, count in lines.most_common(5)}
    return struck


def _events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            yield json.loads(line)
        except ValueError:
            print(f"not ours: {line!r}", file=sys.stderr)


async def client(model: str) -> None:
    """Run the streams; what each of them ended with, and when. Then one more request, on a new engine if need be."""
    from eagleray import AsyncLLM, EngineDeadError, SamplingParams

    logging.basicConfig(format="%(message)s")
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    begun = []

    async def stream(llm: AsyncLLM, number: int) -> None:
        end = "no end"
        try:
            async for output in llm.generate([number + 1, 2, 3], params):
                if number not in begun:
                    begun.append(number)
                end = output.outputs[0].error or output.outputs[0].finish_reason or "no end"
        except EngineDeadError as error:
            end = str(error)
        print(json.dumps({"end": end, "at": time.time()}), flush=True)

    llm = AsyncLLM(model, 2, threads_per_rank=1)
    info = llm._engine.info  # type: ignore[attr-defined]
    ranks = {f"rank {rank}": pid for rank, pid in enumerate(info.rank_pids)}
    pids = ranks | {"core": info.core_pid, "front end": os.getpid()}
    print(json.dumps({"pids": pids}), flush=True)
    streams = [asyncio.create_task(stream(llm, number)) for number in range(NUM_STREAMS)]
    while len(begun) < NUM_STREAMS:
        await asyncio.sleep(0.01)
    print(json.dumps({"begun": NUM_STREAMS}), flush=True)
    await asyncio.gather(*streams)
    try:
        await anext(llm.generate([1, 2], params))
    except EngineDeadError:
        llm.close()
        llm = AsyncLLM(model, 2, threads_per_rank=1)
        await anext(llm.generate([1, 2], params))
    print(json.dumps({"again": time.time()}), flush=True)
    llm.close()


if __name__ == "__main__":
    main()
