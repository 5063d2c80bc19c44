"""One rank of a tensor-parallel group, as a process that runs the tasks below on request. Started by path.

Arguments: the address of the tests' listener, and this process's number. A request is `(task, size, store, arguments)`;
processes below `size` join a group over the file `store`, and answer with the task's result or with the traceback.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Client
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

import eagleray.workers.attention.op  # noqa: F401  implements the op
from eagleray.models.attention import attention_layers
from eagleray.models.decoder import CausalLM
from eagleray.models.layers import RMSNorm, Rotary
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup, destroy_tp_group, init_tp_group
from eagleray.workers.attention.context import AttentionMetadata, ForwardContext, PagedKVLayer, forward_context
from eagleray.workers.attention.reference import ReferenceBackend
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.rank_phases import LoadedRank, PreparedRank
from eagleray.workers.rank_start import Place, RankStart
from support.attention_requests import paged
from support.sink_llama import run_worker  # and its family
from support.worker_config import worker_config

Tasks = dict[str, Callable[..., Any]]

CPU = torch.device("cpu")
BLOCK_SIZE = 4


class Paged:
    """A model with a paged cache, run by hand: requests own shuffled blocks, and may share those of a prefix."""

    def __init__(self, model: CausalLM, num_blocks: int = 256) -> None:
        self.model = model
        self.specs = [layer.spec for layer in attention_layers(model)]
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        # A read of a slot that was never written spoils the result.
        self.caches = [
            torch.full((2, num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_size), 1e4) for spec in self.specs
        ]
        self.tables: list[list[int]] = []
        self.computed: list[int] = []
        self.forward: Callable[[Tensor, Tensor], Tensor] = model

    def add(self, prefix_of: int | None = None, prefix: int = 0) -> int:
        """A new request; the first `prefix` tokens of it are those of request `prefix_of`."""
        shared = [] if prefix_of is None else self.tables[prefix_of][: prefix // BLOCK_SIZE]
        self.tables.append(list(shared))
        self.computed.append(len(shared) * BLOCK_SIZE)
        return len(self.tables) - 1

    def context(self, batch: dict[int, int]) -> tuple[Tensor, ForwardContext]:
        """Positions and context of a batch that runs `batch[request]` tokens of each request."""
        positions: list[int] = []
        slots: list[int] = []
        seq_lens, starts = [], [0]
        for request, tokens in batch.items():
            first = self.computed[request]
            self.computed[request] = end = first + tokens
            table = self.tables[request]
            while len(table) * BLOCK_SIZE < end:
                table.append(self.free.pop())
            positions += range(first, end)
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, end)]
            seq_lens.append(end)
            starts.append(starts[-1] + tokens)
        width = max(len(self.tables[request]) for request in batch)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor(
                [self.tables[r] + [0] * (width - len(self.tables[r])) for r in batch], dtype=torch.int32
            ),
            max_query_len=max(batch.values()),
            max_seq_len=max(seq_lens),
        )
        layers = [
            PagedKVLayer(metadata, paged(cache), layer.spec, ReferenceBackend(), layer.sinks)
            for cache, layer in zip(self.caches, self.model.attentions, strict=True)
        ]
        return torch.tensor(positions), ForwardContext(layers)

    def run(self, batch: dict[int, list[int]]) -> dict[int, Tensor]:
        """Hidden states of the next tokens of each request."""
        positions, context = self.context({request: len(tokens) for request, tokens in batch.items()})
        ids = torch.tensor([token for tokens in batch.values() for token in tokens])
        with forward_context(context):
            hidden = self.forward(ids, positions)
        return dict(zip(batch, hidden.split([len(tokens) for tokens in batch.values()]), strict=True))


def collectives(tp: TPGroup, numel: list[int]) -> list[dict[str, Tensor]]:
    """Sum, maximum, gathering and exchange of a tensor of each size, drawn from this rank's own seed."""
    results = []
    for n in numel:
        x = torch.randn(n, generator=torch.Generator().manual_seed(tp.rank))
        before = x.clone()
        results.append({"sum": tp.all_reduce(x), "max": tp.all_reduce(x, "max"), "gathered": tp.all_gather(x)})
        results[-1]["exchanged"] = tp.all_to_all(torch.stack([x + rank for rank in range(tp.size)]))
        assert torch.equal(x, before), "a collective changed its input"
        assert torch.equal(tp.add_up(x), results[-1]["sum"])
        assert torch.equal(x, results[-1]["sum"])
    return results


