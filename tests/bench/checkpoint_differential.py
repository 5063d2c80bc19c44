"""Folders that transformers and Eagleray read, changed at random, for as long as one likes: see `differential.py`.

    python tests/bench/checkpoint_differential.py --seconds 600 --seed 1

Prints every case that came out otherwise than it should, and how many came out how; exits with 1 if there was one.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.differential import Tally
from support.model_cases import FAMILIES
from support.model_differential import run_model_case
from support.tokenizer_differential import run_tokenizer_case


def run_case(folder: Path, kind: str, number: int) -> str:
    return run_tokenizer_case(folder, number) if kind == "tokenizer" else run_model_case(folder, kind, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    kinds = [*FAMILIES, "tokenizer"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args()
    tallies = {kind: Tally() for kind in options.kinds}
    wrong, end, number = 0, time.monotonic() + options.seconds, options.seed * 1_000_000
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < end:
            for kind, tally in tallies.items():
                try:
                    tally.counts[run_case(Path(scratch) / "case", kind, number)] += 1
                except AssertionError as error:
                    wrong += 1
                    print(error, flush=True)
            number += 1
    for kind, tally in tallies.items():
        print(f"{kind}: {tally}")
    print(f"{wrong} came out otherwise")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
