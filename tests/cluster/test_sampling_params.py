"""What a user may ask, and the words with which the rest is refused."""

import dataclasses
from typing import Any

import pytest

from eagleray.cluster.options import Option, options
from eagleray.cluster.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")
NUMBERS = {name: each for name, each in options(SamplingParams).items() if each.bounds is not None}


def beyond(each: Option) -> list[Any]:
    """Of a number: values outside of its bounds, and of no number."""
    low, high = each.bounds or (0, 0)
    others = [NAN, INF, True, str(low), [low]] + [None] * (not each.optional)
    return [low - 1, 2 * high + 1, *others] + [1.5] * (each.kind == "int")


@pytest.mark.parametrize(
    ("field", "values"),
    {name: beyond(each) for name, each in NUMBERS.items()}.items(),
)
def test_a_number_beyond_its_bounds_is_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} is ") as refusal:
            SamplingParams(**{field: value})
        assert str(refusal.value).startswith(f"{field} is {value!r}; give ")


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [0, -1, 5000, 1.0, True, "2", None],
        "temperature": [-0.1, 1e39, NAN, INF, True, "hot", None],
        "top_p": [0, 0.0, 1.1, -1, NAN, None],
        "top_k": [-2, 2**31, 2**70, 1.5, True, INF, None],
        "min_p": [-0.1, 1.1, NAN, None],
        "seed": [-(2**63) - 1, 2**64, 1.0, False, "x"],
        "presence_penalty": [-2.1, 2.1, NAN, INF],
        "frequency_penalty": [-2.1, 2.1, NAN, INF],
        "repetition_penalty": [0, -1, 1e39, NAN, INF],
        "logit_bias": [{1: NAN}, {1: 101}, {1: -100.5}, {"1": 1.0}, {-1: 1.0}, [1], {True: 1.0}],
        "allowed_token_ids": [[], [-1], [1.0], ["1"], 1, [True]],
        "max_tokens": [0, -1, 2**40, 1.5, True, INF],
        "min_tokens": [-1, 17, 1.5, None],
        "stop": ["", ["a", ""], 1, [1], {"a": 1}],
        "stop_token_ids": [[-1], [1.0], 1, "2"],
        "ignore_eos": [1, None, "yes"],
        "include_stop_str_in_output": [1, None],
        "skip_special_tokens": [0, None],
        "logprobs": [-1, 21, True, 1.0],
        "prompt_logprobs": [-1, 21, True, 1.0],
        "detokenize": [0, None],
        "bad_words": [[""], ["a", ""], 5, [5], "a", {"a": 1}],
        "truncate_prompt_tokens": [0, -2, 1.5, True, 2**40],
    }.items(),
)
def test_a_bad_value_is_refused_by_name_and_value(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} ") as refusal:
            SamplingParams(**{field: value})
        if not isinstance(value, list | dict):
            assert str(refusal.value).startswith(f"{field} is {value!r}")


def test_every_field_has_bad_values_above() -> None:
    marks = test_a_bad_value_is_refused_by_name_and_value.pytestmark
    tested = {name for name, _ in marks[0].args[1]}
    assert tested | NUMBERS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 1, "seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1e-3},
        {"logit_bias": {0: -100, 5: 100.0}, "allowed_token_ids": (1, 2), "stop_token_ids": []},
        {"max_tokens": None, "min_tokens": 10_000, "stop": ("a", "b"), "logprobs": 0, "prompt_logprobs": 20},
        {"n": 3, "temperature": 1e-5},
    ],
)
def test_the_limits_themselves_are_allowed(params: dict[str, Any]) -> None:
    SamplingParams(**params)


def test_greedy_sequences_are_all_equal() -> None:
    assert [SamplingParams(n=5, temperature=temperature).num_distinct for temperature in (0, 0.5)] == [1, 5]


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="stop is 'x' with detokenize False"):
        SamplingParams(stop="x", detokenize=False)


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="ab").stop_strings == ["ab"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert SamplingParams().stop_strings == []


def test_what_the_caller_changes_later_has_no_effect() -> None:
    stop, ids, bias = ["a"], [1], {1: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias)
    stop.append("")
    ids.append(-1)
    bias[2] = NAN
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (["a"], [1], [1])
    assert params.logit_bias == {1: 1.0}
