"""Randomly changed checkpoints of every family: transformers' logits and its words on generation, or a refusal.

`tests/bench/checkpoint_differential.py` runs as many more cases as one likes.
"""

from pathlib import Path

import pytest

from eagleray.models.architectures import ARCHITECTURES
from support.differential import Tally
from support.model_cases import FAMILIES
from support.model_differential import run_model_case

pytestmark = pytest.mark.slow

CASES = 20  # of each family


def test_every_architecture_is_covered() -> None:
    assert {each.model_type for each in ARCHITECTURES.values() if each.model_type is not None} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_checkpoint_is_read_as_transformers_reads_it_or_refused(family: str, tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(CASES):
        tally.counts[run_model_case(tmp_path / str(seed), family, seed)] += 1
    print(f"{family}: {tally}")
    assert tally.counts["equal"] >= CASES // 4
    assert tally.counts["refused"] >= CASES // 8
