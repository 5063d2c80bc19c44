"""Converts a request's messages to what the model's chat template takes.

Any reply's message goes back in unchanged, however a client writes it: with nulls for what it does not hold, with
fields of the client's own. These go to the template; what says nothing does not, since templates ask what is there.
"""

import json
from typing import Any

from eagleray.cluster.frontend.chat import joined
from eagleray.cluster.frontend.prompts import Message
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.field_types import ROLES
from eagleray.deploy.openai.requests import ChatMessage, ChatRequest, Conversation
from eagleray.deploy.openai.truncate import excerpt

CALLS = ("tool_calls", "function_call")  # of tools, in what an assistant said before
MAY_BE_SILENT = ("assistant", "function")
NEUTRAL = {"reasoning_effort": "none", "verbosity": "medium"}  # where a template has no such variable


def template_messages(tokenizer: Tokenizer, conversation: Conversation) -> list[Message]:
    """All messages. Raises `ApiError` 400 for what the template would leave out, or is not text."""
    _check_roles(tokenizer, conversation)
    return [_message(tokenizer, message, f"messages.{i}") for i, message in enumerate(conversation.messages)]


def template_variables(tokenizer: Tokenizer, conversation: Conversation) -> dict[str, Any]:
    """What OpenAI has fields for, and templates variables; as in vLLM, an effort also turns thinking on or off.

    Raises `ApiError` 400 for one that is not neutral where the template has no such variable.
    """
    if not isinstance(conversation, ChatRequest):
        return {}
    asked = {"reasoning_effort": conversation.reasoning_effort, "verbosity": conversation.verbosity}
    found: dict[str, Any] = {
        name: value for name, value in asked.items() if value is not None and tokenizer.chat_template_has(name)
    }
    if asked["reasoning_effort"] is not None and tokenizer.chat_template_has("enable_thinking"):
        found["enable_thinking"] = asked["reasoning_effort"] != "none"
    for name, value in asked.items():
        has_effect = name in found or (name == "reasoning_effort" and "enable_thinking" in found)
        if value not in (None, NEUTRAL[name]) and not has_effect:
            message = f"{name} is {value!r}, but the model's chat template has no such variable; leave it out"
            raise ApiError(400, message, param=name)
    return found


def _check_roles(tokenizer: Tokenizer, conversation: Conversation) -> None:
    """Raises `ApiError` 400 for a role that is neither OpenAI's nor the model's."""
    known = set(ROLES)
    for index, role in enumerate(message.role for message in conversation.messages):
        if role not in known and not tokenizer.chat_template_names(role):
            param = f"messages.{index}.role"
            wanted = f"give {', '.join(ROLES)}, or another that the model's chat template names"
            raise ApiError(400, f"{param} is {excerpt(role)}; {wanted}", param=param)
        known.add(role)


def _message(tokenizer: Tokenizer, message: ChatMessage, where: str) -> Message:
    others = message.others
    for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if name in others:  # one thing under two names, of which templates know either
            others.setdefault(other, others[name])
    if "audio" in others:
        param = f"{where}.audio"
        raise ApiError(400, f"{param} is audio, but only text is supported; leave it out", param=param)
    for calls in CALLS:
        if calls in others and not tokenizer.chat_template_has(calls):
            why = f"but the model's chat template has no {calls}, and would leave them out"
            raise ApiError(400, f"{where}.{calls} is {excerpt(others[calls])}, {why}", param=f"{where}.{calls}")
    if "tool_calls" in others:
        others["tool_calls"] = _tool_calls(others["tool_calls"], f"{where}.tool_calls")
    named = {} if message.name is None else {"name": message.name}
    return {"role": _role(tokenizer, message.role), "content": _content(message, where), **named, **others}


def _role(tokenizer: Tokenizer, role: str) -> str:
    """The same, or for OpenAI's two that many templates leave out, or do not know, the one that means the same."""
    if tokenizer.chat_template_names(role):
        return role
    if role == "developer":
        return "system"
    return "tool" if role == "function" and tokenizer.chat_template_names("tool") else role


def _content(message: ChatMessage, where: str) -> str:
    """A message's text. An assistant may have said nothing, or have refused."""
    text = message.content or ""
    if isinstance(text, list):
        text = joined(part.text for part in text)
    if message.role not in MAY_BE_SILENT:
        if message.content is None:
            raise ApiError(400, f"{where}.content is missing or null; it is required", param=f"{where}.content")
        return text
    refusal = message.others.get("refusal")
    return text or (refusal if isinstance(refusal, str) else "")


def _tool_calls(calls: object, where: str) -> list[Any]:
    """The calls with arguments as objects, which chat templates expect, where clients send them as JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ApiError(400, f"{where} is {excerpt(calls)}; give a list of calls", param=where)
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    called = call.get("function")
    if not isinstance(called, dict):
        return call
    return call | {"function": called | {"arguments": _arguments(called.get("arguments"), where)}}


def _arguments(arguments: object, where: str) -> object:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} has arguments that are not JSON, {excerpt(arguments)}", param=where) from error
