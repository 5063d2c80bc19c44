"""Reads a Chrome trace of torch's profiler: which kernels ran in one step, for how long, and when none did."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.workers.protocol.messages import TRACE_NUM_STEPS

ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})  # categories; a CUDA graph's kernels come one by one
ON_HOST = frozenset({"cpu_op"})
REST, IDLE = "rest", "idle"

# The first group with a pattern that occurs in a kernel's or an op's name, whatever its case. FlashAttention is made of
# CUTLASS, and CUB sorts pairs, so the order matters.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        "attend_kernel",
        "combine_kernel",
        "plan_kernel",
        "flash_fwd",
        "flashattn",
        "flash::",
        "eagleray::attention",
    ),
    "collectives": (
        "one_shot_all_reduce",
        "two_shot",
        "nccl",
        "all_reduce",
        "all_reduce_rms_norm",
        "_highest_kernel",
        "all_gather",
        "gather_tokens",
        "c10d::",
        "gloo",
    ),
    "sampling": (
        "sample",
        "_draw_kernel",
        "_advance_kernel",
        "pairs",
        "topk",
        "gumbel",
        "argmax",
        "aten::sort",
        "radixsort",
    ),
    "weights": (
        *("nvjet_", "gemm", "gemv", "cutlass", "splitkreduce", "linear"),
        *("aten::mm", "aten::addmm", "aten::matmul", "aten::bmm"),
    ),
}
DOES = re.compile(r"FlashAttn\w*|\w*(?:[Ff]unctor|Ops|_kernel_cuda|_kernel_impl)\w*")  # names within others' names
ORDER = ("weights", "attention", "collectives", "sampling", REST, IDLE)


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel, or one op less the ops that it calls. Times in microseconds."""

    name: str
    group: str
    start: float
    end: float
    own: float  # without what it calls


@dataclass(frozen=True, slots=True)
class Share:
    """Time and number of calls in one step."""

    name: str
    calls: float
    us: float
    percent: float  # of the step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """The mean of a trace's steps. Where threads of the CPU overlap, groups add up to more than the step.

    Kernels are launched while the one before still runs, and wait for it: overlaps count for the one that began first.
    """

    num_steps: int
    on_device: bool  # kernels; otherwise ops of the CPU
    step_us: float  # from the first kernel's start to the last one's end
    groups: list[Share]  # in `ORDER`; idle is when nothing runs
    kernels: list[Share]  # by name, the longest first


def read_trace(file: Path) -> dict[str, Any]:
    """Read a trace, compressed if its name ends in gz. Raises `ValueError` for a file that is not a trace."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        trace = json.loads(data)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the trace {file} cannot be read: {error}") from error
    if not isinstance(trace, dict) or "traceEvents" not in trace:
        raise ValueError(f"{file} is not a Chrome trace: it has no traceEvents")
    return trace


def step_profile(trace: dict[str, Any], num_steps: int | None = None) -> StepProfile:
    """One step out of a trace of `num_steps` whole steps, by default as many as the trace says.

    Raises `ValueError` if it holds no step or nothing that ran.
    """
    count = trace.get(TRACE_NUM_STEPS, 0) if num_steps is None else num_steps
    if count < 1:
        raise ValueError("the trace holds no step; profile while requests run")
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = list(_kernels([event for event in events if event.get("cat") in ON_DEVICE]))
    on_device = bool(spans)
    if not on_device:
        spans = list(_own_times([event for event in events if event.get("cat") in ON_HOST]))
    if not spans:
        raise ValueError("the trace holds neither kernels nor ops")
    wall = max(span.end for span in spans) - min(span.start for span in spans)
    idle = wall - union(spans)
    grouped = _sums(((span.group, span) for span in spans), count, wall)
    grouped[IDLE] = Share(IDLE, 0.0, idle / count, _percent(idle, wall))
    kernels = _sums(((short_name(span.name), span) for span in spans), count, wall)
    return StepProfile(
        num_steps=count,
        on_device=on_device,
        step_us=wall / count,
        groups=[grouped.get(group, Share(group, 0.0, 0.0, 0.0)) for group in ORDER],
        kernels=sorted(kernels.values(), key=lambda share: -share.us),
    )


def group_of(name: str) -> str:
    """The group of a kernel or an op."""
    lowered = name.lower()
    return next((group for group, patterns in GROUPS.items() if any(p in lowered for p in patterns)), REST)


def short_name(name: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters, but with what an elementwise one does."""
    if re.fullmatch(r"\w+::\w+", name):
        return name  # an op
    base = re.split(r"[<(]", name.removeprefix("void ").replace("(anonymous namespace)::", ""), maxsplit=1)[0].strip()
    base = base.split("::")[-1]
    does = [word for word in DOES.findall(name) if word != base and not word.startswith("gpu_kernel")]
    return f"{base}[{does[-1]}]" if does else base


def union(spans: Iterable[Span]) -> float:
    """How long at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def _kernels(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """Each with the time for which it was the first of those that ran."""
    reached = float("-inf")
    for event in sorted(events, key=lambda event: float(event["ts"])):
        start = float(event["ts"])
        end = start + float(event["dur"])
        yield Span(event["name"], group_of(event["name"]), start, end, max(0.0, end - max(start, reached)))
        reached = max(reached, end)


def _own_times(events: Sequence[dict[str, Any]]) -> Iterator[Span]:
    """Ops, which call each other. What an op of a group calls belongs to that group."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for of_thread in threads.values():
        yield from _unnest(sorted(of_thread, key=lambda event: (float(event["ts"]), -float(event["dur"]))))


def _unnest(events: Sequence[dict[str, Any]]) -> Iterator[Span]:
    """Ops of one thread in the order of their starts, a caller before what it calls."""
    open_calls: list[tuple[dict[str, Any], str, list[float]]] = []  # with the group, and the times of what they call

    def close() -> Span:
        event, group, called = open_calls.pop()
        start, duration = float(event["ts"]), float(event["dur"])
        return Span(event["name"], group, start, start + duration, max(0.0, duration - sum(called)))

    for event in events:
        while open_calls and float(open_calls[-1][0]["ts"]) + float(open_calls[-1][0]["dur"]) <= float(event["ts"]):
            yield close()
        group = group_of(event["name"])
        if open_calls:
            caller = open_calls[-1]
            caller[2].append(float(event["dur"]))
            group = group if caller[1] == REST else caller[1]
        open_calls.append((event, group, []))
    while open_calls:
        yield close()


def _sums(named: Iterable[tuple[str, Span]], num_steps: int, wall: float) -> dict[str, Share]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, span in named:
        times[name].append(span.own)
    return {
        name: Share(name, len(owns) / num_steps, sum(owns) / num_steps, _percent(sum(owns), wall))
        for name, owns in times.items()
    }


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else 0.0
