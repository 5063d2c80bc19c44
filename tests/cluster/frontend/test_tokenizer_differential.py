"""Randomly changed tokenizer folders: the ids, texts, ends and chats of transformers' `AutoTokenizer`, or a refusal.

`tests/bench/checkpoint_differential.py` runs as many more cases as one likes.
"""

from pathlib import Path

from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from eagleray.models.architectures import ARCHITECTURES
from support.differential import Tally
from support.tokenizer_differential import run_tokenizer_case

CASES = 300


def test_the_classes_of_our_families_are_those_that_transformers_has_for_them() -> None:
    for architecture in ARCHITECTURES.values():
        if (name := architecture.model_type) is not None:
            assert architecture.tokenizer == TOKENIZER_MAPPING_NAMES.get(name)
            assert architecture.tokenizer_overrules == (name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)


def test_a_changed_folder_is_read_as_transformers_reads_it_or_refused(tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(CASES):
        tally.counts[run_tokenizer_case(tmp_path / str(seed), seed)] += 1
    print(f"tokenizers: {tally}")
    assert set(tally.counts) == {"equal", "refused"}
    assert tally.counts["equal"] >= CASES // 4
    assert tally.counts["refused"] >= CASES // 8
