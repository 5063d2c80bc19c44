"""Cases of `tokenizer_cases.py`, each loaded by transformers and by us."""

import random
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from eagleray.cluster.frontend.generation_config import eos_token_ids
from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.differential import compare
from support.model_differential import quiet
from support.tokenizer_cases import write_case

TEXTS = [
    "the cab in the inn",
    " leading and  double spaces ",
    "<s>user</s> <|im_start|>the<|im_end|>\n",
    "<new> the <new2>the<late>zz<eos><pad>",
    "Grüße, 日本 👋 123",
    "",
]
CHAT = [{"role": "user", "content": "the cab"}, {"role": "assistant", "content": "in", "name": None}]
OPTIONS: list[dict[str, Any]] = [{"add_generation_prompt": True}, {"add_generation_prompt": False}]


def ours(folder: Path) -> dict[str, Any]:
    found = Tokenizer.from_dir(folder)
    ids = [found.encode(text) for text in TEXTS]
    return {
        "ids": ids,
        "bare ids": [found.encode(text, add_special_tokens=False) for text in TEXTS],
        "text": [found.decode(of_text, skip_special_tokens=False) for of_text in ids],
        "text without special tokens": [found.decode(of_text) for of_text in ids],
        "end": found.eos_token_id,
        "start": found.bos_token_id,
        "ends": {found.eos_token_id} - {None} == set(eos_token_ids(folder, found)),
        "special": found.special_tokens,
        "chats": [_chat(found.apply_chat_template, options, ValueError) for options in OPTIONS],
    }


def theirs(folder: Path) -> dict[str, Any]:
    found: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = [found(text)["input_ids"] for text in TEXTS]
    return {
        "ids": ids,
        "bare ids": [found(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "text": [found.decode(of_text, skip_special_tokens=False) for of_text in ids],
        "text without special tokens": [found.decode(of_text, skip_special_tokens=True) for of_text in ids],
        "end": found.eos_token_id,
        "start": found.bos_token_id,
        "ends": True,
        "special": found.special_tokens_map,
        "chats": [
            _chat(lambda chat, **given: found.apply_chat_template(chat, tokenize=False, **given), options, Exception)
            for options in OPTIONS
        ],
    }


def _chat(render: Any, options: dict[str, Any], refusal: type[Exception]) -> Any:
    """The text; "none" where there is no template, or it fails, which we may only say with a `ValueError`."""
    try:
        return render(CHAT, **options)
    except refusal:
        return "none"


def same(name: str, got: Any, expected: Any) -> bool:
    return bool(got == expected)


def allowed(folder: Path, error: Exception) -> str | None:
    return None


def run_tokenizer_case(folder: Path, seed: int) -> str:
    """One case; raises `AssertionError` that says how to run it again."""
    rng = random.Random(f"tokenizer {seed}")
    try:
        words = write_case(folder / "case", rng)
        with quiet():
            return compare(folder / "case", f"[tokenizer {seed}] {words}", ours, theirs, same, allowed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
