"""Cases of `model_cases.py`, each loaded by transformers and by us."""

import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eagleray.cluster.frontend.generation_config import DEFAULTED, eos_token_ids, sampling_defaults
from eagleray.models.config import ModelConfig
from eagleray.parallel.group import TPGroup
from support.differential import compare
from support.model_cases import write_case
from support.rank_process import logits

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
TOLERANCE = 1e-4  # as in test_against_transformers.py


@torch.inference_mode()
def ours(folder: Path) -> dict[str, Any]:
    (found,) = logits(TPGroup(), str(folder), [PROMPT[: ModelConfig.from_dir(folder).max_position_embeddings]])
    return {"logits": found, "eos": set(eos_token_ids(folder, None)), "sampling": sampling_defaults(folder)}


@torch.inference_mode()
def theirs(folder: Path) -> dict[str, Any]:
    """Raises for a checkpoint of which transformers would make some weights up."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, loading = loaded
    made_up = [key for key in ("missing_keys", "mismatched_keys", "error_msgs") if loading.get(key)]
    if made_up:
        raise ValueError(f"{made_up}: {loading}")
    found = model.eval()(torch.tensor([PROMPT]), use_cache=False).logits[0]
    said = model.generation_config
    sampling = {name: getattr(said, name, None) for name in DEFAULTED}  # None for what transformers does not have
    if said.do_sample is False:
        sampling["temperature"] = 0.0
    return {"logits": found, "eos": said.eos_token_id, "sampling": sampling}


def same(name: str, got: Any, expected: Any) -> bool:
    if name == "logits":
        known = expected[: len(got)]  # as many as there are positions
        return got.shape == known.shape and bool(torch.allclose(got, known, rtol=0, atol=TOLERANCE))
    if name == "eos":
        named = expected if isinstance(expected, list) else [] if expected is None else [expected]
        return not named or got == set(named)  # with none of its own, config.json's count for us
    return all(
        got.get(key) == value or (key not in got and value in (None, 1.0, 50)) for key, value in expected.items()
    )


UNREAD = {  # of no use to inference, so their values are nobody's business here
    "attention_dropout",
    "bos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}


def allowed(folder: Path, error: Exception) -> str | None:
    """What we run and transformers does not, by intent."""
    if "model_type" not in json.loads((folder / "config.json").read_text()):
        return "run by its architecture, where transformers wants a model_type"
    field = re.match(r"Validation error for field '(\w+)'", str(error))
    if (field and field[1] in UNREAD) or "Padding_idx must be within" in str(error):  # which is pad_token_id
        return "run in spite of a key that inference does not read"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings, which are many."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_model_case(folder: Path, family: str, seed: int) -> str:
    """One case; raises `AssertionError` that says how to run it again."""
    rng = random.Random(f"{family} {seed}")
    try:
        words = write_case(folder / "case", family, rng)
        with quiet():
            return compare(folder / "case", f"[{family} {seed}] {words}", ours, theirs, same, allowed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
