"""Every field that shapes the answer does so, on both endpoints and in streams, as it does in the engine itself."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.batch.replica import AppReplica
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.requests import ChatRequest, CompletionRequest
from support.http_client import create_streamed, created, ends, post, put_together, streamed
from support.http_server import Server, serving
from support.local_engine import LocalEngine
from support.tiny_model import END_ID

PROMPT = "To be, or not to be"
MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT_PROMPT = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"
BASE: dict[str, Any] = {"seed": 5, "max_tokens": 24, "ignore_eos": True}

SHAPING: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what a client sends, and what the engine is to be told
    ({"temperature": 0.0}, {"temperature": 0.0}),
    ({"temperature": 3.0}, {"temperature": 3.0}),
    ({"top_p": 0.3}, {"top_p": 0.3}),
    ({"top_k": 3}, {"top_k": 3}),
    ({"min_p": 0.5}, {"min_p": 0.5}),
    ({"seed": 6}, {"seed": 6}),
    ({"n": 3}, {"n": 3}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"presence_penalty": 2}, {"presence_penalty": 2}),
    ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    ({"repetition_penalty": 5.0}, {"repetition_penalty": 5.0}),
    ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100}}),
    ({"allowed_token_ids": [65, 66]}, {"allowed_token_ids": [65, 66]}),
    ({"stop_token_ids": [*range(128)]}, {"stop_token_ids": [*range(128)]}),
    (
        {"stop_token_ids": [*range(128)], "min_tokens": 20},
        {"stop_token_ids": [*range(128)], "min_tokens": 20},
    ),
    (
        {"stop_token_ids": [*range(33, 128)], "include_stop_str_in_output": True},
        {"stop_token_ids": [*range(33, 128)], "include_stop_str_in_output": True},
    ),
    ({"ignore_eos": False, "logit_bias": {str(END_ID): 6}}, {"ignore_eos": False, "logit_bias": {END_ID: 6}}),
    ({"ignore_eos": True, "logit_bias": {str(END_ID): 6}}, {"ignore_eos": True, "logit_bias": {END_ID: 6}}),
    (
        {"skip_special_tokens": False, "logit_bias": {str(END_ID): 6}},
        {"skip_special_tokens": False, "logit_bias": {END_ID: 6}},
    ),
]
SHAPING += [  # and what no case above has, by the example that is said of it
    ({name: each.example}, {name: each.example})
    for name, each in options(SamplingParams).items()
    if each.example is not None and not any(name in asked for asked, _ in SHAPING)
]
IDS = ["+".join(f"{name}={str(value)[:12]}" for name, value in asked.items()) for asked, _ in SHAPING]


HERE = Path(__file__).parent
TESTED = {  # fields whose effect is no other text
    "model": "test_answers.py: test_a_completion_is_the_engines",
    "prompt": "test_answers.py: test_prompts_are_texts_or_ids_or_lists_of_either",
    "messages": "test_answers.py: test_a_conversation_becomes_this_text",
    "add_generation_prompt": "test_answers.py: test_a_conversation_becomes_this_text",
    "continue_final_message": "test_answers.py: test_a_conversation_becomes_this_text",
    "chat_template_kwargs": "test_answers.py: test_a_conversation_becomes_this_text",
    "stream": "test_answers.py: test_streams_are_whole_with_the_async_client",
    "stream_options": "test_answers.py: test_usage_is_in_a_stream_only_if_asked_for",
    "echo": "test_answers.py: test_an_echo_comes_before_the_answer",
    "logprobs": "test_answers.py: test_logprobs_of_completions test_logprobs_of_chats",
    "top_logprobs": "test_answers.py: test_logprobs_of_chats",
    "add_special_tokens": "test_parameters.py: test_a_start_token_can_be_left_out",
    "stop": "test_parameters.py: test_stop_texts_end_an_answer_and_are_no_part_of_it",
    "max_completion_tokens": "test_parameters.py: test_both_names_of_the_limit_of_a_chat",
    "priority": "test_parameters.py: test_lower_priority_numbers_run_first",
    **dict.fromkeys(
        ("user", "safety_identifier", "session_id", "metadata"),
        "test_parameters.py: test_who_asks_is_logged_with_the_answers_id",
    ),
    **dict.fromkeys(
        ("store", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        "test_unsupported_fields.py: test_bookkeeping_changes_nothing",
    ),
    "request_id": "test_parameters.py: test_a_request_may_name_its_answer",
    "service_tier": "test_parameters.py: test_the_tier_is_told_if_asked_for",
    "return_token_ids": "test_extensions.py: test_token_ids_come_with_the_text",
    "return_tokens_as_token_ids": "test_extensions.py: test_tokens_can_be_told_as_ids",
    "prompt_logprobs": "test_extensions.py: test_prompts_have_log_probabilities",
    "truncate_prompt_tokens": "test_extensions.py: test_the_end_of_a_long_prompt_can_be_taken",
    "bad_words": "test_extensions.py: test_bad_words_are_not_in_an_answer",
    "best_of": "test_parameters.py: test_best_of_all_choices_are_all_choices",
    "reasoning_effort": "test_histories.py: test_efforts_are_variables_of_templates_that_have_them",
    "verbosity": "test_histories.py: test_efforts_are_variables_of_templates_that_have_them",
}


@pytest.mark.parametrize("field", sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields}))
def test_every_field_has_a_test_of_its_effect(field: str) -> None:
    if not any(field in asked for asked, _ in SHAPING):
        file, _, names = TESTED[field].partition(": ")
        for name in names.split():
            assert f"def {name}(" in (HERE / file).read_text()


@pytest.mark.parametrize(("asked", "told"), SHAPING, ids=IDS)
def test_a_field_does_what_it_does_in_the_engine(tiny: Server, asked: dict[str, Any], told: dict[str, Any]) -> None:
    plain = ends(tiny.generate(PROMPT, **BASE))
    shaped = ends(tiny.generate(PROMPT, **BASE | told))
    assert shaped != plain, "a field whose effect does not show is not tested"
    body = BASE | asked
    whole = created(tiny, "/v1/completions", prompt=PROMPT, **body)
    assert [(each["text"], each["finish_reason"], each["stop_reason"]) for each in whole["choices"]] == shaped
    assert put_together(create_streamed(tiny, "/v1/completions", prompt=PROMPT, **body)) == shaped

    answer = ends(tiny.generate(CHAT_PROMPT, **BASE | told))
    chat = created(tiny, "/v1/chat/completions", messages=MESSAGES, **body)
    found = [(each["message"]["content"], each["finish_reason"], each["stop_reason"]) for each in chat["choices"]]
    assert found == answer
    assert put_together(create_streamed(tiny, "/v1/chat/completions", messages=MESSAGES, **body)) == answer


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_texts_end_an_answer_and_are_no_part_of_it(tiny: Server, as_list: bool) -> None:
    text = tiny.generate(PROMPT, **BASE | {"temperature": 0.0, "max_tokens": 60}).outputs[0].text
    stop = text[20:23]
    body = BASE | {"temperature": 0.0, "max_tokens": 60, "stop": [stop, "unheard of"] if as_list else stop}
    expected = [(text[: text.index(stop)], "stop", stop)]
    whole = created(tiny, "/v1/completions", prompt=PROMPT, **body)["choices"][0]
    assert [(whole["text"], whole["finish_reason"], whole["stop_reason"])] == expected
    assert put_together(create_streamed(tiny, "/v1/completions", prompt=PROMPT, **body)) == expected


def test_equal_seeds_draw_equal_texts_and_others_do_not(tiny: Server) -> None:
    def text(**seed: int) -> str:
        found: str = created(tiny, "/v1/completions", prompt=PROMPT, ignore_eos=True, **seed)["choices"][0]["text"]
        return found

    assert text(seed=7) == text(seed=7)
    assert len({text(seed=7), text(seed=8), text(seed=-7), text(), text()}) == 5
    for negative in (-1, -(2**63)):
        assert text(seed=negative) == text(seed=2**64 + negative)


def test_without_a_limit_completions_end_at_16_tokens_and_chats_where_the_model_does(tiny: Server) -> None:
    assert post(tiny, "/v1/completions", prompt=PROMPT, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert post(tiny, "/v1/completions", prompt=[5] * 505, ignore_eos=True)["usage"]["completion_tokens"] == 7
    usage = post(tiny, "/v1/chat/completions", messages=MESSAGES, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == tiny.served.max_model_len


def test_both_names_of_the_limit_of_a_chat(tiny: Server) -> None:
    new = {"max_completion_tokens": 3}
    for limit in ({"max_tokens": 3}, new, new | {"max_tokens": 3}, new | {"max_tokens": 9}, new | {"max_tokens": 1}):
        body = {"messages": MESSAGES, "ignore_eos": True, **limit}
        assert created(tiny, "/v1/chat/completions", **body)["usage"]["completion_tokens"] == 3


def test_nulls_stand_for_defaults(tiny: Server) -> None:
    nulls = dict.fromkeys(("temperature", "n", "stop", "logit_bias", "user", "stream", "stream_options", "echo"))
    body = {"prompt": PROMPT, "seed": 5, "ignore_eos": True}
    assert post(tiny, "/v1/completions", **body, **nulls)["choices"] == post(tiny, "/v1/completions", **body)["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_models_defaults_count_where_a_request_does_not_say(tiny: Server, path: str) -> None:
    defaults = {"temperature": 0.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 3.0}
    app = AppReplica(make_app(replace(tiny.served, defaults=defaults)))
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}

    def choices(**changes: Any) -> Any:
        body = BASE | prompt | changes
        return json.loads(tiny.on_loop(app.answer(path, json.dumps(body).encode())).body)["choices"]

    for name, value in defaults.items():
        others = defaults | {name: getattr(SamplingParams(), name)}
        assert choices() == post(tiny, path, **BASE, **prompt, **defaults)["choices"]
        assert choices(**{name: None}) == choices(**{name: value}) == choices()
        without = choices(**{name: others[name]})
        assert without == post(tiny, path, **BASE, **prompt, **others)["choices"]
    assert choices(temperature=3.0) != choices(), "what a request says goes first"


async def test_lower_priority_numbers_run_first(tiny: Server) -> None:
    client = tiny.async_openai()
    ended: list[str] = []

    async def run(name: str, priority: int, max_tokens: int) -> None:
        extra = {"priority": priority, "ignore_eos": True}
        await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=max_tokens, extra_body=extra)
        ended.append(name)

    first = [asyncio.create_task(run("first", -5, 400)) for _ in range(8)]  # all that can run at once
    await asyncio.to_thread(tiny.wait_until, lambda: tiny.engine.stats.num_running == 8)
    late = [asyncio.create_task(run("late", 5, 200)) for _ in range(8)]
    await asyncio.to_thread(tiny.wait_until, lambda: tiny.engine.stats.num_waiting == 8)
    soon = [asyncio.create_task(run("soon", 1, 200)) for _ in range(8)]
    await asyncio.gather(*first, *late, *soon)
    assert ended == ["first"] * 8 + ["soon"] * 8 + ["late"] * 8


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_priority_is_refused_by_name_unless_the_operator_allows_it(tiny: Server, path: str) -> None:
    app = AppReplica(make_app(replace(tiny.served, allow_priority=False)))
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}
    for priority, status in ((-(2**31) + 1, 400), (1, 400), (0, 200), (None, 200)):
        for stream in (False, True):
            body = prompt | {"priority": priority, "max_tokens": 2, "stream": stream}
            answer = tiny.on_loop(app.answer(path, json.dumps(body).encode()))
            assert answer.status == status
            if status == 400:
                error = json.loads(answer.body)["error"]
                assert error["param"] == "priority"
                assert "--allow-priority" in error["message"]


def test_greedy_choices_are_as_many_as_asked_for_and_equal(tiny: Server) -> None:
    body = BASE | {"temperature": 0, "n": 3, "logprobs": 1}
    for path, prompt in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": MESSAGES})):
        asked = body | prompt | ({"logprobs": True} if "chat" in path else {})
        one, three = post(tiny, path, **asked | {"n": 1}), post(tiny, path, **asked)
        assert [each | {"index": 0} for each in three["choices"]] == one["choices"] * 3
        assert [each["index"] for each in three["choices"]] == [0, 1, 2]
        assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
        assert three["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"] == 3 * 24
        assert put_together(create_streamed(tiny, path, **asked)) == ends(
            tiny.generate(PROMPT if "prompt" in prompt else CHAT_PROMPT, **BASE | {"temperature": 0, "n": 3})
        )
    prompts = post(tiny, "/v1/completions", **body | {"prompt": [PROMPT, "Other"], "n": 2})["choices"]
    texts = [each["text"] for each in prompts]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_a_start_token_can_be_left_out(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(demo_model_dir)
    start = "<|im_start|>"
    tokenizer.backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    limits = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))
    engine = AsyncClient(LocalEngine(), FrontEnd(tokenizer, limits))
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    with serving(engine, "local", 256) as server:
        for asked, expected in ((None, [1, *ids]), (True, [1, *ids]), (False, ids)):
            body = {"prompt": PROMPT, "add_special_tokens": asked}
            assert post(server, "/tokenize", **body)["tokens"] == expected
            ours = created(server, "/v1/completions", **body, max_tokens=3)
            by_ids = created(server, "/v1/completions", prompt=expected, max_tokens=3)
            assert (ours["choices"], ours["usage"]["prompt_tokens"]) == (by_ids["choices"], len(expected))


def test_who_asks_is_logged_with_the_answers_id(tiny: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "eagleray.deploy.openai.generate"):
        answer = post(tiny, "/v1/completions", prompt=PROMPT, user="alice")
        others = {"safety_identifier": "b", "session_id": "c", "metadata": {"d": "e"}}
        more = post(tiny, "/v1/chat/completions", messages=MESSAGES, max_tokens=2, user="alice", **others)
        post(tiny, "/v1/completions", prompt=PROMPT, user="x" * 100_000)
    first, second, third = caplog.messages
    assert first == f"{answer['id']!r} is for user 'alice'"
    told = "user 'alice', safety_identifier 'b', session_id 'c', metadata {'d': 'e'}"
    assert second == f"{more['id']!r} is for {told}"
    assert len(third) < 200


def test_a_name_of_a_request_writes_no_lines_of_its_own(tiny: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "eagleray.deploy.openai.generate"):
        answer = post(tiny, "/v1/completions", prompt=PROMPT, user="bob", request_id="x\nFAKE \x1b[31m")
    assert answer["id"] == "cmpl-x\nFAKE \x1b[31m"
    assert caplog.messages == [r"'cmpl-x\nFAKE \x1b[31m' is for user 'bob'"]


def test_a_request_may_name_its_answer(tiny: Server) -> None:
    assert post(tiny, "/v1/completions", prompt=PROMPT, request_id="mine")["id"] == "cmpl-mine"
    assert post(tiny, "/v1/chat/completions", messages=MESSAGES, max_tokens=2, request_id="my")["id"] == "chatcmpl-my"
    chunks = streamed(tiny, "/v1/completions", prompt=PROMPT, request_id="mine", n=2)
    assert {chunk["id"] for chunk in chunks} == {"cmpl-mine"}


async def test_the_same_name_may_be_used_twice_at_once(tiny: Server) -> None:
    client = tiny.async_openai()
    asked = {"request_id": "same", "ignore_eos": True}
    answers = await asyncio.gather(
        *(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=50, extra_body=asked) for _ in range(4))
    )
    assert [answer.id for answer in answers] == ["cmpl-same"] * 4


def test_the_tier_is_told_if_asked_for(tiny: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2}
    assert "service_tier" not in post(tiny, "/v1/chat/completions", **body)
    for tier in ("auto", "flex"):
        assert post(tiny, "/v1/chat/completions", **body, service_tier=tier)["service_tier"] == "default"
        chunks = streamed(tiny, "/v1/chat/completions", **body, service_tier=tier)
        assert {chunk["service_tier"] for chunk in chunks} == {"default"}


def test_best_of_all_choices_are_all_choices(tiny: Server) -> None:
    body = BASE | {"prompt": PROMPT, "n": 3}
    plain = post(tiny, "/v1/completions", **body)["choices"]
    for best_of in (1, 3):
        assert post(tiny, "/v1/completions", **body, best_of=best_of)["choices"] == plain
