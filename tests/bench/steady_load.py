"""What the scheduler makes of a steady load, in modelled time: first tokens and the time between tokens.

The engine's scheduler makes every step; the GPU is a formula: a step of few tokens takes 4.5 ms and 12 us a token, one
with chunks of prompts 5.2 ms and 23.5 us a token, in tiles of 128, which is what an 8B model showed on an H200 on
2026-11-30. Steps are scheduled one ahead, `LEAD_S` before they are needed. Requests come by a Poisson process, with
prompts of 1,024 tokens, and want 128. Prints one JSON object per rate and limit: milliseconds, means of several loads.

Usage: python tests/bench/steady_load.py [--rates 8,16,24] [--mixed-step-tokens 8192,2048] [--seeds 4]
"""

import argparse
import heapq
import json
import statistics
from array import array
from collections import defaultdict
from itertools import pairwise
from math import ceil
from random import Random

from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.core.step_forecast import LEAD_S, SURE
from eagleray.workers.protocol.messages import Sampling, StepOutput

NUM_IN, NUM_OUT, SECONDS = 1024, 128, 20.0
LAUNCH_S, REPORT_S = 0.7e-3, 0.4e-3  # from the core to the GPU, and back
ARRIVAL, REPORT, DUE = range(3)


def step_seconds(num_tokens: int) -> float:
    """How long the GPU takes."""
    if num_tokens <= 64:
        return 4.5e-3 + 12e-6 * num_tokens
    return 5.2e-3 + 23.5e-6 * 128 * ceil(num_tokens / 128)


class Load:
    """Requests of one load, run to their end."""

    def __init__(self, rate: float, limit: int, seed: int) -> None:
        self._scheduler = Scheduler(
            num_blocks=60_000, block_size=128, max_num_seqs=512, max_num_batched_tokens=8192, mixed_step_tokens=limit
        )
        rng = Random(seed)
        arrival = 0.0
        self._arrivals = [arrival := arrival + rng.expovariate(rate) for _ in range(int(rate * SECONDS))]
        self._events = [(at, ARRIVAL, request) for request, at in enumerate(self._arrivals)]
        self._in_flight: list[tuple[int, float, float]] = []  # number, seconds on the GPU, end
        self.num_steps = 0
        self.tokens: dict[int, list[float]] = defaultdict(list)  # when they came

    def run(self) -> "Load":
        while self._events:
            now, kind, request = heapq.heappop(self._events)
            if kind == ARRIVAL:
                prompt = array("i", [(request * 7919 + k) % 49_999 for k in range(NUM_IN)])
                self._scheduler.add(b"load", EngineRequest(request, prompt.tobytes(), Sampling(), NUM_OUT))
            elif kind == REPORT:
                self._commit(now)
            self._schedule(now)
        return self

    def _commit(self, now: float) -> None:
        number, seconds, _ = self._in_flight.pop(0)
        num_drawn = sum(samples for *_, samples in self._scheduler._in_flight[0].chunks)
        output = StepOutput(number, array("i", [1] * num_drawn).tobytes(), gpu_seconds=seconds)
        for _, tokens in self._scheduler.update(output):
            self.tokens[tokens.id] += [now] * len(tokens.token_ids)

    def _schedule(self, now: float) -> None:
        while len(self._in_flight) < 2:
            idle_from = 0.0
            if self._in_flight:
                _, seconds, idle_from = self._in_flight[-1]
                due = idle_from - (1 - SURE) * seconds - LEAD_S
                if now < due:
                    heapq.heappush(self._events, (due, DUE, 0))
                    return
            step = self._scheduler.schedule()
            if step is None:
                return
            seconds = step_seconds(self._scheduler._in_flight[-1].num_tokens)
            end = max(idle_from, now + LAUNCH_S) + seconds
            self._in_flight.append((step.step, seconds, end))
            heapq.heappush(self._events, (end + REPORT_S, REPORT, 0))
            self.num_steps += 1

    def figures(self) -> dict[str, float]:
        """In milliseconds."""
        first = [self.tokens[request][0] - at for request, at in enumerate(self._arrivals)]
        gaps = [[b - a for a, b in pairwise(times)] for times in self.tokens.values()]
        each = [statistics.mean(of_request) for of_request in gaps]
        between = [gap for of_request in gaps for gap in of_request]
        found = {
            "ttft_p50": _quantile(first, 0.5),
            "ttft_p99": _quantile(first, 0.99),
            "tpot_p50": _quantile(each, 0.5),
            "tpot_p99": _quantile(each, 0.99),
            "itl_p99": _quantile(between, 0.99),
        }
        return {name: 1e3 * value for name, value in found.items()} | {"steps": self.num_steps}


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="8,24")
    parser.add_argument("--mixed-step-tokens", default="8192,2048")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    for rate in map(float, arguments.rates.split(",")):
        for limit in map(int, arguments.mixed_step_tokens.split(",")):
            loads = [Load(rate, limit, seed).run().figures() for seed in range(arguments.seeds)]
            means = {name: round(statistics.mean(load[name] for load in loads), 1) for name in loads[0]}
            print(json.dumps({"rate": rate, "mixed_step_tokens": limit} | means), flush=True)


if __name__ == "__main__":
    main()
