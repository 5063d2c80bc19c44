"""The server's metrics, for Ray and in Prometheus' text format."""

from collections.abc import Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge
from prometheus_client import Histogram as PrometheusHistogram
from ray.util import metrics as ray_metrics

from eagleray.cluster.core.messages import EngineStats
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.deploy.serve.startup import START_METRIC

TIME_BUCKETS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600]
TOKEN_BUCKETS_S = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5]
PART_BUCKETS_S = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
PARTS = {  # of `RequestParts`
    "queue": "Time that a request waited until the ranks were free for its first step, and again after a preemption.",
    "schedule": "Part of a request's time: the engine core's work on steps while no rank computed.",
    "broadcast": "Part of a request's time: steps and their outputs on the way between engine core and ranks.",
    "gpu": "Part of a request's time: its steps on the ranks, from launch to output.",
    "detokenize": "Part of a request's time: turning its last tokens into text.",
    "channel": "Part of a request's time: its messages between serving process and engine core, until they were read.",
}
HTTP = "Time of a request in the serving process, before it went to the engine and after its last token came."
UNLABELLED: Mapping[str, str] = MappingProxyType({})


class Counter:
    """Only grows."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry, labels: tuple[str, ...] = ()) -> None:
        self._ray = ray_metrics.Counter(name, text, labels)
        self._prometheus = PrometheusCounter(name, text, labels, registry=registry)

    def add(self, amount: float, labels: Mapping[str, str] = UNLABELLED) -> None:
        """Count `amount` more; Ray refuses 0."""
        (self._prometheus.labels(**labels) if labels else self._prometheus).inc(amount)
        if amount > 0:
            self._ray.inc(amount, dict(labels))


class Gauge:
    """A current value."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry, labels: tuple[str, ...] = ()) -> None:
        self._ray = ray_metrics.Gauge(name, text, labels)
        self._prometheus = PrometheusGauge(name, text, labels, registry=registry)

    def set(self, value: float, labels: Mapping[str, str] = UNLABELLED) -> None:
        """Replace the value."""
        self._ray.set(value, dict(labels))
        (self._prometheus.labels(**labels) if labels else self._prometheus).set(value)


class Histogram:
    """How often which values were seen."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry, buckets: list[float]) -> None:
        self._ray = ray_metrics.Histogram(name, text, buckets)
        self._prometheus = PrometheusHistogram(name, text, buckets=buckets, registry=registry)

    def observe(self, value: float) -> None:
        """Add one value; Ray refuses 0."""
        self._ray.observe(max(value, 1e-9))
        self._prometheus.observe(value)


class Metrics:
    """The figures of one replica. Those of all of them are what Ray collects, each with its replica as a label."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time stamp beside every counter
        self._registry = every = CollectorRegistry()
        self._start_s = Gauge(START_METRIC, "Time that the replica's start took, by part.", every, ("part",))
        self._running = Gauge("eagleray_requests_running", "Number of sequences that the last step ran.", every)
        self._waiting = Gauge(
            "eagleray_requests_waiting", "Number of sequences that wait for a row or for memory.", every
        )
        self._used_blocks = Gauge(
            "eagleray_kv_blocks_used", "Number of blocks of the KV cache that requests hold.", every
        )
        self._blocks = Gauge("eagleray_kv_blocks", "Number of blocks of the KV cache.", every)
        self._prefix_hits = Counter(
            "eagleray_prefix_hit_tokens_total", "Prompt tokens that were found in the KV cache.", every
        )
        self._preemptions = Counter(
            "eagleray_preemptions_total", "Times that a request gave up its memory to be computed again.", every
        )
        self._draft_tokens = Counter("eagleray_draft_tokens_total", "Tokens of drafts that ranks verified.", every)
        self._accepted_tokens = Counter(
            "eagleray_accepted_draft_tokens_total", "Tokens of drafts that turned out to be drawn.", every
        )
        self._prompt_tokens = Counter("eagleray_prompt_tokens_total", "Tokens of the prompts of ended requests.", every)
        self._generation_tokens = Counter(
            "eagleray_generation_tokens_total", "Tokens that were generated for ended requests.", every
        )
        self._requests = Counter("eagleray_requests_total", "Sequences that ended, and why.", every, ("finish_reason",))
        self._first_token_s = Histogram(
            "eagleray_time_to_first_token_seconds",
            "Time from a prompt's arrival to its first token.",
            every,
            TIME_BUCKETS_S,
        )
        self._token_s = Histogram(
            "eagleray_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            every,
            TOKEN_BUCKETS_S,
        )
        self._request_s = Histogram(
            "eagleray_request_seconds",
            "Time from a prompt's arrival to its last token, unless it was cut off.",
            every,
            TIME_BUCKETS_S,
        )
        self._part_s = {
            part: Histogram(f"eagleray_{part}_seconds", text, every, PART_BUCKETS_S) for part, text in PARTS.items()
        }
        self._http_s = Histogram("eagleray_http_seconds", HTTP, every, PART_BUCKETS_S)
        self._seen = EngineStats()

    def start(self, seconds: Mapping[str, float]) -> None:
        """Say what the replica's start took."""
        for part, value in seconds.items():
            self._start_s.set(value, {"part": part})

    def end(self, generation: RequestState) -> None:
        """Count a request that has ended. One whose engine is gone has no end of its own, and counts as an error."""
        self._prompt_tokens.add(len(generation.prompt_token_ids))
        for completion in generation.completions:
            self._generation_tokens.add(len(completion.token_ids))
            self._requests.add(1, {"finish_reason": completion.finish_reason or "error"})
        first, last = generation.first_token_time, generation.finished_time
        if first is not None:
            self._first_token_s.observe(first - generation.arrival_time)
        if last is not None and generation.parts is not None:  # what was cut off is in none of them
            self._request_s.observe(last - generation.arrival_time)
            for part, histogram in self._part_s.items():
                histogram.observe(getattr(generation.parts, part))
        num_later = max(len(completion.token_ids) for completion in generation.completions) - 1
        if first is not None and last is not None and num_later > 0:
            self._token_s.observe((last - first) / num_later)

    def observe_http(self, seconds: float) -> None:
        """Add what an answered request spent outside the engine."""
        self._http_s.observe(seconds)

    def look(self, stats: EngineStats, *, idle: bool) -> None:
        """Take over the engine's state. It is as old as the last step's news, so `idle` says that nothing runs."""
        self._running.set(0 if idle else stats.num_running)
        self._waiting.set(0 if idle else stats.num_waiting)
        self._used_blocks.set(0 if idle else stats.num_used_blocks)
        self._blocks.set(stats.num_blocks)
        self._prefix_hits.add(stats.num_prefix_hit_tokens - self._seen.num_prefix_hit_tokens)
        self._preemptions.add(stats.num_preemptions - self._seen.num_preemptions)
        self._draft_tokens.add(stats.num_draft_tokens - self._seen.num_draft_tokens)
        self._accepted_tokens.add(stats.num_accepted_tokens - self._seen.num_accepted_tokens)
        self._seen = stats

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
