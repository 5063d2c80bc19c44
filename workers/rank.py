"""One rank of an engine: starts in three calls, then runs the steps that arrive until told to end."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from eagleray.models.loading.model_dir import is_of_hub, model_dir
from eagleray.workers.heartbeat import Heartbeat
from eagleray.workers.output_sender import OutputSender
from eagleray.workers.protocol.channel import Endpoint, Peer
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.garbage import freeze_startup
from eagleray.workers.protocol.messages import Goodbye, RankControl, RankMessage
from eagleray.workers.protocol.priority import run_at_normal_priority
from eagleray.workers.protocol.startup import (
    FETCHING,
    GRAPHS,
    JOINING,
    MEMORY_PROFILE,
    WEIGHTS,
    Loaded,
    RankHost,
    Ready,
)
from eagleray.workers.startup_reporter import StartupReporter

if TYPE_CHECKING:
    from eagleray.workers.oom_guard import OomGuard

# NVLink multicast is not available on every machine, and these libraries hang rather than notice.
CUDA_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
# Triton keeps what it has compiled in TRITON_CACHE_DIR, or else in ~/.triton/cache. Nothing here changes or clears it:
# a folder that outlives the rank makes the next start some seconds shorter.
SENDER_CHECK_S = 0.5
LOAD_PARTS = (JOINING, WEIGHTS, MEMORY_PROFILE)


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and as which one of how many."""

    rank: int
    size: int
    generation: int  # how often the engine's ranks were started before; part of the name of their group
    node_id: str
    node_ip: str
    gpu: int | None = None  # torch's index; None on the host


