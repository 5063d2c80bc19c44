"""The messages between the engine core and the ranks: plain MessagePack structs that carry only what changed.

Token ids travel as little-endian int32 bytes, which numpy and `array` read without a loop.
"""

from typing import Literal

import msgspec

from eagleray.workers.protocol.startup import Ready

TRACE_NUM_STEPS = "eagleray_num_steps"  # top-level key of a profile's trace
GREEDY_BELOW = 1e-5  # dividing logits by less than this would overflow; vLLM draws the same line
MAX_LOGPROBS = 20  # at one position, beside the token's own


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are drawn. Values are checked where users give them (`SamplingParams`)."""

    temperature: float = 1.0  # greedy below `GREEDY_BELOW`
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    min_p: float = 0.0
    top_n_sigma: float = 0.0  # 0 keeps every token
    seed: int = 0  # unsigned 64-bit key of the noise
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []  # empty allows every token
    bad_words: list[list[int]] = []  # tokens none of which may be generated in a row
    min_tokens: int = 0  # until so many are generated, `stop_token_ids` cannot be drawn
    stop_token_ids: list[int] = []  # end of sequence included, unless the user ignores it
    logprobs: int | None = None  # how many of the most likely tokens to report beside the sampled one
    prompt_logprobs: int | None = None

    @property
    def num_listed(self) -> int:
        """Numbers in all of its lists."""
        lists = (self.logit_bias, self.allowed_token_ids, self.stop_token_ids, *self.bad_words)
        return sum(map(len, lists))


class RowStart(msgspec.Struct, omit_defaults=True):
    """A request enters a row of the workers' tables, for the first time or again after preemption."""

    row: int
    token_ids: bytes  # int32, the prompt and every committed token
    num_prompt_tokens: int
    block_ids: list[int]
    sampling: Sampling
    num_computed_tokens: int = 0  # found in the prefix cache


class Step(msgspec.Struct, omit_defaults=True, tag="step"):
    """One forward pass. A live row that is not in `chunks` runs one token.

    After a step that ran out of memory a rank skips all up to one that says `restart`; with that, every row stops.
    A rank applies `stop`, then `start`, `blocks`, `num_tokens` and `drafts`, then runs the batch in ascending order of
    rows.
    """

    step: int
    stop: list[int] = []
    start: list[RowStart] = []
    blocks: dict[int, list[int]] = {}  # row -> block ids to append to its block table
    chunks: dict[int, int] = {}  # row -> number of tokens, where it is not one; 0 lets the row rest
    drafts: dict[int, bytes] = {}  # row -> int32, tokens that end its chunk and may turn out not to be drawn
    num_tokens: dict[int, int] = {}  # row -> how many it has, all but one of them computed, after a step with a draft
    restart: bool = False


class RankControl(msgspec.Struct, omit_defaults=True, tag="control"):
    """Between the steps before and after it, every rank does this and answers with `RankReply`."""

    verb: Literal["start_profile", "stop_profile", "drop_profile"]
    arguments: dict[str, str] = {}


class Goodbye(msgspec.Struct, tag="goodbye"):
    """The rank is to end."""


class TokenLogprobs(msgspec.Struct, omit_defaults=True, gc=False):
    """Log-probabilities at one position: the token itself first, then the most likely ones in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # how many tokens of the vocabulary are more likely than the first, plus one


class StepOutput(msgspec.Struct, omit_defaults=True, tag="output"):
    """What rank 0 returns. `token_ids` holds one int32 for each row whose chunk reached its last known token.

    A row with a draft has as many as `num_drawn` says: the tokens of the draft that were drawn, too, and one more.
    """

    step: int
    token_ids: bytes = b""  # in ascending order of rows
    num_drawn: dict[int, int] = {}
    logprobs: dict[int, list[TokenLogprobs]] = {}  # row -> of its sampled tokens
    prompt_logprobs: dict[
        int, list[TokenLogprobs]
    ] = {}  # row -> of the prompt tokens whose predecessor ran in this chunk
    not_finite: list[int] = []  # rows whose logits were NaN or infinite: their tokens mean nothing
    all_masked: list[int] = []  # rows that may draw no token at all: likewise
    gpu_seconds: float = 0.0  # from its launch, or from the output before if that came later, to its output
    out_of_memory: str = ""  # why the step did not run; those after it do not either, up to a restart


class RankReply(msgspec.Struct, omit_defaults=True, tag="reply"):
    """One rank has carried out a `RankControl`, or could not."""

    rank: int
    result: str = ""  # of `stop_profile` the file with the trace
    error: str | None = None


class Beat(msgspec.Struct, tag="beat"):
    """A rank's process lives."""

    rank: int
    pid: int


RankMessage = Step | RankControl | Goodbye
RankReport = StepOutput | RankReply | Beat | Ready
