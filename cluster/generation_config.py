"""What a checkpoint says about how generation ends."""

import json
from pathlib import Path

from eagleray.cluster.tokenizer import Tokenizer


def eos_token_ids(model: str | Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every token that ends a sequence: generation_config.json's, or else config.json's, and the tokenizer's.

    Both files may hold one id or a list. Raises `ValueError` for anything else.
    """
    named = _eos_of(Path(model) / "generation_config.json") or _eos_of(Path(model) / "config.json")
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset(named).union(own)


def _eos_of(file: Path) -> list[int]:
    if not file.is_file():
        return []
    value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ValueError(f"eos_token_id in {file} is {value!r}; write one token id or a list of them")
    return ids
