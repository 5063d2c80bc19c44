"""`SamplingParams`: what a user asks of one request, under vLLM's names; checked when made."""

import math
from dataclasses import dataclass, fields

from eagleray.cluster.frontend.prompts import check_text

MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # dividing logits by less than this would overflow; vLLM draws the same line
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # int64 and uint64 both; those that are equal modulo 2**64 draw the same
MAX_COUNT = 2**31 - 1  # what the ranks' int32 tables hold
MAX_N = 4096
MAX_BAD_WORDS, MAX_BAD_CHARACTERS = 1024, 16_384
MAX_FACTOR = 1e6  # of temperature and repetition: beyond it nothing changes, and float32 ends


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. Raises `ValueError` naming the field, the value and the remedy.

    What depends on the model (its vocabulary, its length) is checked when the request is submitted.
    """

    n: int = 1  # sequences per prompt, each with draws of its own; greedy ones are all equal
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 keeps every token
    min_p: float = 0.0
    seed: int | None = None  # of the first sequence, and the others' are made from it; None makes one from the engine's
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None  # none of which is generated; each also with a space before it
    max_tokens: int | None = 16  # None generates up to the model's limit
    min_tokens: int = 0  # until so many are generated, neither a stop token nor a stop string ends the sequence
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # the text of a stop token, too
    skip_special_tokens: bool = True
    logprobs: int | None = None  # this many of the most likely tokens beside the sampled one
    prompt_logprobs: int | None = None
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None  # of a longer prompt take the last so many; -1 for as many as fit

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_together()
        for name in (
            "stop",
            "stop_token_ids",
            "allowed_token_ids",
            "bad_words",
        ):  # copies that the caller cannot change
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, list(getattr(self, name)))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_distinct(self) -> int:
        """Sequences that can differ: one if greedy."""
        return 1 if self.greedy else self.n

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def _check_types(self) -> None:
        for field in fields(self):
            declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            optional = declared.endswith(" | None")
            is_right, wanted = _TYPES[declared.removesuffix(" | None")]
            value = getattr(self, field.name)
            if not (is_right(value) or (optional and value is None)):
                raise ValueError(f"{field.name} is {value!r}; give {wanted}{' or None' if optional else ''}")

    def _check_ranges(self) -> None:
        for name, (low, high, remedy) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; {remedy}")
        for name in ("top_p", "repetition_penalty", "truncate_prompt_tokens"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {RANGES[name][2]}")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if token_id < 0:
                    raise ValueError(f"{name} holds the token id {token_id}; token ids start at 0")
        for token_id, bias in (self.logit_bias or {}).items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token_id} is {bias!r}; give a number from -100 to 100")

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; "
                "lower the one or raise the other"
            )
        if "" in self.stop_strings:
            raise ValueError(f"stop is {self.stop!r}; an empty string would stop at once, leave it out")
        if self.stop_strings and not self.detokenize:
            raise ValueError(
                f"stop is {self.stop!r} with detokenize False; stop strings need text, set detokenize to True"
            )
        for name, texts in (("stop", self.stop_strings), ("bad_words", self.bad_words or ())):
            for text in texts:
                check_text(text, name)
        if self.bad_words is not None and not all(self.bad_words):
            raise ValueError("bad_words holds an empty string, which cannot be forbidden; leave it out")
        if len(self.bad_words or ()) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words has {len(self.bad_words or ())} words; give at most {MAX_BAD_WORDS}")
        if (num_characters := sum(map(len, self.bad_words or ()))) > MAX_BAD_CHARACTERS:
            raise ValueError(f"bad_words has {num_characters} characters in all; give at most {MAX_BAD_CHARACTERS}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is [], so that nothing could be drawn; name some ids or give None")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(item) for item in value)


def _is_strings(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value))


def _is_list_of_strings(value: object) -> bool:
    return not isinstance(value, str) and _is_strings(value)


def _is_biases(value: object) -> bool:
    return isinstance(value, dict) and all(_is_int(key) and _is_number(bias) for key, bias in value.items())


_TYPES = {  # a field's declared type -> whether a value is of it, and how to say so
    "int": (_is_int, "a whole number"),
    "float": (_is_number, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "list[int]": (_is_token_ids, "a list of token ids"),
    "list[str]": (_is_list_of_strings, "a list of strings"),
    "str | list[str]": (_is_strings, "a string or a list of strings"),
    "dict[int, float]": (_is_biases, "a dict from token ids to finite numbers"),
}

RANGES: dict[str, tuple[float, float, str]] = {  # lowest, highest, how to say so
    "n": (1, MAX_N, f"give a number from 1 to {MAX_N}"),
    "temperature": (0, MAX_FACTOR, f"give a number from 0 to {MAX_FACTOR:g}; 0 is greedy"),
    "top_p": (0, 1, "give a number above 0, up to 1; 1 keeps every token"),
    "top_k": (-1, MAX_COUNT, "give at least 1, less than 2**31, or 0 or -1 to keep every token"),
    "min_p": (0, 1, "give a number from 0 to 1; 0 keeps every token"),
    "seed": (MIN_SEED, MAX_SEED, "give a number from -2**63 to 2**64 - 1, or None to have one derived"),
    "presence_penalty": (-2, 2, "give a number from -2 to 2; 0 turns it off"),
    "frequency_penalty": (-2, 2, "give a number from -2 to 2; 0 turns it off"),
    "repetition_penalty": (1e-6, MAX_FACTOR, f"give a number above 0, up to {MAX_FACTOR:g}; 1 turns it off"),
    "max_tokens": (1, MAX_COUNT, "give at least 1, less than 2**31, or None for all that the model holds"),
    "min_tokens": (0, MAX_COUNT, "give at least 0, less than 2**31"),
    "logprobs": (0, MAX_LOGPROBS, f"give a number from 0 to {MAX_LOGPROBS}, or None"),
    "truncate_prompt_tokens": (-1, MAX_COUNT, "give at least 1, or -1 for as many as fit, or None for all"),
    "prompt_logprobs": (0, MAX_LOGPROBS, f"give a number from 0 to {MAX_LOGPROBS}, or None"),
}
