"""Converts `bad_words` to token sequences."""

from collections.abc import Sequence

from eagleray.cluster.frontend.tokenizer import Tokenizer

MAX_TABLE = 32_768  # tokens of the longest word times words: a rank compares so many at every token


def bad_word_token_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """As vLLM has them: each word as it begins a text, and behind a space where that makes other tokens, as many.

    Other ways to write a word in tokens are not found. Raises `ValueError` for more than `MAX_TABLE` holds.
    """
    found: list[list[int]] = []
    for word in words:
        text = word.lstrip()
        plain = tokenizer.encode(text or word, add_special_tokens=False)
        spaced = tokenizer.encode(f" {text}", add_special_tokens=False)
        found.append(plain)
        if text and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    found = [word for word in found if word]
    size = len(found) * max(map(len, found), default=0)
    if size > MAX_TABLE:
        longest = max(map(len, found))
        message = f"bad_words are {len(found)} of up to {longest} tokens; give fewer or shorter ones"
        raise ValueError(f"{message}, so that the numbers' product is at most {MAX_TABLE}")
    return found
