"""What rows without a seed draw by: their line and the job's seed, wherever and however often they run."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from eagleray.cluster.core.messages import RequestMessage, Submit
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits, derive_seed
from eagleray.deploy.batch.replica import AppReplica
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.served_model import ServedModel
from support.batch_files import read_results, row, texts, write_rows
from support.batch_jobs import Batch
from support.cluster_process import Cluster
from support.local_engine import LocalEngine
from support.processes import command_line

NUM_ROWS = 40
SEED = 7


class SeedsHeard(LocalEngine):
    """What each sequence is to draw by, in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def send(self, message: RequestMessage) -> None:
        if isinstance(message, Submit):
            self.seeds += [seed for each in message.requests for seed in (each.sampling.seed, *each.seeds)]
        super().send(message)


async def test_prompts_and_choices_of_a_row_each_have_their_share_of_its_seed() -> None:
    engine = SeedsHeard()
    limits = ModelLimits(max_model_len=1000, vocab_size=50, eos_token_ids=frozenset())
    llm = AsyncClient(engine, FrontEnd(None, limits, SEED))
    app = AppReplica(make_app(ServedModel(llm, "toy", 1000, 1)))

    async def seeds(row_seed: int | None = None, **body: Any) -> list[int]:
        engine.seeds.clear()
        asked = {"prompt": [[1, 2], [1, 2]], "max_tokens": 1} | body
        answer = await app.answer("/v1/completions", json.dumps(asked).encode(), row_seed)
        assert answer.status == 200, answer.body
        return list(engine.seeds)

    first = await seeds(1, n=2)
    assert len(set(first)) == 4
    assert await seeds(1, n=2) == first, "the engine has had requests meanwhile"
    assert not set(first) & set(await seeds(2, n=2))
    assert await seeds(1, seed=5) == [5, 5]
    assert await seeds(1, temperature=0) == [0, 0]
    assert await seeds() == [derive_seed(SEED, number) for number in (10, 11)]
    llm.close()


@pytest.mark.engine
def test_a_jobs_draws_are_the_same_with_other_replicas_and_after_a_death(
    tmp_path: Path, cluster: Cluster, model: Path
) -> None:
    """And though all rows ask the same, no two draw the same."""
    rows = [row(1, max_tokens=12, temperature=1.0) | {"custom_id": f"row {index}"} for index in range(NUM_ROWS)]
    write_rows(tmp_path / "in.jsonl", rows)

    def batch(output: str, num_replicas: int) -> Batch:
        options = ("--engine-seed", str(SEED), "--replicas", str(num_replicas))
        return Batch(str(tmp_path / "in.jsonl"), str(tmp_path / output), model, cluster.environment, options)

    code, err = batch("one.jsonl", 1).run()
    assert code == 0, err
    expected = texts(read_results(tmp_path / "one.jsonl"))
    assert len(set(expected.values())) == NUM_ROWS

    two, killed = batch("two.jsonl", 2), list[int]()

    def kill_a_rank() -> bool:
        if two.num_written and not killed:
            ray = psutil.Process(cluster.pid)
            ranks = [each for each in ray.children(recursive=True) if "ray::RankActor" in command_line(each)]
            killed.append(ranks[0].pid)
            ranks[0].send_signal(signal.SIGKILL)
        return False

    assert not two.kill_once(kill_a_rank)
    assert killed
    assert texts(read_results(tmp_path / "two.jsonl")) == expected
