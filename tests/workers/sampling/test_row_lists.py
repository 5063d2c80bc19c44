"""What kernels are told of rows."""

import numpy as np
import pytest
import torch

from eagleray.workers.protocol.messages import MAX_LOGPROBS, Sampling
from eagleray.workers.sampling.redraw import row_lists
from eagleray.workers.sampling.redraw.row_lists import CAPACITY, NUM_FIELDS, RowLists, asks_for_redraw
from eagleray.workers.sampling.table import Feature

VOCAB = 70


def lists_of(*samplings: Sampling) -> RowLists:
    lists = RowLists(len(samplings), VOCAB, torch.device("cpu"))
    lists.set(dict(enumerate(samplings)), dict.fromkeys(range(len(samplings)), 3))
    return lists


def test_a_row_has_fields_lists_and_a_mask() -> None:
    sampling = Sampling(
        logit_bias={3: 1.0, 69: -2.0},
        stop_token_ids=[5],
        min_tokens=4,
        bad_words=[[7], [8, 9, 10]],
        allowed_token_ids=[0, 31, 32, 69],
        logprobs=2,
    )
    lists = lists_of(Sampling(), sampling)
    features = (
        Feature.RANDOM | Feature.ALLOWED | Feature.MIN_TOKENS | Feature.BIAS | Feature.LOGPROBS | Feature.BAD_WORDS
    )
    assert lists.fields.tolist()[1] == [features, 3, 4, 2, 2, 1, 2, 2]
    bits = np.array([1.0, -2.0], np.float32).view(np.int32).tolist()
    assert lists.lists[1, :11].tolist() == [3, 69, *bits, 5, 1, 4, 7, 8, 9, 10]
    words = lists.masks[1].numpy().view(np.uint32).tolist()
    assert [t for t in range(VOCAB) if words[t // 32] >> (t % 32) & 1] == [0, 31, 32, 69]


def test_what_no_vocabulary_has_is_left_out() -> None:
    sampling = Sampling(
        logit_bias={70: 1.0, 2: 1.0}, bad_words=[[1, 99], [99, 1]], allowed_token_ids=[70, 1], min_tokens=1,
        stop_token_ids=[71, 4],
    )  # fmt: skip
    lists = lists_of(sampling)
    assert lists.fields[0].tolist()[4:] == [1, 1, 1, 1]
    assert lists.lists[0, [0, 2, 3, 4, 5]].tolist() == [2, 4, 2, 99, 1]
    assert lists.masks[0].tolist() == [2, 0, 0]


def test_stop_tokens_without_a_minimum_take_no_room() -> None:
    assert lists_of(Sampling(stop_token_ids=list(range(VOCAB)))).fields[0].tolist() == [Feature.RANDOM, 3, *[0] * 6]


def test_rows_that_do_not_fit_are_known_and_left_alone() -> None:
    word = [[1] * (CAPACITY - 1)]
    longer = [[1] * CAPACITY]
    many = MAX_LOGPROBS + 1
    kinds = [Sampling(bad_words=word), Sampling(bad_words=longer), Sampling(logprobs=many), Sampling(logprobs=20)]
    lists = lists_of(*kinds)
    assert lists.beyond.tolist() == [False, True, True, False]
    assert (lists.fields[:, 0] != 0).tolist() == [True, False, False, True, False]  # the last is the spare row
    lists.set({1: Sampling()}, {1: 3})
    assert not lists.beyond[1]
    assert int(lists.fields[1, 0]) == Feature.RANDOM


def test_a_feature_that_kernels_do_not_know_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lists, "IN_KERNELS", ~Feature.BIAS)
    lists = lists_of(Sampling(logit_bias={1: 1.0}), Sampling(top_k=2))
    assert lists.beyond.tolist() == [True, False]


def test_a_row_is_as_its_last_request_says() -> None:
    lists = lists_of(Sampling(logit_bias={1: 1.0}, min_tokens=5, stop_token_ids=[2]), Sampling(top_k=2))
    lists.set({0: Sampling(temperature=0.0)}, {0: 9})
    assert lists.fields[0].tolist() == [0, 9, *[0] * (NUM_FIELDS - 2)]
    assert int(lists.fields[1, 0]) == Feature.RANDOM | Feature.RESTRICTED


def test_which_rows_are_drawn_anew() -> None:
    features = np.array([0, Feature.RANDOM, Feature.RANDOM | Feature.LOGPROBS, Feature.BIAS, Feature.RESTRICTED])
    assert asks_for_redraw(features).tolist() == [False, False, False, True, True]
