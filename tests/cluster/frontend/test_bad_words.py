"""Bad words as tokens, and that none of them is generated."""

from pathlib import Path
from typing import Any

import pytest

from eagleray.cluster.frontend.bad_words import MAX_TABLE, bad_word_token_ids
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.sampling_params import MAX_BAD_CHARACTERS, MAX_BAD_WORDS, SamplingParams

LIMITS = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(demo_model_dir)


def texts(tokenizer: Tokenizer, words: list[str]) -> list[str]:
    return [tokenizer.decode(ids) for ids in bad_word_token_ids(words, tokenizer)]


def test_a_word_is_known_at_the_beginning_of_a_text_and_behind_a_space(tokenizer: Tokenizer) -> None:
    assert texts(tokenizer, ["Paris", " Paris"]) == ["Paris", " Paris"] * 2
    assert texts(tokenizer, ["New York"]) == ["New York", " New York"]
    assert texts(tokenizer, ["\n", " "]) == ["\n", " "]
    assert bad_word_token_ids(["Paris"], tokenizer) == [tokenizer.encode("Paris"), tokenizer.encode(" Paris")]


def test_they_are_sent_with_a_request(tokenizer: Tokenizer) -> None:
    front_end = FrontEnd(tokenizer, LIMITS)
    generation = front_end.make_request("Hello", SamplingParams(bad_words=["New York"], n=2))
    expected = [tokenizer.encode("New York"), tokenizer.encode(" New York")]
    assert front_end.add(generation).sampling.bad_words == expected
    assert front_end.add(front_end.make_request("Hello", SamplingParams(bad_words=[]))).sampling.bad_words == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("Paris", "give a list of strings"),
        ([5], "give a list of strings"),
        ([""], "holds an empty string"),
        (["a"] * (MAX_BAD_WORDS + 1), f"at most {MAX_BAD_WORDS}"),
        (["a" * (MAX_BAD_CHARACTERS + 1)], f"at most {MAX_BAD_CHARACTERS}"),
    ],
)
def test_what_cannot_be_forbidden_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(bad_words=wrong)
    assert str(caught.value).startswith("bad_words ")


def test_more_than_a_rank_should_compare_at_every_token_is_refused(tokenizer: Tokenizer) -> None:
    words = [*(f"w{index}" for index in range(500)), "🦅" * 200]
    with pytest.raises(ValueError, match=rf"bad_words .* at most {MAX_TABLE}"):
        FrontEnd(tokenizer, LIMITS).make_request("Hello", SamplingParams(bad_words=words))


def test_without_a_tokenizer_there_are_no_words() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        FrontEnd(None, LIMITS).make_request([5], SamplingParams(bad_words=["a"]))
