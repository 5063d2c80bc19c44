"""The command-line arguments of `eagleray batch`."""

import argparse
from pathlib import Path

from eagleray.deploy.cli.arguments import add_engine, add_generation_config
from eagleray.deploy.cli.options import SERVED_MODEL_NAME

AUTO = "auto"


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Options of `eagleray batch`."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "input",
        metavar="INPUT",
        help='a file, or a URL such as s3://bucket/key, with a row a line: {"custom_id": "1", "method": "POST", "url": '
        '"/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "…"}]}}; or /v1/completions',
    )
    files.add_argument(
        "output",
        metavar="OUTPUT",
        help="a file or URL for the results, which come in the order in which they are ready",
    )
    files.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="directory where results are kept until the end, so that a job that was killed can resume "
        "(default: beside OUTPUT; needed where OUTPUT is a URL)",
    )
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--replicas",
        type=_replicas,
        default=1,
        metavar="N",
        help="number of engines that share the rows; auto starts as many as the cluster has room for "
        "(default: %(default)s)",
    )
    engines.add_argument("--served-model-name", metavar="NAME", help=SERVED_MODEL_NAME)
    add_generation_config(engines)
    add_engine(parser)


def _replicas(text: str) -> int | None:
    """None for auto."""
    if text == AUTO:
        return None
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of replicas; give at least 1, or {AUTO}")
    return count
