"""The command-line arguments of the benchmarks and the profiler."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.bench.metrics import LIMITABLE
from eagleray.deploy.cli.arguments import add_engine
from eagleray.deploy.cli.options import add_options

SAMPLED_BY = ("temperature", "top_p", "top_k")  # sampling options that change how long a step takes
ENDPOINTS = ("completions", "chat")
BENCH_DEFAULTS = {"enable_prefix_caching": False}  # a prompt that is met again must cost what it cost at first


def add_latency(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray bench latency`."""
    batch = parser.add_argument_group("batches")
    batch.add_argument("--input-len", type=count, default=32, metavar="N", help="tokens of each prompt (default: 32)")
    batch.add_argument(
        "--output-len", type=count, default=128, metavar="N", help="tokens of each answer (default: 128)"
    )
    batch.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        default=[8],
        metavar="N",
        help="requests at once; several are run in turn (default: 8)",
    )
    batch.add_argument("--num-iters", type=count, default=30, metavar="N", help="batches to measure (default: 30)")
    batch.add_argument(
        "--num-iters-warmup", type=whole, default=10, metavar="N", help="batches before those (default: 10)"
    )
    _add_common(parser)


def add_throughput(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray bench throughput`."""
    _add_requests(parser)
    _add_common(parser)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray bench serve`."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url",
        type=http_url,
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="what OpenAI's clients call so (default: http://127.0.0.1:8000/v1)",
    )
    server.add_argument(
        "--model", "-m", metavar="NAME", help="as the server's /models lists it, or demo (default: the only one there)"
    )
    server.add_argument(
        "--endpoint", choices=ENDPOINTS, default="completions", help="which one is asked (default: completions)"
    )
    server.add_argument(
        "--api-key-env", metavar="NAME", help="the environment variable with the key (default: OPENAI_API_KEY, if set)"
    )
    server.add_argument(
        "--timeout", type=seconds, default=300.0, metavar="S", help="silence after which a request fails (default: 300)"
    )
    server.add_argument(
        "--max-concurrency", type=count, metavar="N", help="requests at once; one more is due only when another ends"
    )
    server.add_argument(
        "--vocab-size",
        type=count,
        default=32000,
        metavar="N",
        help="prompts for completions are random token ids below this (default: 32000)",
    )
    server.add_argument(
        "--max-model-len", type=count, metavar="N", help="refuse prompts that are longer with their answer"
    )
    server.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for answers of full length, as vLLM's extension does it (default: yes)",
    )
    _add_requests(parser)
    _add_seed(parser)
    _add_output(parser)
    _add_sampling(parser)


def _add_requests(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("requests")
    load.add_argument("--num-prompts", type=count, metavar="N", help="requests (default: 1000, or all of --dataset)")
    load.add_argument("--input-len", type=count, metavar="N", help="mean tokens of a prompt (default: 1024)")
    load.add_argument(
        "--output-len", type=count, default=128, metavar="N", help="mean tokens of an answer (default: 128)"
    )
    load.add_argument(
        "--range-ratio", type=float, default=0.0, metavar="X", help="lengths vary evenly by this share up and down"
    )
    for side in ("input", "output"):
        load.add_argument(
            f"--{side}-len-sigma",
            type=float,
            default=0.0,
            metavar="X",
            help=f"{side} lengths are log-normal: the standard deviation of their logarithm; cut at the model's limit",
        )
    load.add_argument(
        "--dataset", type=Path, metavar="FILE", help="prompts from a file, as `eagleray generate --file` reads them"
    )
    load.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="X",
        help="requests per second, arriving as a Poisson process (default: inf, all at once)",
    )
    load.add_argument("--num-warmups", type=whole, default=1, metavar="N", help="requests before those (default: 1)")
    load.add_argument(
        "--goodput",
        type=limit,
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count requests that keep every limit, in milliseconds; names are {', '.join(LIMITABLE)}",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray profile`."""
    decodes = parser.add_argument_group("decodes")
    decodes.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        metavar="N",
        help="requests at once; several are profiled in turn (default: as many of 1 64 256 as fit)",
    )
    decodes.add_argument(
        "--context-len", type=count, default=1024, metavar="N", help="tokens of each prompt (default: 1024)"
    )
    decodes.add_argument(
        "--num-steps", type=count, default=20, metavar="N", help="steps to profile, give or take two (default: 20)"
    )
    decodes.add_argument(
        "--output-dir", type=folder, required=True, metavar="DIR", help="Chrome traces and figures go there"
    )
    _add_seed(parser)
    _add_engine_and_sampling(parser, positional=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_seed(parser)
    _add_output(parser)
    _add_engine_and_sampling(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write settings, versions and figures there")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    text = "of prompts and arrivals (default: 0)"
    parser.add_argument("--seed", dest="workload_seed", type=whole, default=0, metavar="N", help=text)


def _add_engine_and_sampling(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    add_engine(parser, BENCH_DEFAULTS, positional)
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("sampling"), SamplingParams, SAMPLED_BY)


def bench_params(arguments: argparse.Namespace, max_tokens: int) -> SamplingParams:
    """So many tokens exactly, drawn as asked. Raises `ValueError` for values out of range."""
    drawn = {name: getattr(arguments, name) for name in SAMPLED_BY if hasattr(arguments, name)}
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **drawn)


def goodput_limits(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by name. Raises `ValueError` for a name with two limits."""
    limits: dict[str, float] = {}
    for name, milliseconds in pairs:
        if name in limits:
            both = f"{name}:{limits[name]:g} and {name}:{milliseconds:g}"
            raise ValueError(f"--goodput has {both}; give one limit for each of {', '.join(LIMITABLE)}")
        limits[name] = milliseconds
    return limits


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def folder(text: str) -> Path:
    """Not the empty text of an unset variable, which would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a directory; name one, or . for the working directory")
    return Path(text)


def limit(text: str) -> tuple[str, float]:
    """`ttft:200`"""
    name, _, milliseconds = text.partition(":")
    try:
        value = float(milliseconds)
    except ValueError:
        value = -1.0
    if name not in LIMITABLE or not value > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a limit such as ttft:200; the names are {', '.join(LIMITABLE)}"
        )
    return name, value


def http_url(text: str) -> str:
    """`http://127.0.0.1:8000/v1`, without a slash at its end."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
