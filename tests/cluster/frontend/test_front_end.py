"""The front end's bookkeeping: what the engine is sent for a prompt, and what its news become for the caller."""

import pickle
import re
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.cluster.core.messages import EngineOutputs, EngineRequest, EngineStats, Tokens
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.prompts import Prompt
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import Logprob, RequestOutputKind
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.workers.protocol.messages import TokenLogprobs

EOS = 2
VOCAB_SIZE = 49_152
A, B, C, D, E = range(81, 86)  # the tokens of "a" to "e"


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(demo_model_dir)


@pytest.fixture
def front_end(tokenizer: Tokenizer) -> FrontEnd:
    return make_front_end(tokenizer)


def make_front_end(tokenizer: Tokenizer | None, *, seed: int | None = 0) -> FrontEnd:
    limits = ModelLimits(max_model_len=64, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS, 0}))
    return FrontEnd(tokenizer, limits, seed)


def add(
    front_end: FrontEnd,
    prompt: Prompt = "Hello",
    kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    **params: Any,
) -> tuple[RequestState, list[EngineRequest]]:
    generation = front_end.make_request(prompt, SamplingParams(**params), output_kind=kind)
    return generation, [front_end.add(generation)]


def tell(front_end: FrontEnd, *news: Tokens) -> tuple[list[RequestState], list[int]]:
    return front_end.process(EngineOutputs(list(news), EngineStats()))


@pytest.mark.parametrize("priority", ["high", 1.5, None, True, 2**40])
def test_a_priority_that_is_no_whole_number_is_refused(front_end: FrontEnd, priority: Any) -> None:
    with pytest.raises(ValueError, match="priority is "):
        front_end.make_request("Hello", SamplingParams(), priority=priority)
    front_end.make_request("Hello", SamplingParams(), priority=-3)


@pytest.mark.parametrize("value", [5, 0, b"", False, [], 1.5])
@pytest.mark.parametrize("name", ["request_id", "group", "tenant"])
def test_a_name_that_is_no_text_is_refused(front_end: FrontEnd, name: str, value: Any) -> None:
    names: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; give text")):
        front_end.make_request("Hello", SamplingParams(), **names)


def test_a_name_that_cannot_be_sent_is_refused(front_end: FrontEnd) -> None:
    for name in ("request_id", "group", "tenant"):
        names: dict[str, Any] = {name: "a\udcff"}
        with pytest.raises(ValueError, match=rf"^{name} holds .* at position 1, which is not a character"):
            front_end.make_request("Hello", SamplingParams(), **names)
    with pytest.raises(ValueError, match=r"^directory holds"):
        front_end.start_profile("/tmp/\udcff")


def test_ids_that_are_no_list_are_refused(front_end: FrontEnd) -> None:
    for wrong in (5, "abc", b"abc", {5}):
        prompt: Any = {"prompt_token_ids": wrong}
        with pytest.raises(ValueError, match=r"^prompt_token_ids is .*; give a list of token ids$"):
            front_end.make_request(prompt, SamplingParams())


def test_what_prompts_of_a_group_share_is_made_once(front_end: FrontEnd) -> None:
    params = SamplingParams(stop=["x" * 200], bad_words=["Paris"], logit_bias={5: 1.0}, temperature=0)
    first, second, other = (front_end.make_request(text, params, group=group) for text, group in ("ag", "bg", "ch"))
    assert first.request.sampling is second.request.sampling
    assert first.request.sampling is not other.request.sampling
    assert first.request.sampling == other.request.sampling


def test_a_list_that_was_changed_meanwhile_counts_for_the_next_group(front_end: FrontEnd) -> None:
    params = SamplingParams(logit_bias={5: 1.0})
    assert front_end.make_request("a", params).request.sampling.logit_bias == {5: 1.0}
    assert params.logit_bias is not None
    params.logit_bias[6] = 2.0
    assert front_end.make_request("a", params).request.sampling.logit_bias == {5: 1.0, 6: 2.0}


