"""Drafts a request's next tokens from its own text: what followed the last time that it read as it does now.

Known as prompt lookup decoding (Saxena 2023) and in other engines as n-gram speculation. A draft costs the ranks tokens
that may be thrown away, so its length and how often one is tried follow what was accepted before.
"""

from array import array

SIZE = 3  # of the n-grams that are looked up
FIRST_LENGTH = 4
LONGEST_WAIT = 64  # tokens between two tries where none succeeds
MAX_INDEXED = 256  # tokens of a request in one step: a long prompt is learnt over many, and holds nobody up


class PromptLookup:
    """The drafts of one request."""

    __slots__ = ("_follows", "_length", "_next_try", "_num_indexed", "_wait")

    def __init__(self) -> None:
        self._follows: dict[int, int] = {}  # hash of an n-gram -> where the token lies that followed it last
        self._num_indexed = 0
        self._length = FIRST_LENGTH
        self._wait = 1
        self._next_try = 0

    def is_due(self, token_ids: "array[int]") -> bool:
        """Whether a draft is worth trying after these tokens, or after those that are being drawn to follow them."""
        return len(token_ids) >= self._next_try and self._find(token_ids) is not None

    def draft(self, token_ids: "array[int]", most: int) -> "array[int]":
        """What may follow `token_ids`: up to `most` tokens, none if this was never read before or rarely comes true."""
        at = self._find(token_ids) if len(token_ids) >= self._next_try else None
        drafted = array("i")
        if at is None:
            return drafted
        for place in range(at, at + min(most, self._length)):  # a text that repeats itself goes on to do so
            drafted.append(token_ids[place] if place < len(token_ids) else drafted[place - len(token_ids)])
        return drafted

    def judge(self, num_drafted: int, num_accepted: int, num_tokens: int, worth: int) -> None:
        """Learn how much of a draft came true; the request has `num_tokens` now. Fewer than `worth` are too few."""
        if num_accepted == num_drafted:
            self._length = max(FIRST_LENGTH, 2 * num_drafted)
        else:
            self._length = max(FIRST_LENGTH, num_accepted + 1)
        if num_accepted >= min(worth, num_drafted):
            self._wait = 1
        else:
            self._wait = min(LONGEST_WAIT, 2 * self._wait)
            self._next_try = num_tokens + self._wait

    def _find(self, token_ids: "array[int]") -> int | None:
        """Where the token lies that followed the last tokens of `token_ids` when they were read before."""
        begin = max(self._num_indexed, SIZE)
        self._num_indexed = max(begin, min(begin + MAX_INDEXED, len(token_ids)))
        for end in range(begin, self._num_indexed):
            self._follows[hash(token_ids[end - SIZE : end].tobytes())] = end  # two of one hash make a poor draft
        return self._follows.get(hash(token_ids[-SIZE:].tobytes()))
