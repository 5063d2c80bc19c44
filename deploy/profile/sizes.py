"""Which batches `eagleray profile` can run: all requests decode side by side, and each fits the model to the end."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eagleray.cluster.config import MIXED_STEP_TOKENS, EngineConfig
from eagleray.cluster.core.kv_cache_manager import headroom
from eagleray.cluster.runtime.resolve import check_model
from eagleray.deploy.bench.arguments import PROFILED_SIZES

if TYPE_CHECKING:
    from eagleray.cluster.runtime.engine_info import EngineInfo

logger = logging.getLogger(__name__)

WARM_UP = 10  # decodes of all requests before the first one counts


@dataclass(frozen=True, kw_only=True)
class ProfileSizes:
    """What is asked for."""

    batch_sizes: Sequence[int] | None
    context_len: int
    num_steps: int

    def fitting(self, config: EngineConfig, engine: "EngineInfo | None" = None) -> list[int]:
        """The sizes to run; without an engine, those that would do if its KV cache were large enough.

        Raises `ValueError` for a size that was asked for and does not fit, and if not even the smallest of
        `PROFILED_SIZES` does.
        """
        fit: list[int] = []
        for size in self.batch_sizes or PROFILED_SIZES:
            try:
                self._check_length(config, size)
                if engine is not None:
                    self._check_room(config, engine, size)
            except ValueError as error:
                if self.batch_sizes or not fit:
                    raise
                if engine is not None:
                    logger.info("batch size %d is left out: %s", size, error)
            else:
                fit.append(size)
        return fit

    def _check_length(self, config: EngineConfig, batch_size: int) -> None:
        if batch_size > config.max_num_seqs:
            raise ValueError(
                f"--batch-size is {batch_size}, but --max-num-seqs lets {config.max_num_seqs} requests run at once; "
                "raise the second or lower the first"
            )
        of_model = check_model(config).max_position_embeddings
        limit = config.max_model_len or of_model
        if self.context_len >= limit:
            raise ValueError(f"--context-len is {self.context_len}, but the model holds {limit} tokens; lower it")
        if (most := self._most_tokens(config, batch_size)) > limit:
            way_out = f"raise --max-model-len to {most}" if most <= of_model else "raise --max-num-batched-tokens"
            raise ValueError(
                f"with --batch-size {batch_size}, --context-len {self.context_len} and --num-steps {self.num_steps} a "
                f"request may grow to {most} tokens before the profile ends, but the model holds {limit}; {way_out} or "
                "lower one of the three"
            )

    def _check_room(self, config: EngineConfig, engine: "EngineInfo", batch_size: int) -> None:
        """All requests must fit the KV cache together: else they would not all decode at once."""
        blocks_each = -(-self._most_tokens(config, batch_size) // engine.block_size)
        spare = headroom(engine.num_blocks)
        needed = batch_size * blocks_each + (spare if batch_size > 1 else 0)
        if needed > engine.num_blocks:
            most = max(1, (engine.num_blocks - spare) // blocks_each)
            raise ValueError(
                f"--batch-size {batch_size} with --context-len {self.context_len} needs {needed} KV blocks of "
                f"{engine.block_size} tokens, but there are {engine.num_blocks}; lower the first to {most} or the "
                "second, or raise --kv-cache-bytes"
            )

    def _most_tokens(self, config: EngineConfig, batch_size: int) -> int:
        """The most tokens that a request may have in the end: twice the decodes that are waited for, since steps go on
        while a profile starts and ends.
        """
        fill = fill_steps(
            batch_size,
            self.context_len,
            config.max_num_batched_tokens,
            config.max_chunk_tokens,
            config.mixed_step_tokens or MIXED_STEP_TOKENS,
        )
        return self.context_len + fill + 2 * (WARM_UP + 2 * self.num_steps)


def fill_steps(
    batch_size: int,
    context_len: int,
    max_step_tokens: int,
    max_chunk_tokens: int | None = None,
    mixed_step_tokens: int | None = None,
) -> int:
    """The most steps until every prompt has run; the first request decodes a token in nearly all of them.

    Prompts get what decodes leave of a step's budget, which is least where they run in order: side by side they end
    later, and fewer decode meanwhile. Of a mixed step they keep half. Only where chunks are short may a step leave
    some of it, and there are no more such steps than one prompt has chunks. `batch_size` is at most `max_step_tokens`.
    """
    mixed = mixed_step_tokens or max_step_tokens
    num_steps = num_tokens = 0
    while num_tokens < batch_size * context_len:
        decodes = num_tokens // context_len
        num_tokens += min(max_step_tokens - decodes, max(mixed - decodes, mixed // 2, 1))
        num_steps += 1
    return num_steps + -(-context_len // (max_chunk_tokens or max_step_tokens))
