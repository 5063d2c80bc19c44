"""`eagleray bench latency`: measures batches of one size, from the first request sent to the last token back."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.runtime.resolve import check_model
from eagleray.deploy.bench.arguments import bench_params
from eagleray.deploy.bench.engine_load import Load, Planned
from eagleray.deploy.bench.metrics import Spread, decode_time, spread
from eagleray.deploy.bench.report import check_writable, record, write
from eagleray.deploy.bench.workload import random_prompts
from eagleray.deploy.cli.arguments import engine_config
from eagleray.deploy.cli.engine import measured_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCase:
    """One batch size. Times in seconds."""

    batch_size: int
    latency_s: Spread  # of the whole batch
    first_token_latency_s: Spread  # of the same batch when one token is asked for
    time_per_output_token_s: float | None  # from the two means; None if only one token is generated
    output_tokens_per_s: float


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Raises `ValueError`, before the engine starts, for what cannot be run."""
    config = engine_config(arguments)
    check_batches(config, arguments.batch_size, arguments.input_len + arguments.output_len)
    bench_params(arguments, arguments.output_len)  # so that what it refuses is refused now
    check_writable(arguments.output_json, "--output-json")
    vocab_size = check_model(config).vocab_size
    err = Console(stderr=True)
    with measured_engine(config, err) as (engine, front_end):
        load = Load(engine, front_end)
        cases = [_measure(load, arguments, size, vocab_size, err) for size in arguments.batch_size]
        content = record("bench latency", arguments, config, engine.info, [asdict(case) for case in cases])
    Console(file=sys.stdout).print(table(cases, arguments.input_len, arguments.output_len))
    write(arguments.output_json, content)
    return 0


def check_batches(config: EngineConfig, batch_sizes: list[int], num_tokens: int) -> None:
    """Raise `ValueError` for batches that the engine would cut, and for requests longer than the model takes."""
    if max(batch_sizes) > config.max_num_seqs:
        raise ValueError(
            f"--batch-size is {max(batch_sizes)}, but --max-num-seqs lets {config.max_num_seqs} requests run at once; "
            "raise the second or lower the first"
        )
    limit = config.max_model_len or check_model(config).max_position_embeddings
    if num_tokens > limit:
        raise ValueError(f"input and output are {num_tokens} tokens together, but the model holds {limit}; lower one")


def _measure(load: Load, arguments: argparse.Namespace, batch_size: int, vocab_size: int, err: Console) -> LatencyCase:
    rng = np.random.default_rng(arguments.workload_seed)
    prompts = random_prompts([arguments.input_len] * batch_size, vocab_size, rng)
    whole, first = (
        [Planned(prompt, bench_params(arguments, max_tokens)) for prompt in prompts]
        for max_tokens in (arguments.output_len, 1)
    )
    total = arguments.num_iters_warmup + 2 * arguments.num_iters
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"batch size {batch_size}", total=total)

        def times(batch: list[Planned], count: int) -> list[float]:
            return [_latency(load, batch, lambda: progress.advance(task)) for _ in range(count)]

        times(whole, arguments.num_iters_warmup)
        return latency_case(
            batch_size, arguments.output_len, times(whole, arguments.num_iters), times(first, arguments.num_iters)
        )


def _latency(load: Load, batch: list[Planned], on_end: Callable[[], None]) -> float:
    requests = load.measure(batch)
    if errors := [request.error for request in requests if request.error]:
        raise RuntimeError(f"a request failed: {errors[0]}")
    on_end()
    return max(request.tokens[-1] for request in requests) - requests[0].due


def latency_case(batch_size: int, output_len: int, whole: list[float], first: list[float]) -> LatencyCase:
    """Figures out of the latencies with all tokens and with one, in seconds."""
    latency, first_token = spread(whole), spread(first)
    assert latency is not None
    assert first_token is not None
    return LatencyCase(
        batch_size=batch_size,
        latency_s=latency,
        first_token_latency_s=first_token,
        time_per_output_token_s=decode_time(latency.mean, first_token.mean, output_len),
        output_tokens_per_s=batch_size * output_len / latency.mean,
    )


def table(cases: list[LatencyCase], input_len: int, output_len: int) -> Table:
    """A line for each batch size, in milliseconds."""
    shown = Table(title=f"{input_len} tokens in, {output_len} out; times in ms", title_justify="left")
    for name in ("batch", "mean", "p50", "p90", "p99", "1 token", "ms/token", "tokens/s"):
        shown.add_column(name, justify="right")
    for case in cases:
        spread_of_case: dict[str, Any] = asdict(case.latency_s)
        per_token = case.time_per_output_token_s
        shown.add_row(
            str(case.batch_size),
            *(f"{spread_of_case[name] * 1000:.1f}" for name in ("mean", "p50", "p90", "p99")),
            f"{case.first_token_latency_s.mean * 1000:.1f}",
            "-" if per_token is None else f"{per_token * 1000:.3f}",
            f"{case.output_tokens_per_s:.1f}",
        )
    return shown