def two_generations(tp: TPGroup, folder: str) -> tuple[str, Tensor]:
    """A rank whose engine starts twice: what its first group says once it is in the second, and a sum in the second."""
    config = worker_config(
        model=folder, max_model_len=64, block_size=4, max_num_seqs=2, max_num_batched_tokens=32, kv_cache_bytes=10**6
    )
    listener, hub = Hub(), Hub()
    places = [Place(tp.rank, tp.size, generation, "here", "127.0.0.1") for generation in range(2)]
    starts = [RankStart(place, config, listener.endpoint, hub.endpoint) for place in places]
    ranks = [PreparedRank(start, one_node=True, niceness=0) for start in starts]
    ports = tp.all_gather(torch.tensor([rank.host.store_port or 0 for rank in ranks]))[0].tolist()
    destroy_tp_group(tp)
    first = LoadedRank(ranks[0], ranks[0].host.store_ip, ports[0])
    destroy_tp_group(first.tp)
    second = LoadedRank(ranks[1], ranks[1].host.store_ip, ports[1])
    x = torch.tensor([tp.rank + 1.0])
    try:
        said = f"they meet: {first.tp.all_reduce(x)}"
    except RuntimeError as error:
        said = str(error)
    total = second.tp.all_reduce(x)
    destroy_tp_group(second.tp)
    for start in starts:
        start.heartbeat.close()
        start.reporter.close()
    listener.close()
    hub.close()
    return said, total


def compiled_collectives(tp: TPGroup) -> tuple[Tensor, Tensor]:
    """A function with all collectives, compiled as one graph, and its eager result."""

    def f(x: Tensor) -> Tensor:
        gathered = tp.all_gather(tp.all_reduce(x * 2) + tp.all_reduce(x, "max") + tp.add_up(x + 1))
        return tp.all_to_all(gathered * x).sum(0)

    x = torch.arange(6.0) + tp.rank
    return torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x)


