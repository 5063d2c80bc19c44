"""The command-line arguments of the benchmarks and the profiler."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.bench.metrics import LIMITABLE
from eagleray.deploy.cli.arguments import add_engine
from eagleray.deploy.cli.options import add_options

SAMPLED_BY = ("temperature", "top_p", "top_k")  # sampling options that change how long a step takes
ENDPOINTS = ("completions", "chat")
NUM_PROMPTS, INPUT_LEN = 1000, 1024  # where there is no dataset
BATCH_SIZE = 8  # of `bench latency`
PROFILED_SIZES = (1, 64, 256)  # batch sizes of `profile`, as many as fit, where none are asked for
BENCH_DEFAULTS = {"enable_prefix_caching": False}  # a prompt that is met again must cost what it cost at first


def add_latency(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray bench latency`."""
    batch = parser.add_argument_group("batches")
    batch.add_argument(
        "--input-len",
        type=count,
        default=32,
        metavar="N",
        help="length of each prompt, in tokens (default: %(default)s)",
    )
    batch.add_argument(
        "--output-len",
        type=count,
        default=128,
        metavar="N",
        help="length of each answer, in tokens (default: %(default)s)",
    )
    batch.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        default=[BATCH_SIZE],
        metavar="N",
        help=f"requests at once; several sizes are run in turn (default: {BATCH_SIZE})",
    )
    batch.add_argument(
        "--num-iters", type=count, default=30, metavar="N", help="number of batches to measure (default: %(default)s)"
    )
    batch.add_argument(
        "--num-iters-warmup",
        type=whole,
        default=10,
        metavar="N",
        help="number of batches to run before those that are measured (default: %(default)s)",
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
        help="address of the server's API, the base_url of OpenAI's clients (default: %(default)s)",
    )
    server.add_argument(
        "--model",
        "-m",
        metavar="NAME",
        help="name of the model, as the server's /models lists it, or demo (default: the only one there)",
    )
    server.add_argument(
        "--endpoint", choices=ENDPOINTS, default="completions", help="endpoint to ask (default: %(default)s)"
    )
    server.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the API key (default: OPENAI_API_KEY, if set)"
    )
    server.add_argument(
        "--timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds of silence after which a request fails (default: %(default)s)",
    )
    server.add_argument(
        "--max-concurrency",
        type=count,
        metavar="N",
        help="maximum number of requests at once; one more is sent only when another ends",
    )
    server.add_argument(
        "--vocab-size",
        type=count,
        default=32000,
        metavar="N",
        help="prompts for the completions endpoint are random token ids below this (default: %(default)s)",
    )
    server.add_argument(
        "--max-model-len",
        type=count,
        metavar="N",
        help="maximum length of prompt and answer together, in tokens; refuse to send longer ones",
    )
    server.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"{options(SamplingParams)['ignore_eos'].text}; sent in vLLM's field of this name (default: yes)",
    )
    _add_requests(parser)
    _add_seed(parser)
    _add_output(parser)
    _add_sampling(parser)


def _add_requests(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("requests")
    load.add_argument(
        "--num-prompts",
        type=count,
        metavar="N",
        help=f"number of requests (default: {NUM_PROMPTS}, or all of --dataset)",
    )
    load.add_argument(
        "--input-len", type=count, metavar="N", help=f"mean length of prompts, in tokens (default: {INPUT_LEN})"
    )
    load.add_argument(
        "--output-len",
        type=count,
        default=128,
        metavar="N",
        help="mean length of answers, in tokens (default: %(default)s)",
    )
    load.add_argument(
        "--range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the mean by which lengths vary up and down, evenly (default: %(default)s)",
    )
    for side in ("input", "output"):
        load.add_argument(
            f"--{side}-len-sigma",
            type=float,
            default=0.0,
            metavar="X",
            help=f"make {side} lengths log-normal, with this standard deviation of their logarithm; the longest are "
            "cut at the model's limit",
        )
    load.add_argument(
        "--dataset", type=Path, metavar="FILE", help="file with prompts, as `eagleray generate --file` reads them"
    )
    load.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="X",
        help="requests per second, arriving as a Poisson process (default: %(default)s, all at once)",
    )
    load.add_argument(
        "--num-warmups",
        type=whole,
        default=1,
        metavar="N",
        help="number of requests before those that are measured (default: %(default)s)",
    )
    load.add_argument(
        "--goodput",
        type=limit,
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count the requests that keep every limit, in milliseconds; names are {', '.join(LIMITABLE)}",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray profile`."""
    decodes = parser.add_argument_group("decodes")
    decodes.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        metavar="N",
        help="requests at once; several sizes are run in turn "
        f"(default: as many of {' '.join(map(str, PROFILED_SIZES))} as fit)",
    )
    decodes.add_argument(
        "--context-len",
        type=count,
        default=1024,
        metavar="N",
        help="length of each prompt, in tokens (default: %(default)s)",
    )
    decodes.add_argument(
        "--num-steps",
        type=count,
        default=20,
        metavar="N",
        help="number of steps to profile, give or take two (default: %(default)s)",
    )
    decodes.add_argument(
        "--output-dir", type=folder, required=True, metavar="DIR", help="directory for Chrome traces and figures"
    )
    _add_seed(parser)
    _add_engine_and_sampling(parser, positional=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_seed(parser)
    _add_output(parser)
    _add_engine_and_sampling(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-json", type=Path, metavar="FILE", help="file to write settings, versions and figures to"
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    text = "seed of random prompts and times of arrival (default: %(default)s)"
    parser.add_argument("--seed", dest="workload_seed", type=whole, default=0, metavar="N", help=text)


def _add_engine_and_sampling(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    add_engine(parser, BENCH_DEFAULTS, positional)
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("sampling"), SamplingParams, SAMPLED_BY)


def bench_params(arguments: argparse.Namespace, max_tokens: int) -> SamplingParams:
    """Parameters for exactly this many tokens, drawn as asked. Raises `ValueError` for values out of range."""
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
    except ValueError:  # the port is not a number, or too large
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
