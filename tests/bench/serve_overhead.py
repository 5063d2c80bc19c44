"""What Ray Serve and HTTP add to the time to the first token and to the time between tokens, over the bare engine.

Both sides have an engine of their own with the same options. Requests go to one and the other in turn, one at a time,
so that what else the machine does hits both alike; the idle engine sleeps. Prompts and numbers of tokens are the same,
and the server's client keeps its connection. Prints one JSON object with medians in milliseconds.

Ray Serve is set up as `eagleray serve` does, or with `--serve-settings ray` as it comes. Variables `RAY_SERVE_…` that
are set already stay, so `RAY_SERVE_ENABLE_HA_PROXY=0` gives Serve's proxy in Python.

Usage: python tests/bench/serve_overhead.py [--model DIR] [--tp N] …
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from statistics import median
from typing import Any

import httpx
import numpy as np

from eagleray import AsyncLLM
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.runtime.placement import connect
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.bench.environment import hardware, versions
from eagleray.deploy.serve.config import ServeArgs
from eagleray.deploy.serve.environment import free_ports, set_environment
from eagleray.models.loading.model_dir import model_dir


def main() -> None:
    settings = parsed()
    if settings.serve_settings == "eagleray":
        set_environment()
    from ray import serve  # late: it reads the environment

    from eagleray.deploy.serve.app import build

    options: dict[str, Any] = {
        "model": str(model_dir(settings.model)),
        "tensor_parallel_size": settings.tp,
        "threads_per_rank": settings.threads_per_rank,
        "cpus_per_rank": 0.1,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
        "load_format": settings.load_format,
        **({"kv_cache_bytes": 100_000_000} if settings.on_cpu else {}),
    }
    args = ServeArgs.model_validate(options | {"served_model_name": "model"})
    connect(args.engine, num_engines=2)
    port = free_ports(1)[0]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(args))
    llm = AsyncLLM(**options)
    try:
        engine, served = asyncio.run(measure(llm, f"http://127.0.0.1:{port}", settings))
    finally:
        llm.close()
        serve.shutdown()
    added = {name: round(served[name] - engine[name], 3) for name in engine}
    figures = {"engine_ms": engine, "ray_serve_ms": served, "added_ms": added}
    print(json.dumps(figures | {"settings": vars(settings), "versions": versions(), "hardware": hardware()}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--on-cpu", action=argparse.BooleanOptionalAction, default=not os.path.exists("/dev/nvidia0"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads-per-rank", type=int)
    parser.add_argument("--load-format", default="safetensors")
    parser.add_argument("--serve-settings", choices=("eagleray", "ray"), default="eagleray")
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--num-requests", type=int, default=50)
    parser.add_argument("--num-warmup", type=int, default=5)
    return parser.parse_args()


async def measure(
    llm: AsyncClient, url: str, settings: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of the engine and of the server, in milliseconds."""
    rng = np.random.default_rng(0)
    num_requests = settings.num_warmup + settings.num_requests
    prompts: list[list[int]] = rng.integers(10, 200, (num_requests, settings.input_len)).tolist()
    engine, served = [], []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for prompt in prompts:
            engine.append(await times(from_engine(llm, prompt, settings.output_len)))
            served.append(await times(from_server(client, prompt, settings.output_len)))
    return medians(engine[settings.num_warmup :]), medians(served[settings.num_warmup :])


async def times(events: AsyncIterator[Any]) -> tuple[float, float]:
    """Until the first event, and between two events in the mean, in seconds."""
    begin = time.perf_counter()
    came = [time.perf_counter() async for _ in events]
    return came[0] - begin, (came[-1] - came[0]) / max(1, len(came) - 1)


async def from_engine(llm: AsyncClient, prompt: list[int], max_tokens: int) -> AsyncIterator[Any]:
    async for output in llm.generate(prompt, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)):
        yield output


async def from_server(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> AsyncIterator[Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                yield line


def medians(pairs: list[tuple[float, float]]) -> dict[str, float]:
    first, between = zip(*pairs, strict=True)
    return {"time_to_first_token": round(median(first) * 1e3, 3), "between_tokens": round(median(between) * 1e3, 3)}


if __name__ == "__main__":
    main()
