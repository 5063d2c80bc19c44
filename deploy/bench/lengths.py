"""How many requests a benchmark sends, and how long they are."""

import argparse

import numpy as np

from eagleray.deploy.bench.arguments import INPUT_LEN
from eagleray.deploy.bench.workload import Lengths
from eagleray.deploy.cli.prompts import Task, read_file


def input_lengths(arguments: argparse.Namespace, count: int, rng: np.random.Generator, limit: int) -> list[int]:
    """Tokens of each prompt. Raises `ValueError` for parameters that do not make a distribution, as `output_lengths`
    does.
    """
    mean = arguments.input_len or INPUT_LEN
    lengths = Lengths(mean=mean, range_ratio=_ratio(arguments, "input"), sigma=arguments.input_len_sigma)
    return lengths.draw(count, rng, limit)


def output_lengths(arguments: argparse.Namespace, count: int, rng: np.random.Generator, limit: int) -> list[int]:
    """Tokens of each answer."""
    ratio, sigma = _ratio(arguments, "output"), arguments.output_len_sigma
    return Lengths(mean=arguments.output_len, range_ratio=ratio, sigma=sigma).draw(count, rng, limit)


def check_fits(num_input: int, num_output: int, limit: int) -> None:
    """Raises `ValueError` for a request that is too long."""
    if num_input + num_output > limit:
        raise ValueError(
            f"a request has {num_input} tokens in and {num_output} out, but the model holds {limit}; lower one"
        )


def dataset_tasks(arguments: argparse.Namespace) -> list[Task]:
    """As many of the file's prompts as are asked for. Raises `ValueError` if there are too few, or for lengths."""
    if arguments.input_len is not None or arguments.input_len_sigma:
        raise ValueError("--dataset brings its own prompts; leave out --input-len and --input-len-sigma")
    tasks = read_file(arguments.dataset, "--dataset")
    if arguments.num_prompts is not None and arguments.num_prompts > len(tasks):
        raise ValueError(
            f"--num-prompts is {arguments.num_prompts}, but {arguments.dataset} holds {len(tasks)}; lower it"
        )
    return tasks[: arguments.num_prompts]


def _ratio(arguments: argparse.Namespace, side: str) -> float:
    """The range ratio holds for the lengths that have no sigma of their own."""
    ratio: float = arguments.range_ratio
    both = arguments.input_len_sigma and arguments.output_len_sigma
    return ratio if both or not getattr(arguments, f"{side}_len_sigma") else 0.0