def test_a_prompt_is_text_ids_or_a_dict(front_end: FrontEnd, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")
    prompts: list[Prompt] = ["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}]
    for prompt in prompts:
        generation, (request,) = add(front_end, prompt)
        assert list(array("i", request.prompt_token_ids)) == generation.prompt_token_ids == ids
        assert generation.prompt == ("Hello" if "Hello" in str(prompt) else None)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty; give it some text"),
        ([], {}, "the prompt is empty; give it at least one token"),
        ({"prompt_token_ids": []}, {}, "the prompt is empty"),
        ("\ud800 x", {}, "not a character; give UTF-8 text"),
        (b"abc", {}, "the prompt is b'abc'; give text or"),
        ({"prompt_token_ids": None}, {}, "give text or"),
        ({"text": "x"}, {}, "the prompt is {'text': 'x'}; give text or a list of token ids"),
        (5, {}, "the prompt is 5; give text or"),
        ([1, "x"], {}, "the prompt holds 'x'; give token ids from 0 to 49151"),
        ([1, 2**40], {}, "the prompt holds 1099511627776; give token ids"),
        ([1, VOCAB_SIZE], {}, "the prompt holds the token id 49152, but the model's vocabulary ends at 49151"),
        ([-1, 5], {}, "the prompt holds the token id -1"),
        (
            [5] * 64,
            {},
            "the prompt has 64 tokens, but the model holds 64 with at least one generated; shorten the prompt by 1",
        ),
        (
            [5] * 60,
            {"max_tokens": 5},
            "the prompt has 60 tokens and max_tokens asks for 5 more, but the model holds 64; "
            "shorten the prompt or lower max_tokens to 4",
        ),
        ([5] * 60, {"max_tokens": None, "min_tokens": 5}, "lower min_tokens to 4"),
        ([5], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids holds the token id 49152"),
        ([5], {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids holds the token id 49152"),
        ([5], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias holds the token id 49152"),
        ([5], {"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids are all among stop tokens before"),
        ([5], {"allowed_token_ids": [A], "bad_words": ["a"]}, "allowed_token_ids are all among bad_words, so that"),
        ([5], {"allowed_token_ids": [A, EOS], "bad_words": ["a"], "min_tokens": 1}, "among bad_words or stop tokens"),
        (
            [5],
            {"stop_token_ids": list(range(VOCAB_SIZE)), "min_tokens": 2},
            "every token of the vocabulary is among stop tokens before min_tokens 2, so that nothing could be drawn",
        ),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    front_end: FrontEnd, prompt: Any, params: dict[str, Any], message: str
) -> None:
    other, (request,) = add(front_end)
    with pytest.raises(ValueError, match=re.escape(message)):
        add(front_end, prompt, **params)
    assert front_end.num_running == 1
    tell(front_end, Tokens(request.id, [5], "length"))
    assert other.finished


def test_max_tokens_none_fills_the_model(front_end: FrontEnd) -> None:
    assert add(front_end, [5] * 60, max_tokens=None)[1][0].max_tokens == 4
    assert add(front_end, [5] * 60, max_tokens=4)[1][0].max_tokens == 4


def test_stop_tokens_hold_the_end_of_sequence_unless_it_is_ignored(front_end: FrontEnd) -> None:
    assert add(front_end, stop_token_ids=[7, 2])[1][0].sampling.stop_token_ids == [0, 2, 7]
    assert add(front_end, stop_token_ids=[7], ignore_eos=True)[1][0].sampling.stop_token_ids == [7]


def test_what_chance_needs_is_sent_only_where_it_decides(front_end: FrontEnd) -> None:
    warm = add(front_end, temperature=0.5, top_k=-1, top_p=0.5, min_p=0.1, seed=9)[1][0].sampling
    assert (warm.temperature, warm.top_k, warm.top_p, warm.min_p, warm.seed) == (0.5, 0, 0.5, 0.1, 9)
    cold = add(front_end, temperature=1e-6, top_k=5, top_p=0.5, min_p=0.1, seed=9)[1][0].sampling
    assert (cold.temperature, cold.top_k, cold.top_p, cold.min_p, cold.seed) == (0, 0, 1, 0, 0)


def test_seeds_differ_between_requests_and_repeat_between_runs(tokenizer: Tokenizer) -> None:
    def seeds(engine_seed: int | None) -> list[int]:
        front_end = make_front_end(tokenizer, seed=engine_seed)
        return [seed for _ in range(50) for request in add(front_end, n=2)[1] for seed in seeds_of(request)]

    assert seeds(0) == seeds(0)
    assert len(set(seeds(0) + seeds(1))) == 200
    assert all(0 <= seed < 2**64 for seed in seeds(0))


def test_front_ends_without_a_seed_never_draw_alike(tokenizer: Tokenizer) -> None:
    """Two replicas, or an engine that was restarted: their k-th requests are independent."""
    front_ends = [make_front_end(tokenizer, seed=None) for _ in range(4)]
    drawn = [seeds_of(add(front_end, n=2)[1][0]) for front_end in front_ends for _ in range(20)]
    assert len({seed for seeds in drawn for seed in seeds}) == 160


def seeds_of(request: EngineRequest) -> list[int]:
    return [request.sampling.seed, *request.seeds]


def test_neighbouring_seeds_share_no_draw_and_a_sequence_is_the_same_for_every_n(front_end: FrontEnd) -> None:
    by_seed = {seed: seeds_of(add(front_end, n=8, seed=seed)[1][0]) for seed in range(-50, 50)}
    assert len({each for seeds in by_seed.values() for each in seeds}) == 800
    assert by_seed[-2] == seeds_of(add(front_end, n=8, seed=2**64 - 2)[1][0])
    assert by_seed[7][:3] == seeds_of(add(front_end, n=3, seed=7)[1][0])
    assert by_seed[7][0] == 7


def test_ids_of_sequences_never_meet(front_end: FrontEnd) -> None:
    requests = [request for n in (3, 1, 2) for request in add(front_end, n=n)[1]]
    ids = [request.id + index for request in requests for index in range(1 + len(request.seeds))]
    assert len(set(ids)) == 6


def test_equal_sequences_run_once_and_are_told_n_times(front_end: FrontEnd, tokenizer: Tokenizer) -> None:
    generation, (request,) = add(front_end, n=3, temperature=0, logprobs=0)
    assert request.seeds == []
    tell(front_end, Tokens(request.id, [A], logprobs=[TokenLogprobs([A], [-1.0], 1)]))
    tell(front_end, Tokens(request.id, [B], "length", logprobs=[TokenLogprobs([B], [-2.0], 1)]))
    output = generation.output()
    assert output.finished
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2]
    assert [(sequence.text, sequence.cumulative_logprob) for sequence in output.outputs] == [("ab", -3.0)] * 3
    output.outputs[0].token_ids.append(9)  # each has lists of its own
    assert output.outputs[1].token_ids == [A, B]


def test_tokens_become_text_and_an_end(front_end: FrontEnd, tokenizer: Tokenizer) -> None:
    generation, (request,) = add(front_end)
    ids = tokenizer.encode(" to 日本")
    for token_id in ids:
        changed, aborts = tell(front_end, Tokens(request.id, [token_id], num_cached_tokens=3))
        assert (changed, aborts) == ([generation], [])
        assert not generation.finished
    tell(front_end, Tokens(request.id, [EOS], "stop"))
    output = generation.output()
    assert (output.prompt, output.finished, output.num_cached_tokens) == ("Hello", True, 3)
    (completion,) = output.outputs
    assert (completion.text, completion.token_ids) == (" to 日本", [*ids, EOS])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert (completion.logprobs, completion.cumulative_logprob, output.prompt_logprobs) == (None, None, None)
    metrics = output.metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert front_end.num_running == 0


@pytest.mark.parametrize(
    ("params", "last", "stop_reason", "text"),
    [
        ({}, EOS, None, "ab"),
        ({}, 0, None, "ab"),
        ({"stop_token_ids": [EOS]}, EOS, None, "ab"),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, EOS, "ab"),
        ({"stop_token_ids": [C]}, C, C, "ab"),
        ({"stop_token_ids": [C], "include_stop_str_in_output": True}, C, C, "abc"),
        ({"include_stop_str_in_output": True}, EOS, None, "ab"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, EOS, None, "ab<|im_end|>"),
    ],
)
def test_a_stop_token_is_told_but_not_shown(
    front_end: FrontEnd, tokenizer: Tokenizer, params: dict[str, Any], last: int, stop_reason: int | None, text: str
) -> None:
    assert tokenizer.decode([A, B, C]) == "abc"
    generation, (request,) = add(front_end, **params)
    tell(front_end, Tokens(request.id, [A, B, last], "stop"))
    (completion,) = generation.output().outputs
    assert completion.token_ids == [A, B, last]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", stop_reason)


def test_a_stop_string_ends_here_and_is_aborted_there(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, stop=["bc"])
    assert tell(front_end, Tokens(request.id, [A, B]))[1] == []
    assert generation.output().outputs[0].text == "a"
    changed, aborts = tell(front_end, Tokens(request.id, [C, D]))
    assert (changed, aborts) == ([generation], [request.id])
    assert tell(front_end, Tokens(request.id, [E]), Tokens(request.id, [], "abort")) == ([], [])
    (completion,) = generation.output().outputs
    assert (completion.text, completion.token_ids) == ("a", [A, B, C])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "bc")


def test_a_stop_string_in_the_last_token_needs_no_abort(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, stop=["bc"])
    assert tell(front_end, Tokens(request.id, [A, B, C], "length"))[1] == []
    assert generation.output().outputs[0].stop_reason == "bc"


def test_a_stop_string_counts_from_min_tokens_on(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, stop=["ab"], min_tokens=2)
    tell(front_end, Tokens(request.id, [A, B]))
    assert not generation.finished
    tell(front_end, Tokens(request.id, [A, B]))
    assert generation.output().outputs[0].text == "ab"
    assert generation.finished


def test_half_a_character_is_shown_only_at_the_end(front_end: FrontEnd, tokenizer: Tokenizer) -> None:
    generation, (request,) = add(front_end)
    half = tokenizer.encode("日")[:1]
    tell(front_end, Tokens(request.id, half))
    assert generation.output().outputs[0].text == ""
    tell(front_end, Tokens(request.id, [], "length"))
    assert generation.output().outputs[0].text == tokenizer.decode(half) == "\ufffd"


def test_a_request_of_several_sequences_ends_with_the_last(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, n=3, stop=["b"])
    first, second, third = range(request.id, request.id + 3)
    changed, aborts = tell(front_end, Tokens(first, [A]), Tokens(second, [B]), Tokens(third, [C]))
    assert (changed, aborts) == ([generation], [second])
    tell(front_end, Tokens(first, [D], "length"))
    assert not generation.finished
    tell(front_end, Tokens(third, [], "error", error="rank 1 fell over"))
    output = generation.output()
    assert output.finished
    assert [(o.index, o.text, o.finish_reason, o.error) for o in output.outputs] == [
        (0, "ad", "length", None),
        (1, "", "stop", None),
        (2, "c", "error", "rank 1 fell over"),
    ]


def test_logprobs_carry_ranks_and_text(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, [A, B, C], logprobs=2, prompt_logprobs=1)
    tell(
        front_end,
        Tokens(
            request.id,
            [D],
            logprobs=[TokenLogprobs([D, A, B], [-3.0, -0.5, -1.0], rank=9)],
            prompt_logprobs=[TokenLogprobs([B, B], [-0.25, -0.25], rank=1)],
        ),
    )
    news = Tokens(request.id, [EOS], "stop", logprobs=[TokenLogprobs([EOS, EOS, 5], [-0.5, -0.5, -2.0], rank=1)])
    news.prompt_logprobs = [TokenLogprobs([C, A], [-1.5, -0.75], rank=4)]
    tell(front_end, news)
    output = generation.output()
    (completion,) = output.outputs
    assert completion.cumulative_logprob == -3.5
    assert completion.logprobs == [
        {D: Logprob(-3.0, 9, "d"), A: Logprob(-0.5, 1, "a"), B: Logprob(-1.0, 2, "b")},
        {EOS: Logprob(-0.5, 1, "<|im_end|>"), 5: Logprob(-2.0, 2, "<file_sep>")},
    ]
    assert output.prompt_logprobs == [
        None,
        {B: Logprob(-0.25, 1, "b")},
        {C: Logprob(-1.5, 4, "c"), A: Logprob(-0.75, 1, "a")},
    ]


def test_an_aborted_request_keeps_what_it_had(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, n=2)
    first, second = request.id, request.id + 1
    tell(front_end, Tokens(first, [A], "length"), Tokens(second, [B]))
    assert front_end.running(generation.request_id) is generation
    assert front_end.abort(generation) == [second]
    assert front_end.abort(generation) == []
    assert front_end.running(generation.request_id) is None
    assert [(o.text, o.finish_reason) for o in generation.output().outputs] == [("a", "length"), ("b", "abort")]
    assert tell(front_end, Tokens(second, [C])) == ([], [])


def test_an_output_is_a_snapshot(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end)
    tell(front_end, Tokens(request.id, [A]))
    before = generation.output()
    tell(front_end, Tokens(request.id, [B]))
    assert (before.outputs[0].token_ids, before.outputs[0].text) == ([A], "a")


def test_a_running_requests_id_cannot_be_taken_twice(front_end: FrontEnd) -> None:
    first = front_end.make_request("Hello", SamplingParams(), "mine")
    front_end.add(first)
    with pytest.raises(ValueError, match="request_id 'mine' is that of a running request"):
        front_end.add(front_end.make_request("Hello", SamplingParams(), "mine"))
    front_end.abort(first)
    second = front_end.make_request("Hello", SamplingParams(), "mine")
    front_end.add(second)
    assert front_end.abort(first) == []
    assert front_end.running("mine") is second


def test_without_a_tokenizer_there_are_ids_alone() -> None:
    front_end = make_front_end(None)
    with pytest.raises(ValueError, match="the prompt is text, 'Hello', but there is no tokenizer"):
        add(front_end, "Hello")
    with pytest.raises(ValueError, match="but there is no tokenizer to make text; use stop_token_ids"):
        add(front_end, [5], stop="x")
    generation, (request,) = add(front_end, [5], logprobs=0)
    tell(front_end, Tokens(request.id, [A, 7], "stop", logprobs=[TokenLogprobs([i], [-1.0], 1) for i in (A, 7)]))
    (completion,) = generation.output().outputs
    assert (completion.text, completion.token_ids, completion.stop_reason) == ("", [A, 7], 7)
    assert completion.logprobs == [{A: Logprob(-1.0, 1, None)}, {7: Logprob(-1.0, 1, None)}]


def test_text_can_be_left_out(front_end: FrontEnd) -> None:
    generation, (request,) = add(front_end, detokenize=False)
    tell(front_end, Tokens(request.id, [A], "length"))
    assert (generation.output().outputs[0].text, generation.output().outputs[0].token_ids) == ("", [A])


@given(tokens=st.lists(st.tuples(st.integers(0, 1), st.lists(st.sampled_from([A, B, C, 180, 255]), max_size=3))))
def test_deltas_add_up_to_what_cumulative_outputs_say(
    tokenizer: Tokenizer, tokens: list[tuple[int, list[int]]]
) -> None:
    """Of two sequences, with news of one or both between two outputs."""
    wanted: dict[str, Any] = {"n": 2, "logprobs": 0, "stop": ["cab", "aa"], "max_tokens": 60}
    cumulative, delta = make_front_end(tokenizer), make_front_end(tokenizer)
    whole, requests = add(cumulative, **wanted)
    parts, _ = add(delta, kind=RequestOutputKind.DELTA, **wanted)
    text, ids, logprobs = ["", ""], [list[int](), list[int]()], [list[Any](), list[Any]()]
    for index, token_ids in [*tokens, (0, [A]), (1, [B])]:
        news = Tokens(
            requests[0].id + index, token_ids, logprobs=[TokenLogprobs([token], [-0.5], 1) for token in token_ids]
        )
        for front_end in (cumulative, delta):
            tell(front_end, news)
        for output in parts.output().outputs:
            assert output.logprobs is not None
            text[output.index] += output.text
            ids[output.index] += output.token_ids
            logprobs[output.index] += output.logprobs
        expected = whole.output().outputs
        assert text == [output.text for output in expected]
        assert ids == [output.token_ids for output in expected]
        assert logprobs == [output.logprobs for output in expected]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_outputs_can_be_pickled(front_end: FrontEnd, kind: RequestOutputKind) -> None:
    """For other processes: with what nobody has read yet, and without the request behind it."""
    generation, (request,) = add(front_end, kind=kind, logprobs=1)
    entry = TokenLogprobs([A, B], [-0.5, -0.6], 1)
    tell(front_end, Tokens(request.id, [A, B], logprobs=[entry, entry], finish_reason="length"))
    output = generation.output()
    copied = pickle.loads(pickle.dumps(output))
    assert copied == output
    assert copied.outputs[0].logprobs == output.outputs[0].logprobs
    assert copied.outputs[0].text == "ab"


def test_an_output_copies_nothing_before_it_is_read(tokenizer: Tokenizer) -> None:
    limits = ModelLimits(max_model_len=40_000, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}))
    front_end = FrontEnd(tokenizer, limits)
    generation, (request,) = add(front_end, max_tokens=None)
    tell(front_end, Tokens(request.id, [A, B] * 16_000))
    tracemalloc.start()
    outputs = [generation.output() for _ in range(10)]
    assert tracemalloc.get_traced_memory()[1] < 50_000
    tracemalloc.stop()
    tell(front_end, Tokens(request.id, [C]))
    assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in outputs] == [("ab" * 16_000, [A, B] * 16_000)] * 10
