"""`eagleray profile`: profiles decode steps with torch and shows what rank 0 spends a step on."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from eagleray.deploy.bench.arguments import bench_params
from eagleray.deploy.bench.engine_load import WAKE_S, Load, Planned
from eagleray.deploy.bench.metrics import RequestTimes
from eagleray.deploy.bench.report import check_writable, record, write
from eagleray.deploy.bench.workload import random_prompts
from eagleray.deploy.cli.arguments import engine_config
from eagleray.deploy.cli.engine import measured_engine
from eagleray.deploy.profile.sizes import WARM_UP, ProfileSizes
from eagleray.deploy.profile.trace import Share, StepProfile, read_trace, step_profile

if TYPE_CHECKING:
    from eagleray.cluster.frontend.front_end import FrontEnd
    from eagleray.cluster.runtime.engine_client import EngineClient

NUM_TOP = 15  # kernels to show
NUMBERS_WIDTH = 40  # of their columns, with the lines between


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileCase:
    """One batch size."""

    batch_size: int
    step_us: float  # without the profiler, as the front end sees it
    profiled: StepProfile  # of rank 0
    files: list[str]


def run(arguments: argparse.Namespace) -> int:
    """Profile, print, write. Raises `ValueError` for what cannot be run."""
    config = engine_config(arguments)
    sizes = ProfileSizes(
        batch_sizes=arguments.batch_size, context_len=arguments.context_len, num_steps=arguments.num_steps
    )
    sizes.fitting(config)  # what can be refused now is refused now
    _make(arguments.output_dir)
    summary = arguments.output_dir / "profile.json"
    bench_params(arguments, 1)  # and so is what this refuses
    check_writable(summary, "--output-dir")
    err, out = Console(stderr=True), Console(file=sys.stdout)
    cases = []
    with measured_engine(config, err) as (engine, front_end):
        for batch_size in sizes.fitting(config, engine.info):
            with err.status(f"profiling batch size {batch_size}"):
                case = _profile(engine, front_end, arguments, batch_size)
            out.print(*report(case, arguments.context_len, out.width), sep="\n")
            cases.append(case)
        write(summary, record("profile", arguments, config, engine.info, [asdict(case) for case in cases]))
    err.print(f"traces and figures are in {arguments.output_dir}", style="dim", highlight=False, soft_wrap=True)
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be made: {error.strerror}; name another") from error


def _profile(
    engine: "EngineClient", front_end: "FrontEnd", arguments: argparse.Namespace, batch_size: int
) -> ProfileCase:
    """Fill the contexts, decode for a while, then as many steps under the profiler."""
    from eagleray.cluster.frontend.client import Client  # imported by now, with the engine

    num_steps, llm, load = arguments.num_steps, Client(engine, front_end), Load(engine, front_end)
    vocab_size, max_len = engine.info.vocab_size, engine.info.max_model_len
    prompts = random_prompts(
        [arguments.context_len] * batch_size, vocab_size, np.random.default_rng(arguments.workload_seed)
    )
    params = bench_params(arguments, max_len - arguments.context_len)  # more than will be run
    generations = load.make_requests([Planned(prompt, params) for prompt in prompts])
    requests = load.send(generations, [0.0] * batch_size)
    _decode(load, requests, WARM_UP + num_steps)
    last = min(requests, key=lambda request: len(request.tokens))  # from its first token on, all requests decode
    step_s = (last.tokens[WARM_UP + num_steps - 1] - last.tokens[WARM_UP - 1]) / num_steps
    llm.start_profile(arguments.output_dir / f"batch-{batch_size}")
    _decode(load, requests, min(len(each.completions[0].token_ids) for each in generations) + num_steps)
    files = llm.stop_profile()
    load.abort()
    return ProfileCase(
        batch_size=batch_size,
        step_us=step_s * 1e6,
        profiled=step_profile(read_trace(files[0])),
        files=[str(file) for file in files],
    )


def _decode(load: Load, requests: Sequence[RequestTimes], num_tokens: int) -> None:
    """Until every request has so many tokens."""
    while min(len(request.tokens) for request in requests) < num_tokens:
        if load.receive(WAKE_S):
            errors = {request.error for request in requests if request.error}
            if not errors:
                raise ValueError("a request outgrew the model before its profile ended; lower --context-len")
            raise RuntimeError(f"a request failed before its profile ended: {', '.join(errors)}")


def report(case: ProfileCase, context_len: int, width: int) -> list[Table | str]:
    """What is printed for one batch size, on a terminal of this width."""
    profiled = case.profiled
    title = (
        f"batch size {case.batch_size}, {context_len} tokens of context: {case.step_us:.0f} us a step, "
        f"{profiled.step_us:.0f} us under the profiler, as below ({profiled.num_steps} steps)"
    )
    what = "kernel" if profiled.on_device else "CPU op"
    groups = _table("part of a step", profiled.groups, width, calls=False)
    groups.add_row("whole step", f"{profiled.step_us:.1f}", "100.0")
    return [title, groups, _table(what, profiled.kernels[:NUM_TOP], width, calls=True), ""]


def _table(what: str, shares: Sequence[Share], width: int, calls: bool) -> Table:
    table = Table()
    table.add_column(what, no_wrap=True, overflow="ellipsis", max_width=max(width - NUMBERS_WIDTH, 10))
    for name, width in ([("calls/step", 10)] if calls else []) + [("us/step", 10), ("%", 5)]:
        table.add_column(name, justify="right", min_width=width)
    for share in shares:
        count = [f"{share.calls:.1f}"] if calls else []
        table.add_row(share.name, *count, f"{share.us:.1f}", f"{share.percent:.1f}")
    return table
