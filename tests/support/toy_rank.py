"""A rank whose model is arithmetic, so that thousands of requests run in a second and every token can be foretold.

The next token is a checksum of all tokens before it, and these are read back from a paged cache slot by slot. A wrong
block, a wrong row, a wrong position, or a block given away too early therefore changes the tokens.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

from eagleray.workers.protocol.messages import RowStart, Step, StepOutput, TokenLogprobs

VOCAB_SIZE = 50


def next_token(token_ids: Sequence[int]) -> int:
    return crc32(array("i", token_ids).tobytes()) % VOCAB_SIZE


def repeating_token(token_ids: Sequence[int]) -> int:
    """By the last two tokens alone, so that a text comes to repeat itself, and by its length now and then."""
    return next_token(token_ids[-2:] if len(token_ids) % 40 else [len(token_ids)]) % 8


def generate(
    prompt: Sequence[int],
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    draw: Callable[[Sequence[int]], int] = next_token,
) -> list[int]:
    """What a request must get, whatever runs beside it."""
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(draw(token_ids))
        if token_ids[-1] in stop_token_ids:
            break
    return token_ids[len(prompt) :]


@dataclass
class ToyRow:
    start: RowStart
    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int


class ToyRank:
    """Runs steps as a worker does."""

    def __init__(self, num_blocks: int, block_size: int, draw: Callable[[Sequence[int]], int] = next_token) -> None:
        self._draw = draw
        self.rows: dict[int, ToyRow] = {}
        self.num_tokens_run = 0
        self.largest_batch = 0
        self.most_drawn = 0
        self._cache: list[int | None] = [None] * (num_blocks * block_size)
        self._block_size = block_size

    def run(self, step: Step) -> StepOutput:
        if step.restart:
            self.rows.clear()
        for row in step.stop:
            del self.rows[row]
        for start in step.start:
            assert start.row not in self.rows, f"row {start.row} is in use"
            token_ids = list(array("i", start.token_ids))
            self.rows[start.row] = ToyRow(start, token_ids, list(start.block_ids), start.num_computed_tokens)
        for row, block_ids in step.blocks.items():
            self.rows[row].block_ids += block_ids
        for row, num_tokens in step.num_tokens.items():
            del self.rows[row].token_ids[num_tokens:]
            self.rows[row].num_computed_tokens = num_tokens - 1
        for row, drafted in step.drafts.items():
            self.rows[row].token_ids += array("i", drafted)
        assert set(step.chunks) <= set(self.rows), "a chunk of a row that is not live"
        batch = [(row, step.chunks.get(row, 1)) for row in sorted(self.rows) if step.chunks.get(row, 1)]
        self.largest_batch = max(self.largest_batch, sum(num_tokens for _, num_tokens in batch))
        for row, num_tokens in batch:
            self._write(self.rows[row], num_tokens)
        return self._sample(step, batch)

    def _write(self, row: ToyRow, num_tokens: int) -> None:
        """All of a step's tokens are written before any is read, as the attention op does it."""
        end = row.num_computed_tokens + num_tokens
        assert num_tokens >= 1
        assert end <= len(row.token_ids), "the scheduler ran a token that is not known yet"
        for position in range(row.num_computed_tokens, end):
            self._cache[self._slot(row, position)] = row.token_ids[position]
        row.num_computed_tokens = end
        self.num_tokens_run += num_tokens

    def _sample(self, step: Step, batch: list[tuple[int, int]]) -> StepOutput:
        output, sampled, num_drawn = StepOutput(step.step), array("i"), 0
        for number, num_tokens in batch:
            row = self.rows[number]
            if row.start.sampling.prompt_logprobs is not None:
                begin = row.num_computed_tokens - num_tokens
                output.prompt_logprobs[number] = list(self._score(row, begin))
            if row.num_computed_tokens == len(row.token_ids):
                drawn = self._verify(row, step.drafts.get(number, b""))
                if number in step.drafts:
                    output.num_drawn[number] = len(drawn)
                sampled.extend(drawn)
                if row.start.sampling.logprobs is not None:
                    output.logprobs[number] = [TokenLogprobs([token_id], [-1.0], 1) for token_id in drawn]
                num_drawn += 1 + len(step.drafts.get(number, b"")) // 4
        self.most_drawn = max(self.most_drawn, num_drawn)
        output.token_ids = sampled.tobytes()
        return output

    def _verify(self, row: ToyRow, draft: bytes) -> list[int]:
        """What is drawn at the end and, up to the first token that is another, at the places of a draft.

        What is drawn stands in the row wherever it was drawn, until the row is told how many tokens it has.
        """
        drafted, read = array("i", draft), self._read(row)
        known = len(read) - len(drafted)
        drawn = [self._draw(read[: known + place]) for place in range(1 + len(drafted))]
        row.token_ids[known:] = drawn
        wrong = [place for place, token_id in enumerate(drafted) if drawn[place] != token_id]
        return drawn[: 1 + wrong[0]] if wrong else drawn

    def _score(self, row: ToyRow, begin: int) -> Iterator[TokenLogprobs]:
        """A log-probability is the position's own number here, negated."""
        for position in range(begin + 1, min(row.num_computed_tokens + 1, row.start.num_prompt_tokens)):
            yield TokenLogprobs([row.token_ids[position]], [-float(position)], 1)

    def _read(self, row: ToyRow) -> list[int]:
        token_ids = [self._cache[self._slot(row, position)] for position in range(row.num_computed_tokens)]
        assert None not in token_ids, "a slot was read that nobody has written"
        return [token_id for token_id in token_ids if token_id is not None]

    def _slot(self, row: ToyRow, position: int) -> int:
        return row.block_ids[position // self._block_size] * self._block_size + position % self._block_size
