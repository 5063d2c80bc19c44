"""openai's own client."""

from typing import Any

import openai

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def ask(site: Site, messages: list[Any], **others: Any) -> Any:
    client = openai.OpenAI(base_url=site.url, api_key=KEY)
    return client.chat.completions.create(model=site.model, messages=messages, max_tokens=MAX_TOKENS, **others)


def plain(site: Site) -> object:
    others: dict[str, Any] = {"tools": [], "store": False, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto"}
    neutral = {"response_format": {"type": "text"}, "reasoning_effort": "none", "parallel_tool_calls": False}
    return ask(site, [{"role": "user", "content": FIRST}], **others, **neutral).choices[0].message.content


def history(site: Site) -> object:
    asked: dict[str, Any] = {"role": "user", "content": FIRST}
    reply = ask(site, [asked]).choices[0].message
    again = {"role": "user", "content": SECOND}
    return all(ask(site, [asked, said, again]).choices for said in (reply, reply.model_dump(), reply.to_dict()))


def streaming(site: Site) -> object:
    chunks = ask(site, [{"role": "user", "content": FIRST}], stream=True, stream_options={"include_usage": True})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


if __name__ == "__main__":
    check("openai", plain, history, streaming)
