"""The messages between front ends and the engine core."""

import msgspec

from eagleray.cluster.core.time_accounting import Begun, Spent
from eagleray.workers.protocol.messages import Sampling, TokenLogprobs

MAX_PRIORITY = 2**31 - 1


class EngineRequest(msgspec.Struct, omit_defaults=True, tag="request"):
    """One prompt's sequences. Their ids are unique within the front end that sends them."""

    id: int  # of the first sequence; those of `seeds` count up from it
    prompt_token_ids: bytes  # int32
    sampling: Sampling  # of the first sequence
    max_tokens: int  # at least 1; prompt and output together fit the model
    priority: int = 0  # lower runs first; `MAX_PRIORITY` at most, either way
    seeds: list[int] = []  # of further sequences, for which no prompt log-probabilities are wanted
    group: str = ""  # names what a client asked for at once, of which this is all if it is empty
    tenant: str = ""  # on whose account it runs


class Submit(msgspec.Struct, tag="submit"):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag="abort"):
    ids: list[int]


class Control(msgspec.Struct, omit_defaults=True, tag="control"):
    """All ranks are to do something between two steps. Answered with a `ControlReply` of the same id."""

    id: int  # chosen by the front end
    verb: str  # of `cluster/core/control.py`
    arguments: dict[str, str] = {}


class Ping(msgspec.Struct, tag="ping"):
    """Whether the core lives, and has got everything: answered at once, by news that may be empty."""

    num_sent: int  # messages of this front end, this one included


class Shutdown(msgspec.Struct, tag="shutdown"):
    """The owner closes the engine; whatever still runs ends with an error."""


class Tokens(msgspec.Struct, omit_defaults=True):
    """News of one request: the tokens committed by one step, or its end."""

    id: int
    token_ids: list[int] = []
    finish_reason: str | None = None  # stop (a stop token was drawn), length, abort, error
    error: str | None = None  # the cause, when finish_reason is error
    all_masked: bool = False  # whether that is the request's own: it left no token to draw
    logprobs: list[TokenLogprobs] = []  # one for each of token_ids, when asked for
    prompt_logprobs: list[TokenLogprobs] = []  # for prompt tokens 1, 2, … as their chunks run, when asked for
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache, once, with the first news
    begun: Begun | None = None  # with the first news after it was taken from the queue


class ControlReply(msgspec.Struct, omit_defaults=True):
    """Every rank has carried out a control, or it could not be done."""

    id: int
    results: list[str] = []  # of the ranks, in order, if they have any
    error: str | None = None


class EngineStats(msgspec.Struct, omit_defaults=True):
    """The scheduler's state after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0  # since the start
    num_prefix_hit_tokens: int = 0  # since the start
    num_draft_tokens: int = 0  # since the start
    num_accepted_tokens: int = 0  # of these
    spent: Spent = Spent()


class EngineOutputs(msgspec.Struct, omit_defaults=True):
    """One message per step and front end."""

    outputs: list[Tokens]
    stats: EngineStats
    number: int = 0  # 1, 2, … for each front end, so that a lost message is noticed
    replies: list[ControlReply] = []
    lost: str = ""  # why requests of this front end may be unknown to the core, if so


RequestMessage = Submit | Abort | Control
FrontEndMessage = RequestMessage | Ping | Shutdown
