"""What stands in a conversation reaches the model's chat template where that uses it, as it does in transformers."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.messages import template_messages, template_variables
from eagleray.deploy.openai.requests import ChatRequest

TOOLS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}"
    " {{ call.function.name }}({{ call.function.arguments.items() | list }}){% endfor %}{% endif %}"
    "{% if m.role == 'tool' %} to {{ m.tool_call_id }}{% endif %}\n{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<no/>{% endif %}"
)
EFFORT = "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ reasoning_effort or 'usual' }} {{ verbosity or '-' }}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}]


def tokenizer_of(template: str) -> Tokenizer:
    backend = Backend(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, {"default": template})


def text_of(template: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt that a request becomes."""
    tokenizer = tokenizer_of(template)
    request = ChatRequest.model_validate_json(json.dumps({"messages": messages, **fields}))
    found = template_messages(tokenizer, request)
    options = template_variables(tokenizer, request) | (request.chat_template_kwargs or {})
    return tokenizer.apply_chat_template(found, add_generation_prompt=False, **options)


def transformers_text(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    rendered: Any = render_jinja_template([messages], chat_template=template, **variables)
    text: str = rendered[0][0]
    return text


def test_calls_of_tools_and_their_results_are_the_templates() -> None:
    """With arguments as objects, as transformers asks for them."""
    call = CALLS[0] | {"function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
    ask, result = {"role": "user", "content": "1 + x?"}, {"role": "tool", "content": "2", "tool_call_id": "c1"}
    expected = transformers_text(TOOLS, [ask, {"role": "assistant", "content": "", "tool_calls": [call]}, result])
    assert "add([('a', 1), ('b', 'x')])" in expected
    assert "to c1" in expected
    for content in ({"content": None}, {"content": ""}, {}):
        assert text_of(TOOLS, [ask, {"role": "assistant", **content, "tool_calls": CALLS}, result]) == expected


@pytest.mark.parametrize(
    "nothing", [{}, {"tool_calls": None}, {"tool_calls": []}, {"function_call": None, "audio": None}]
)
def test_what_says_nothing_is_not_there_for_a_template_that_asks(nothing: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"} | nothing]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert text_of(TOOLS, messages) == transformers_text(TOOLS, plain)


@pytest.mark.parametrize("arguments", ["{", "[" * 100_000, '{"a": '])
def test_arguments_that_are_no_json_are_refused_by_name(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(ApiError) as caught:
        text_of(TOOLS, [{"role": "assistant", "tool_calls": [call]}])
    assert (caught.value.status, caught.value.param) == (400, "messages.0.tool_calls")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_are_handed_on_under_either_name(name: str) -> None:
    messages = [{"role": "assistant", "content": "4", name: "2 + 2"}]
    assert text_of(THINKING, messages) == "<think>2 + 2</think>4\n"
    assert text_of(PLAIN, messages) == "assistant: 4\n"


def test_efforts_are_variables_of_templates_that_have_them() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert text_of(EFFORT, messages) == "Hi\nusual -"
    assert text_of(EFFORT, messages, reasoning_effort="low", verbosity="high") == "Hi\nlow high"
    kwargs = {"reasoning_effort": "max"}
    assert text_of(EFFORT, messages, reasoning_effort="low", chat_template_kwargs=kwargs) == "Hi\nmax -"
    assert text_of(THINKING, messages, reasoning_effort="none") == "Hi\n<no/>"
    assert text_of(THINKING, messages, reasoning_effort="high") == "Hi\n"
    assert text_of(PLAIN, messages, reasoning_effort="none", verbosity="medium") == "user: Hi\n"
    for template, field in ((PLAIN, {"reasoning_effort": "low"}), (THINKING, {"verbosity": "low"})):
        with pytest.raises(ApiError) as caught:
            text_of(template, messages, **field)
        assert caught.value.param == next(iter(field))


def test_roles_that_a_template_leaves_out_are_those_that_mean_the_same() -> None:
    named = PLAIN + "{# 'developer' 'function' #}"
    for role, stands_for in (("developer", "system"), ("function", "function"), ("tool", "tool")):
        assert text_of(PLAIN, [{"role": role, "content": "a"}]) == f"{stands_for}: a\n"
        assert text_of(named, [{"role": role, "content": "a"}]) == f"{role}: a\n"
    assert text_of(PLAIN + "{# 'tool' #}", [{"role": "function", "content": "a", "name": "f"}]) == "tool: a\n"


def test_a_refusal_is_what_an_assistant_said() -> None:
    for message in (
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ):
        assert text_of(PLAIN, [message]) == "assistant: No.\n"
