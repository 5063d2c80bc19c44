"""Serialises answers with many log-probabilities in a thread, part by part.

As objects they take ten times their JSON's memory, and what pydantic does at one go lets no others have their turn.
"""

from collections.abc import Iterable, Iterator, Sequence

from pydantic import BaseModel

from eagleray.cluster.outputs import RequestOutput
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.responses import ChatLogprobs

SMALL = 2_000  # log-probabilities: they take less time than a thread takes to begin
PART = 100  # tokens
EMPTY = '"content":[]'  # as no text in JSON has it, since its quotes are escaped there


def log_probabilities(output: RequestOutput, params: SamplingParams) -> int:
    """How many there are in an output."""
    num_tokens = sum(len(sequence.token_ids) for sequence in output.outputs)
    num = 0 if params.logprobs is None else num_tokens * (params.logprobs + 1)
    if params.prompt_logprobs is not None:
        num += params.n * len(output.prompt_token_ids) * (params.prompt_logprobs + 1)
    return num


def parts(num_tokens: int) -> Iterator[slice]:
    """Tokens, some at a time."""
    return (slice(begin, begin + PART) for begin in range(0, num_tokens, PART))


def written(reply: BaseModel, contents: Sequence[Iterable[ChatLogprobs]]) -> bytes:
    """An answer's JSON, in which these take the place of empty contents of log-probabilities, each made in its turn."""
    first, *others = reply.model_dump_json(exclude_unset=True).split(EMPTY)
    assert len(others) == len(contents), "each choice has one"
    body = bytearray(first.encode())
    for content, other in zip(contents, others, strict=True):
        body += b'"content":['
        for number, part in enumerate(content):
            json = part.model_dump_json(include={"content"}).encode()
            body += b"," * (number > 0) + json[len('{"content":[') : -len("]}")]
        body += b"]" + other.encode()
    return bytes(body)
