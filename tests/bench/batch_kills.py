"""A batch job is killed by SIGKILL at random moments, again and again, and then finished.

Some kills hit the start of the engine and most hit rows; moments are drawn so that the rows last for all kills.
Fails unless every row is answered once, with the text of a run without kills.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from eagleray.models.loading.demo_model import demo_model
from support.batch_files import read_results, row, texts, write_rows
from support.batch_jobs import Batch, small_checkpoint
from support.cluster_process import running_cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_cluster() as cluster:
        model = small_checkpoint(Path(folder, "model"), demo_model())
        file = Path(folder, "in.jsonl")
        write_rows(file, (row(index) for index in range(arguments.rows)))
        whole = Batch(str(file), f"{folder}/whole.jsonl", model, cluster.environment)
        start, work = measured(whole)
        print(f"without kills: {start:.1f} s up to the first row, {work:.1f} s from there", flush=True)
        batch = Batch(str(file), f"{folder}/killed.jsonl", model, cluster.environment)
        rows_at_kills = kills(batch, arguments.kills, start, work, arguments.seed)
        code, err = batch.run()
        assert code == 0, err
        expected = texts(read_results(Path(whole.output)))
        assert len(expected) == arguments.rows
        assert texts(read_results(Path(batch.output))) == expected
    figures = {"kills": len(rows_at_kills), "rows": arguments.rows, "rows_done_at_kills": rows_at_kills}
    settings = {"seed": arguments.seed, "seconds_without_kills": [round(start, 1), round(work, 1)]}
    record = {"date": datetime.now(UTC).date().isoformat(), **figures, **settings, "every_row_once_same_texts": True}
    print(json.dumps(record | {"versions": versions(), "hardware": hardware()}))


def measured(batch: Batch) -> tuple[float, float]:
    """Run it: seconds up to the first row, and from there to the end."""
    times = [time.monotonic()]

    def note() -> bool:
        if len(times) == 1 and batch.num_written:
            times.append(time.monotonic())
        return False

    assert not batch.kill_once(note)
    begin, first = times
    return first - begin, time.monotonic() - first


def kills(batch: Batch, count: int, start: float, work: float, seed: int) -> list[int]:
    """Rows in the partial file after each kill. A job that is done before its moment is not a kill, and ends this.

    Every fourth comes within the seconds of a start, counted from the job's own; the others follow its first new row.
    """
    rng, found = random.Random(seed), []
    for number in range(count):
        early = number % 4 == 0
        delay = rng.uniform(0, start if early else 2 * work / count)
        if not batch.kill_once(_after(delay, batch, 0 if early else batch.num_written + 1)):
            break
        partial = Path(f"{batch.output}.partial")
        found.append(partial.read_bytes().count(b"\n") if partial.exists() else 0)
        print(f"kill {number + 1}: {found[-1]} rows", flush=True)
    return found


def _after(delay: float, batch: Batch, num_bytes: int) -> Callable[[], bool]:
    """So many seconds after the partial file has this size."""
    since: list[float] = []

    def due() -> bool:
        if not since and batch.num_written >= num_bytes:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + delay

    return due


if __name__ == "__main__":
    main()
