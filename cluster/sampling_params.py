"""`SamplingParams`: what a user asks of one request, under vLLM's names; checked when made."""

from dataclasses import dataclass

from eagleray.cluster.options import check, check_text, option, options
from eagleray.workers.protocol.messages import GREEDY_BELOW, MAX_LOGPROBS

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # int64 and uint64 both; those that are equal modulo 2**64 draw the same
MAX_COUNT = 2**31 - 1  # what the ranks' int32 tables hold
MAX_N = 4096
MAX_BAD_WORDS, MAX_BAD_CHARACTERS = 1024, 16_384
MAX_BIAS = 100
MAX_FACTOR = 1e6  # of temperature and repetition: beyond it nothing changes, and float32 ends


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. Raises `ValueError` naming the field, the value and the remedy.

    What depends on the model (its vocabulary, its length) is checked when the request is submitted. Command line, HTTP,
    `generation_config.json` and documentation take these fields with what is said here; the ranks are told those that
    `Sampling` has under the same name and type.
    """

    n: int = option(1, "number of answers to each prompt, each drawn on its own; greedy ones are all equal", (1, MAX_N))
    temperature: float = option(
        1.0,
        "how far to stray from the most likely token",
        (0, MAX_FACTOR),
        note="0 is greedy",
        example=0.7,
        of_model=True,
    )
    top_p: float = option(
        1.0,
        "draw from the most likely tokens that together have this probability",
        (0, 1),
        excluded=0,
        note="1 keeps every token",
        example=0.9,
        of_model=True,
        random=True,
    )
    top_k: int = option(
        0,
        "draw from the N most likely tokens",
        (-1, MAX_COUNT),
        note="0 or -1 keeps every token",
        example=20,
        of_model=True,
        random=True,
    )
    min_p: float = option(
        0.0,
        "leave out tokens less likely than this share of the most likely one",
        (0, 1),
        note="0 keeps every token",
        example=0.1,
        of_model=True,
        random=True,
    )
    top_n_sigma: float = option(
        0.0,
        "leave out tokens whose logit is more than N standard deviations of all logits below the highest",
        (0, MAX_FACTOR),
        note="0 keeps every token",
        example=1.0,
        of_model=True,
        random=True,
    )
    seed: int | None = option(  # of the first sequence, and the others' are made from it
        None,
        "seed of the draws; equal seeds draw equal tokens, whatever else runs; -1 is 2**64 - 1",
        (MIN_SEED, MAX_SEED),
        none="to have one derived",
    )
    presence_penalty: float = option(
        0.0, "lower the score of tokens that the answer has used, once each", (-2, 2), note="0 turns it off"
    )
    frequency_penalty: float = option(
        0.0, "lower the score of tokens that the answer has used, for each time", (-2, 2), note="0 turns it off"
    )
    repetition_penalty: float = option(
        1.0,
        "divide the score of tokens in prompt or answer by this",
        (1e-6, MAX_FACTOR),
        allowed=f"a number above 0, up to {MAX_FACTOR:g}",
        note="1 turns it off",
        of_model=True,
    )
    logit_bias: dict[int, float] | None = option(None, "add to the score of single tokens before drawing")
    allowed_token_ids: list[int] | None = option(
        None, "draw from these tokens only", min_length=1, allowed="a list of at least one token id"
    )
    bad_words: list[str] | None = option(
        None, "texts that are never written, with or without a space before them", max_length=MAX_BAD_WORDS
    )
    max_tokens: int | None = option(
        16, "maximum length of the answer, in tokens", (1, MAX_COUNT), none="for all that the model holds"
    )
    min_tokens: int = option(0, "minimum length of the answer, in tokens; nothing ends it before", (0, MAX_COUNT))
    stop: str | list[str] | None = option(None, "texts before which the answer ends")
    stop_token_ids: list[int] | None = option(None, "end the answer at one of these tokens")
    ignore_eos: bool = option(False, "go on past the model's end-of-sequence token")
    include_stop_str_in_output: bool = option(False, "leave the stop text, or token, at the end of the answer")
    skip_special_tokens: bool = option(True, "leave tokens such as the end-of-sequence out of the text")
    logprobs: int | None = option(
        None, "report log-probabilities of the N most likely tokens beside the one drawn", (0, MAX_LOGPROBS)
    )
    prompt_logprobs: int | None = option(
        None, "report log-probabilities of the prompt's tokens, and of the N most likely ones", (0, MAX_LOGPROBS)
    )
    detokenize: bool = option(True, "turn the answer's tokens into text")
    truncate_prompt_tokens: int | None = option(
        None,
        "keep the last N tokens of a longer prompt; -1 for as many as fit",
        (-1, MAX_COUNT),
        excluded=0,
        allowed="a whole number from 1 to 2**31 - 1, or -1 for as many as fit",
        none="for all",
    )

    def __post_init__(self) -> None:
        check(self)
        self._check_ids()
        self._check_together()
        for name in options(SamplingParams):  # copies that the caller cannot change
            value = getattr(self, name)
            if isinstance(value, list | tuple | dict):
                object.__setattr__(self, name, dict(value) if isinstance(value, dict) else list(value))

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

    def _check_ids(self) -> None:
        for name in TOKEN_ID_OPTIONS:
            for token_id in getattr(self, name) or ():
                if token_id < 0:
                    raise ValueError(f"{name} holds the token id {token_id}; token ids start at 0")
        for token_id, bias in (self.logit_bias or {}).items():
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ValueError(
                    f"logit_bias of token {token_id} is {bias!r}; give a number from -{MAX_BIAS} to {MAX_BIAS}"
                )

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
        if (num_characters := sum(map(len, self.bad_words or ()))) > MAX_BAD_CHARACTERS:
            raise ValueError(f"bad_words has {num_characters} characters in all; give at most {MAX_BAD_CHARACTERS}")


TOKEN_ID_OPTIONS = tuple(
    name for name, each in options(SamplingParams).items() if each.kind in ("list[int]", "dict[int, float]")
)
