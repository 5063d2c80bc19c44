"""The sampling parameters of the running requests, indexed by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from math import inf, log

import numpy as np
import torch
from torch import Tensor

from eagleray.workers.arrays import IntArray
from eagleray.workers.pinned_copy import to_device
from eagleray.workers.protocol.messages import GREEDY_BELOW, Sampling
from eagleray.workers.sampling.bad_words import BadWords
from eagleray.workers.sampling.gumbel import mixed_seed

NO_TOP_K = (1 << 31) - 1  # more than any vocabulary holds


class Feature(IntFlag):
    """What a row asks for beyond the arg-max of its logits. A feature that no row of a batch asks for is free."""

    RANDOM = 1
    RESTRICTED = 2  # top-k or top-p; only beside RANDOM
    MIN_P = 4  # only beside RANDOM
    ALLOWED = 8
    MIN_TOKENS = 16
    BIAS = 32
    PENALTIES = 64
    LOGPROBS = 128
    BAD_WORDS = 256
    TOP_N_SIGMA = 512  # only beside RANDOM


PLAIN = Feature.RANDOM  # a row that asks for nothing else has its token drawn by a kernel, where there is one


@dataclass(frozen=True, slots=True)
class SparseEdits:
    """The part of a row's token lists that falls into this rank's shard, as columns of the shard."""

    allowed: Tensor  # [a] int64
    stop: Tensor  # [s] int64
    bias_columns: Tensor  # [b] int64
    bias: Tensor  # [b] float32


class SamplingTable:
    """One line per row in device tensors [max_rows], and on the host what is only looked at by row.

    A row may be set again without being cleared. Values are not checked here: `SamplingParams` did.
    """

    def __init__(self, max_rows: int, vocab_shard: range, device: torch.device) -> None:
        self.vocab_shard = vocab_shard
        self.device = device
        self.features: IntArray = np.zeros(max_rows, dtype=np.int64)  # of `Feature`; on the host
        self.host: dict[int, Sampling] = {}
        self.sparse: dict[int, SparseEdits] = {}
        self.bad_words: dict[int, BadWords] = {}
        # One line more, for the spare row that pads batches of decodes: it is greedy.
        self.seeds = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)  # mixed
        self.temperatures = torch.zeros(max_rows + 1, device=device)  # 0 where the row is greedy
        self.log_min_p = torch.full((max_rows,), -inf, device=device)
        self.top_k = torch.full((max_rows,), NO_TOP_K, dtype=torch.int64, device=device)
        self.top_p = torch.full((max_rows,), inf, dtype=torch.float64, device=device)
        self.top_n_sigma = torch.zeros(max_rows, dtype=torch.float64, device=device)
        self.repetition = torch.ones(max_rows, device=device)
        self.frequency = torch.zeros(max_rows, device=device)
        self.presence = torch.zeros(max_rows, device=device)

    def set(self, samplings: Mapping[int, Sampling]) -> None:
        """Requests enter rows. The host does not wait for the device, as it would if it set one number at a time."""
        if not samplings:
            return
        for row, sampling in samplings.items():
            self.clear(row)
            self.features[row] = features = features_of(sampling)
            self.host[row] = sampling
            if features & (Feature.ALLOWED | Feature.MIN_TOKENS | Feature.BIAS):
                self.sparse[row] = self._sparse_edits(sampling)
            if features & Feature.BAD_WORDS:
                self.bad_words[row] = BadWords.of(sampling.bad_words, self.vocab_shard, self.device)
        integers = [(row, mixed_seed(s.seed), s.top_k if s.top_k > 0 else NO_TOP_K) for row, s in samplings.items()]
        rows, seeds, top_k = to_device(torch.tensor(integers, dtype=torch.int64).t().contiguous(), self.device)
        self.seeds[rows], self.top_k[rows] = seeds, top_k
        reals = torch.tensor([_reals(sampling) for sampling in samplings.values()], dtype=torch.float64)
        columns = (
            self.temperatures,
            self.log_min_p,
            self.top_p,
            self.top_n_sigma,
            self.repetition,
            self.frequency,
            self.presence,
        )
        for column, values in zip(columns, to_device(reals.t().contiguous(), self.device), strict=True):
            column[rows] = values.to(column.dtype)

    def lines_not_plain(self, rows: IntArray) -> IntArray:
        """The places of those `rows` [n] that ask for more than a kernel that draws `PLAIN` ones gives."""
        return self.lines(rows, ~PLAIN)

    def lines(self, rows: IntArray, features: int) -> IntArray:
        """The places of those `rows` [n] that ask for any of `features`."""
        return np.flatnonzero(self.features[rows] & int(features))

    def clear(self, row: int) -> None:
        """The request leaves `row`. What the device tensors hold there is not read until the row is set again."""
        self.features[row] = 0
        self.host.pop(row, None)
        self.sparse.pop(row, None)
        self.bad_words.pop(row, None)

    def _sparse_edits(self, sampling: Sampling) -> SparseEdits:
        shard = self.vocab_shard
        bias = {token_id - shard.start: value for token_id, value in sampling.logit_bias.items() if token_id in shard}
        return SparseEdits(
            allowed=self._columns(sampling.allowed_token_ids),
            stop=self._columns(sampling.stop_token_ids),
            bias_columns=to_device(torch.tensor(list(bias.keys()), dtype=torch.int64), self.device),
            bias=to_device(torch.tensor(list(bias.values()), dtype=torch.float32), self.device),
        )

    def _columns(self, token_ids: list[int]) -> Tensor:
        shard = self.vocab_shard
        columns = [token_id - shard.start for token_id in token_ids if token_id in shard]
        return to_device(torch.tensor(columns, dtype=torch.int64), self.device)


def _reals(sampling: Sampling) -> tuple[float, ...]:
    """Temperature (0 if greedy), log of min-p, top-p, top-n-sigma; repetition, frequency and presence penalties."""
    return (
        sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0,
        log(sampling.min_p) if sampling.min_p > 0 else -inf,
        sampling.top_p if sampling.top_p < 1 else inf,
        sampling.top_n_sigma,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )


def features_of(sampling: Sampling) -> Feature:
    """The features that `sampling` asks for."""
    is_random = sampling.temperature >= GREEDY_BELOW
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    asked = {
        Feature.RANDOM: is_random,
        Feature.RESTRICTED: is_random and (sampling.top_k > 0 or sampling.top_p < 1),
        Feature.MIN_P: is_random and sampling.min_p > 0,
        Feature.TOP_N_SIGMA: is_random and sampling.top_n_sigma > 0,
        Feature.ALLOWED: bool(sampling.allowed_token_ids),
        Feature.MIN_TOKENS: sampling.min_tokens > 0 and bool(sampling.stop_token_ids),
        Feature.BIAS: bool(sampling.logit_bias),
        Feature.PENALTIES: penalties != (1.0, 0.0, 0.0),
        Feature.LOGPROBS: sampling.logprobs is not None,
        Feature.BAD_WORDS: bool(sampling.bad_words),
    }
    return Feature(sum(feature for feature, is_asked in asked.items() if is_asked))
