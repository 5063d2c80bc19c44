"""The phases of a rank after its start, each made of the one before: prepared, then loaded and ready to serve.

Importing this imports torch and all that a rank needs, so the environment that torch's libraries read must be set.
"""

import os
import time

import msgspec
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from eagleray.models.loading.loader import load_model
from eagleray.models.loading.model_dir import is_of_hub, model_dir
from eagleray.parallel.group import init_tp_group
from eagleray.parallel.network import LOOPBACK, open_store
from eagleray.parallel.platform import platform_of, synchronize
from eagleray.workers.fit import memory_bytes, needed_bytes
from eagleray.workers.kv_capacity import num_blocks_that_fit
from eagleray.workers.oom_guard import OomGuard
from eagleray.workers.out_of_memory import explained
from eagleray.workers.output_sender import OutputSender
from eagleray.workers.profiler import RankProfiler
from eagleray.workers.protocol.channel import Peer
from eagleray.workers.protocol.garbage import freeze_startup
from eagleray.workers.protocol.messages import Goodbye, RankControl, RankMessage
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
from eagleray.workers.rank_start import RankStart
from eagleray.workers.worker import Worker

SENDER_CHECK_S = 0.5
LOAD_PARTS = (JOINING, WEIGHTS, MEMORY_PROFILE)


class PreparedRank:
    """A rank that has the model's files and its device, and, as rank 0 of several, has opened the store."""

    def __init__(self, start: RankStart, *, one_node: bool, niceness: int) -> None:
        """Ranks on `one_node` talk over loopback alone."""
        place, config = start.place, start.config
        if is_of_hub(config.model):  # which others on this node may be fetching, too
            start.reporter.begin(FETCHING)
        self.folder = model_dir(config.model, config.revision, weights=config.load_format != "dummy")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = torch.device(config.device) if place.gpu is None else torch.device(config.device, place.gpu)
        if (accelerator := platform_of(self.device).accelerator) is not None:
            accelerator.set_device(self.device)
        store_ip = LOOPBACK if one_node else place.node_ip
        self.store = open_store(store_ip, place.size) if place.rank == 0 and place.size > 1 else None
        self.start = start
        self.host = RankHost(
            node_id=place.node_id,
            ip=place.node_ip,
            pid=os.getpid(),
            store_ip=store_ip,
            store_port=None if self.store is None else self.store.port,
            niceness=niceness,
            needed_bytes=needed_bytes(self.folder, config, place.rank, place.size),
            memory_bytes=memory_bytes(self.device),
        )


class LoadedRank:
    """A rank that has joined the others, holds its shard of the model, and knows how many KV blocks fit."""

    def __init__(self, prepared: PreparedRank, ip: str, store_port: int | None) -> None:
        """Meet the others at the store of rank 0, which is at `ip`."""
        self.start, self.device, store = prepared.start, prepared.device, prepared.store
        place, config, reporter = self.start.place, self.start.config, self.start.reporter
        reporter.begin(JOINING)
        times = [time.monotonic()]
        if store_port is not None and store is None:
            store = TCPStore(ip, store_port, place.size, is_master=False)
        self.store = store  # which must live as long as the group
        self.tp = init_tp_group(place.rank, place.size, store, self.device, name=f"tp{place.generation}")
        times.append(time.monotonic())
        reporter.begin(WEIGHTS)
        remedy = "raise tensor_parallel_size, or end what else runs there"
        with explained("the weights", remedy, self.device):
            self.model = load_model(
                prepared.folder,
                tp=self.tp,
                dtype=getattr(torch, config.dtype),
                device=self.device,
                load_format=config.load_format,
                seed=config.seed,
                max_positions=config.max_model_len,
                on_bytes=reporter.count,
            )
            synchronize(self.device)  # dummy weights are still being made
        times.append(time.monotonic())
        reporter.begin(MEMORY_PROFILE)
        num_blocks = num_blocks_that_fit(config, self.model, self.tp)
        times.append(time.monotonic())
        parts = zip(LOAD_PARTS, times, times[1:], strict=False)
        seconds = {part: end - begin for part, begin, end in parts}
        self.report = Loaded(num_blocks, seconds, sum(weights.nbytes for weights in self.model.parameters()))

    def _worker(self, num_blocks: int) -> tuple[OomGuard, Ready]:
        begin, config = time.monotonic(), self.start.config
        remedy = "lower gpu_memory_utilization, kv_cache_bytes or max_num_seqs, or raise tensor_parallel_size"
        with explained("the KV cache and the decode graphs", remedy, self.device):
            worker = Worker(config, self.model, self.tp, num_blocks)
        graphs = worker.graphs.decode_bytes.values()
        guard = OomGuard(worker, max_rows=config.max_num_seqs, alone=self.tp.size == 1, device=self.device)
        return guard, Ready(time.monotonic() - begin, len(graphs), sum(graphs), worker.graphs.attention)

    def serve(self, num_blocks: int) -> None:
        """Run the steps that arrive until told goodbye. Rank 0 answers each with its output."""
        rank, start = self.tp.rank, self.start
        start.reporter.begin(GRAPHS)
        worker, ready = self._worker(num_blocks)
        profiler = RankProfiler(rank, self.device)
        decode = msgspec.msgpack.Decoder(RankMessage).decode
        hub = Peer(start.hub, b"rank %d" % rank)
        hub.send(msgspec.msgpack.encode(ready))  # the hub can only reach a peer that it has heard of
        start.reporter.close()
        freeze_startup()
        output_sender = OutputSender(start.hub) if rank == 0 else None
        while not isinstance(message := decode(_next_payload(hub, output_sender)), Goodbye):
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
        start.heartbeat.close()


def _next_payload(hub: Peer, output_sender: OutputSender | None) -> bytes:
    """The next message; meanwhile a failure of the sender is noticed, too."""
    while (payload := hub.receive(SENDER_CHECK_S)) is None:
        if output_sender is not None:
            output_sender.check()
    return payload
