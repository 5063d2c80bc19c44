"""A rank without Ray, told what to do over its sockets, against a worker that is called directly."""

import threading
from array import array
from pathlib import Path

import msgspec
import torch

from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import Beat, Goodbye, RankReport, RowStart, Sampling, Step, StepOutput
from eagleray.workers.protocol.startup import PHASES, Progress, Ready
from eagleray.workers.rank import Rank
from eagleray.workers.rank_start import Place
from eagleray.workers.worker import Worker
from support.rank_pool import RunRanks
from support.tiny_model import write_tiny_model
from support.worker_config import worker_config

PROMPT = array("i", [3, 1, 4, 1, 5, 9, 2, 6])
FIRST = Step(
    1,
    start=[RowStart(0, PROMPT.tobytes(), len(PROMPT), [0, 1, 2], Sampling(temperature=0.0))],
    chunks={0: len(PROMPT)},
)


def config_of(folder: Path) -> WorkerConfig:
    return worker_config(
        model=str(write_tiny_model(folder)),
        max_model_len=64,
        block_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        kv_cache_bytes=10**6,
    )


def expected(config: WorkerConfig, num_blocks: int) -> list[bytes]:
    cpu = torch.device("cpu")
    model = load_model(Path(config.model), tp=TPGroup(), dtype=torch.float64, device=cpu, load_format="dummy", seed=0)
    worker = Worker(config, model, TPGroup(), num_blocks)
    return [worker.run(step).token_ids for step in (FIRST, Step(2), Step(3))]


def next_report(hub: Hub) -> RankReport:
    """The next one that is no beat."""
    while True:
        assert hub.socket.poll(60_000), "the rank says nothing"
        while (message := hub.receive()) is not None:
            report: RankReport = msgspec.msgpack.decode(message[1], type=RankReport)
            if not isinstance(report, Beat):
                return report


def test_a_rank_starts_runs_steps_and_ends(tmp_path: Path) -> None:
    config, hub, listener = config_of(tmp_path), Hub(), Hub()
    rank = Rank(
        Place(rank=0, size=1, generation=0, node_id="here", node_ip="127.0.0.1"),
        config,
        listener.endpoint,
        hub.endpoint,
    )
    host = rank.prepare(one_node=True)
    assert (host.node_id, host.store_port) == ("here", None)
    loaded = rank.load(host.store_ip, host.store_port)
    serving = threading.Thread(target=rank.serve, args=(loaded.num_blocks,))
    serving.start()
    assert isinstance(next_report(hub), Ready)
    answers = []
    for step in (FIRST, Step(2), Step(3)):
        hub.send(b"rank 0", msgspec.msgpack.encode(step))
        report = next_report(hub)
        assert isinstance(report, StepOutput)
        answers.append(report.token_ids)
    hub.send(b"rank 0", msgspec.msgpack.encode(Goodbye()))
    serving.join(timeout=30)
    assert not serving.is_alive()
    assert answers == expected(config, loaded.num_blocks)
    told = set()
    while (message := listener.receive()) is not None:
        told.add(msgspec.msgpack.decode(message[1], type=Progress).phase)
    assert told <= set(PHASES)
    assert len(told) >= 3
    hub.close()
    listener.close()


def test_a_group_of_an_earlier_start_never_meets_that_of_a_later_one(run_ranks: RunRanks, tmp_path: Path) -> None:
    for said, total in run_ranks("two_generations", 2, folder=str(write_tiny_model(tmp_path))):
        assert "no process group 'tp0' in this process" in said
        assert total.tolist() == [3.0]