def logits(
    tp: TPGroup, path: str, prompts: list[list[int]], chunk: int | None = None, prefix: int = 0, alter: str = ""
) -> list[Tensor]:
    """This rank's shard of the logits at every position of each prompt, `[tokens, len(vocab_shard)]`.

    `chunk` is how many tokens of a prompt run at once. The prompts after the first begin with `prefix` tokens of the
    first, which are computed once, in the same batch where they are first read; their logits are left out.
    """
    model = load_model(path, tp=tp, dtype=torch.float32, device=CPU)
    if alter:
        ALTERATIONS[alter](model)
    paged = Paged(model)
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    requests = [paged.add()]
    if prefix:
        paged.tables[0] = [paged.free.pop() for _ in range(prefix // BLOCK_SIZE)]
    requests += [paged.add(0, prefix) for _ in prompts[1:]]
    while True:
        batch = {}
        for request, prompt in zip(requests, prompts, strict=True):
            done = paged.computed[request]
            if tokens := prompt[done : done + chunk if chunk else None]:
                batch[request] = tokens
        if not batch:
            return [torch.cat(piece) for piece in pieces]
        for request, hidden in paged.run(batch).items():
            pieces[request].append(model.logits(hidden))


def greedy(tp: TPGroup, path: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Prompts continued in one batch."""
    model = load_model(path, tp=tp, dtype=torch.float32, device=CPU)
    paged = Paged(model)
    tokens = {paged.add(): list(prompt) for prompt in prompts}
    continued: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        hidden = torch.stack([h[-1] for h in paged.run(tokens).values()])
        values, ids = model.logits(hidden).max(dim=-1)
        winner = tp.all_gather(values).argmax(dim=0, keepdim=True)
        chosen = tp.all_gather(ids + model.vocab_shard.start).gather(0, winner)[0].tolist()
        for request, token in enumerate(chosen):
            continued[request].append(token)
        tokens = {request: [token] for request, token in enumerate(chosen)}
    return continued


def compile_counts(tp: TPGroup, path: str, batches: list[list[int]]) -> tuple[int, float]:
    """Run batches of so many tokens per request through the compiled model and the plain one, each on its own cache.

    Returns how many graphs were compiled, and the largest difference between both models' hidden states.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = load_model(path, tp=tp, dtype=torch.float32, device=CPU, load_format="dummy")
    plain, compiled = Paged(model), Paged(model)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        attentions = [node for node in graph.graph.nodes if node.target is torch.ops.eagleray.attention]
        assert len(attentions) == model.config.num_layers, "attention must be one op per layer"
        return graph.forward

    compiled.forward = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    difference = 0.0
    for lengths in batches:
        batch = {}
        for length in lengths:
            batch[plain.add()] = torch.randint(0, model.config.vocab_size, (length,)).tolist()
            compiled.add()
        expected, got = plain.run(batch), compiled.run(batch)
        difference = max(difference, *(float((expected[r] - got[r]).abs().max()) for r in batch))
    return graphs, difference


def _spec(**changes: Any) -> Callable[[CausalLM], None]:
    def alter(model: CausalLM) -> None:
        for layer in attention_layers(model):
            layer.spec = replace(layer.spec, **changes)

    return alter


def _window(change: int) -> Callable[[CausalLM], None]:
    def alter(model: CausalLM) -> None:
        for layer in attention_layers(model):
            if layer.spec.sliding_window is not None:
                layer.spec = replace(layer.spec, sliding_window=layer.spec.sliding_window + change)

    return alter


def _without_norm(name: str) -> Callable[[CausalLM], None]:
    def alter(model: CausalLM) -> None:
        for path, norm in model.named_modules():
            if path.endswith(name):
                assert isinstance(norm, RMSNorm)
                norm.normalize = lambda x: x  # type: ignore[method-assign]

    return alter


def _without_bias(name: str) -> Callable[[CausalLM], None]:
    def alter(model: CausalLM) -> None:
        for path, bias in model.named_parameters():
            if path.endswith(f"{name}.bias"):
                bias.zero_()

    return alter


def _sinks(change: Callable[[Tensor], Tensor]) -> Callable[[CausalLM], None]:
    def alter(model: CausalLM) -> None:
        for layer in attention_layers(model):
            assert layer.sinks is not None
            layer.sinks.copy_(change(layer.sinks))

    return alter


def _windows_swapped(model: CausalLM) -> None:
    layers = attention_layers(model)
    windows = [layer.spec.sliding_window for layer in layers]
    for layer, window in zip(layers, windows[1:] + windows[:1], strict=True):
        layer.spec = replace(layer.spec, sliding_window=window)


def _without_final_cap(model: CausalLM) -> None:
    model.config = replace(model.config, final_soft_cap=None)


def _without_embedding_scale(model: CausalLM) -> None:
    model.model.embedding_scale = None


def _without_rope_scaling(model: CausalLM) -> None:
    config = model.config
    model.model.rotary = Rotary(config.head_size, config.max_position_embeddings, replace(config.rope, kind="default"))


def _silu(model: CausalLM) -> None:
    for layer in model.modules():
        if hasattr(layer, "activation"):
            layer.activation = "silu"  # type: ignore[assignment]


ALTERATIONS: dict[str, Callable[[CausalLM], None]] = {
    "window one shorter": _window(-1),
    "window one longer": _window(1),
    "windows in the other layers": _windows_swapped,
    "no window": _spec(sliding_window=None),
    "no attention soft cap": _spec(logits_soft_cap=None),
    "no sinks": _sinks(lambda sinks: torch.full_like(sinks, -torch.inf)),
    "sinks of the next head": _sinks(lambda sinks: sinks.roll(-1)),
    "no final soft cap": _without_final_cap,
    "scale of the head size": lambda model: _spec(scale=model.config.head_size**-0.5)(model),
    "no q norm": _without_norm("q_norm"),
    "no k norm": _without_norm("k_norm"),
    "no norm after attention": _without_norm("post_attention_layernorm"),
    "no norm after the MLP": _without_norm("post_feedforward_layernorm"),
    "no norm before the MLP": _without_norm("pre_feedforward_layernorm"),
    "no last norm": _without_norm("model.norm"),
    "no qkv bias": _without_bias("qkv_proj"),
    "no output bias": _without_bias("o_proj"),
    "no gate and up bias": _without_bias("gate_up_proj"),
    "no down bias": _without_bias("down_proj"),
    "no embedding scale": _without_embedding_scale,
    "no rope scaling": _without_rope_scaling,
    "silu for gelu": _silu,
}
TASKS: Tasks = {
    task.__name__: task
    for task in (collectives, compiled_collectives, two_generations, logits, greedy, compile_counts, run_worker)
}


@contextmanager
def joined(rank: int, size: int, store: str, device: torch.device) -> Iterator[TPGroup]:
    tp = init_tp_group(rank, size, FileStore(store, size), device, timeout_s=60.0)
    try:
        yield tp
    finally:
        destroy_tp_group(tp)


def answer(
    rank: int, request: tuple[str, int, str, dict[str, Any]], tasks: Tasks, device: torch.device
) -> tuple[bool, Any]:
    task, size, store, arguments = request
    try:
        with joined(rank, size, store, device) as tp, torch.inference_mode():
            return True, tasks[task](tp, **arguments)
    except Exception:  # every failure is reported to the test that caused it
        return False, traceback.format_exc()


def serve(address: str, rank: int, tasks: Tasks, device: torch.device) -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    with Client(address, authkey=os.environ["RANKS_KEY"].encode()) as tests:
        tests.send(rank)
        while (request := tests.recv()) is not None:
            # Pickled by hand: `send` would pass tensors as handles to shared memory.
            tests.send_bytes(pickle.dumps(answer(rank, request, tasks, device)))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), TASKS, CPU)
