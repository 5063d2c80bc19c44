"""What is said of an option once, and what is made of it."""

import pickle
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import pytest

from eagleray.cluster.frontend.inputs import ModelLimits, sampling_of
from eagleray.cluster.options import OptionError, check, described, option, options
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.workers.protocol.messages import Sampling


@dataclass(frozen=True, kw_only=True)
class Sea:
    name: str = field(metadata=described("what it is called"))
    depth: float = option(10.0, "in metres", (0, 100), excluded=0, note="10 is shallow")
    rays: int | None = option(None, "in it", (0, 2**31 - 1), none="to count them")
    water: str = option("salt", "of its water", choices=("salt", "fresh"))
    islands: list[str] | None = option(None, "its islands", min_length=1)
    secret: int = 5  # no option


def test_a_field_keeps_its_default_and_says_the_rest() -> None:
    assert Sea(name="Red") == Sea(name="Red", depth=10.0, rays=None, water="salt", islands=None)
    assert list(options(Sea)) == ["name", "depth", "rays", "water", "islands"]
    assert {name: (each.required, each.optional, each.kind, each.values()) for name, each in options(Sea).items()} == {
        "name": (True, False, "str", "a text"),
        "depth": (False, False, "float", "a number above 0, up to 100"),
        "rays": (False, True, "int", "a whole number from 0 to 2**31 - 1, or None to count them"),
        "water": (False, False, "str", "salt, fresh"),
        "islands": (False, True, "list[str]", "a list of strings, or None"),
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": 5}, "name is 5; give a text"),
        ({"depth": 0}, "depth is 0; give a number above 0, up to 100; 10 is shallow"),
        ({"depth": 100.1}, "depth is 100.1; "),
        ({"depth": float("nan")}, "depth is nan; "),
        ({"depth": True}, "depth is True; "),
        ({"rays": 2.0}, "rays is 2.0; give a whole number from 0 to 2**31 - 1, or None to count them"),
        ({"rays": -1}, "rays is -1; "),
        ({"water": "sweet"}, "water is 'sweet'; choose one of salt, fresh"),
        ({"islands": []}, "islands is []; "),
        ({"islands": "Socotra"}, "islands is 'Socotra'; give a list of strings, or None"),
    ],
)
def test_a_value_that_it_does_not_take_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        check(Sea(**{"name": "Red"} | given))
    assert str(refusal.value).startswith(words)


def test_a_refusal_can_be_put_in_the_words_of_its_reader() -> None:
    with pytest.raises(OptionError) as refusal:
        check(Sea(name="Red", rays=-1))
    assert refusal.value.words("null") == "rays is -1; give a whole number from 0 to 2**31 - 1, or null to count them"
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


def test_limits_themselves_are_taken() -> None:
    check(Sea(name="", depth=100, rays=2**31 - 1, water="fresh", islands=["Socotra"]))


def test_ranks_are_told_whatever_has_the_same_name_and_type() -> None:
    """With the defaults on both sides the same, so that only what was asked for travels."""
    told, asked = get_type_hints(Sampling), options(SamplingParams)
    same = [name for name in told if name in asked and asked[name].hint == told[name]]
    assert {"temperature", "top_k", "min_p", "min_tokens", "logprobs"} <= set(same)
    limits = ModelLimits(max_model_len=10, vocab_size=10, eos_token_ids=frozenset())
    sampling = sampling_of(SamplingParams(), limits, [])
    assert sampling == Sampling()
    for name in same:
        each = asked[name]
        assert each.bounds is not None
        value: Any = each.bounds[1] if name != "min_tokens" else 3
        sampling = sampling_of(SamplingParams(**{name: value}), limits, [])
        assert getattr(sampling, name) == value
        greedy = sampling_of(SamplingParams(**{name: value} | {"temperature": 0}), limits, [])
        if each.random or name == "temperature":
            assert greedy == Sampling(temperature=0.0)
        else:
            assert getattr(greedy, name) == value