class Rank:
    """Starts in three calls, each made on every rank before the next: `prepare`, `load`, `serve`.

    torch is imported by `prepare` and not with this module: the core imports the module too, and the environment that
    torch's libraries read must be set before.
    """

    def __init__(self, place: Place, config: WorkerConfig, listener: Endpoint, hub: Endpoint) -> None:
        """The `listener` is told how far the start is; the `hub` is the engine core's, for beats, steps and outputs."""
        self._place = place
        self._rank = place.rank
        self._size = place.size
        self._config = config
        self._hub = hub
        self._heartbeat = Heartbeat(place.rank, hub)
        self._startup_reporter = StartupReporter(place.rank, listener)
        self._store: Any = None
        self._model: Any = None
        self._tp: Any = None
        self._device: Any = None

    def prepare(self, one_node: bool) -> RankHost:
        """Import all that the rank will need, take its device, and open the store on rank 0.

        Ranks on `one_node` talk over loopback alone.
        """
        node_ip = self._place.node_ip
        folder = Path(self._config.model)
        if folder.is_absolute() and not folder.is_dir():
            raise ValueError(
                f"there is no model at {self._config.model} on node {node_ip}; copy it there, to the same path on "
                "every node, or name a directory that all nodes share"
            )
        niceness = run_at_normal_priority()
        self._set_environment()
        import torch

        import eagleray.models.loading.loader
        import eagleray.workers.kv_capacity
        import eagleray.workers.oom_guard  # noqa: F401
        from eagleray.parallel.network import LOOPBACK, open_store
        from eagleray.parallel.platform import platform_of
        from eagleray.workers.fit import memory_bytes, needed_bytes

        if is_of_hub(self._config.model):  # which others on this node may be fetching, too
            self._startup_reporter.begin(FETCHING)
        folder = model_dir(self._config.model, self._config.revision, weights=self._config.load_format != "dummy")
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        gpu = self._place.gpu
        self._device = torch.device(self._config.device) if gpu is None else torch.device(self._config.device, gpu)
        if (accelerator := platform_of(self._device).accelerator) is not None:
            accelerator.set_device(self._device)
        store_ip = LOOPBACK if one_node else node_ip
        if self._rank == 0 and self._size > 1:
            self._store = open_store(store_ip, self._size)
        port = None if self._store is None else self._store.port
        return RankHost(
            node_id=self._place.node_id,
            ip=node_ip,
            pid=os.getpid(),
            store_ip=store_ip,
            store_port=port,
            niceness=niceness,
            needed_bytes=needed_bytes(folder, self._config, self._rank, self._size),
            memory_bytes=memory_bytes(self._device),
        )

    def _set_environment(self) -> None:
        os.environ.update(CUDA_ENVIRONMENT)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # peer access needs to see the other ranks' GPUs
        if self._config.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self._config.threads)

    def load(self, ip: str, store_port: int | None) -> Loaded:
        """Join the ranks, load this one's shard of the model, and find out how many KV blocks fit."""
        import torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from eagleray.models.loading.loader import load_model
        from eagleray.parallel.group import init_tp_group
        from eagleray.parallel.platform import synchronize
        from eagleray.workers.kv_capacity import num_blocks_that_fit
        from eagleray.workers.out_of_memory import explained

        self._startup_reporter.begin(JOINING)
        times = [time.monotonic()]
        if store_port is not None and self._store is None:
            self._store = TCPStore(ip, store_port, self._size, is_master=False)
        name = f"tp{self._place.generation}"
        self._tp = init_tp_group(self._rank, self._size, self._store, self._device, name=name)
        times.append(time.monotonic())
        self._startup_reporter.begin(WEIGHTS)
        remedy = "raise tensor_parallel_size, or end what else runs there"
        with explained("the weights", remedy, self._device):
            self._model = load_model(
                model_dir(self._config.model, self._config.revision),
                tp=self._tp,
                dtype=getattr(torch, self._config.dtype),
                device=self._device,
                load_format=self._config.load_format,
                seed=self._config.seed,
                max_positions=self._config.max_model_len,
                on_bytes=self._startup_reporter.count,
            )
            synchronize(self._device)  # dummy weights are still being made
        times.append(time.monotonic())
        self._startup_reporter.begin(MEMORY_PROFILE)
        num_blocks = num_blocks_that_fit(self._config, self._model, self._tp)
        times.append(time.monotonic())
        parts = zip(LOAD_PARTS, times, times[1:], strict=False)
        seconds = {part: end - begin for part, begin, end in parts}
        return Loaded(num_blocks, seconds, sum(weights.nbytes for weights in self._model.parameters()))

    def _worker(self, num_blocks: int) -> "tuple[OomGuard, Ready]":
        from eagleray.workers.oom_guard import OomGuard
        from eagleray.workers.out_of_memory import explained
        from eagleray.workers.worker import Worker

        begin = time.monotonic()
        remedy = "lower gpu_memory_utilization, kv_cache_bytes or max_num_seqs, or raise tensor_parallel_size"
        with explained("the KV cache and the decode graphs", remedy, self._device):
            worker = Worker(self._config, self._model, self._tp, num_blocks)
        graphs = worker.graphs.decode_bytes.values()
        alone, max_rows = self._size == 1, self._config.max_num_seqs
        guard = OomGuard(worker, max_rows=max_rows, alone=alone, device=self._device)
        return guard, Ready(time.monotonic() - begin, len(graphs), sum(graphs), worker.graphs.attention)

    def serve(self, num_blocks: int) -> None:
        """Run the steps that arrive until told goodbye. Rank 0 answers each with its output."""
        from eagleray.workers.profiler import RankProfiler

        self._startup_reporter.begin(GRAPHS)
        worker, ready = self._worker(num_blocks)
        profiler = RankProfiler(self._rank, self._device)
        decode = msgspec.msgpack.Decoder(RankMessage).decode
        hub = Peer(self._hub, b"rank %d" % self._rank)
        hub.send(msgspec.msgpack.encode(ready))  # the hub can only reach a peer that it has heard of
        self._startup_reporter.close()
        freeze_startup()
        output_sender = OutputSender(self._hub) if self._rank == 0 else None
        while not isinstance(message := decode(self._next_payload(hub, output_sender)), Goodbye):
            if isinstance(message, RankControl):
                hub.send(msgspec.msgpack.encode(profiler.handle(message)))
                continue
            begin = time.monotonic()
            pending = worker.launch(message)
            profiler.count_step()
            if output_sender is not None:
                output_sender.report(pending, begin)
        profiler.drop()
        hub.close()
        self._heartbeat.close()

    @staticmethod
    def _next_payload(hub: Peer, output_sender: OutputSender | None) -> bytes:
        """The next message; meanwhile a failure of the sender is noticed, too."""
        while (payload := hub.receive(SENDER_CHECK_S)) is None:
            if output_sender is not None:
                output_sender.check()
        return payload
