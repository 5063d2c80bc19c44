"""litellm."""

from typing import Any

import litellm

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def ask(site: Site, messages: list[Any], **others: Any) -> Any:
    place = {"model": f"openai/{site.model}", "api_base": site.url, "api_key": KEY}
    return litellm.completion(**place, messages=messages, max_tokens=MAX_TOKENS, **others)


def plain(site: Site) -> object:
    others = {"metadata": {"a": "b"}, "user": "me", "tool_choice": "none"}
    return ask(site, [{"role": "user", "content": FIRST}], **others).choices[0].message.content


def history(site: Site) -> object:
    asked = {"role": "user", "content": FIRST}
    reply = ask(site, [asked]).choices[0].message
    again = {"role": "user", "content": SECOND}
    return all(ask(site, [asked, said, again]).choices for said in (reply, reply.model_dump()))


def streaming(site: Site) -> object:
    chunks = ask(site, [{"role": "user", "content": FIRST}], stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


if __name__ == "__main__":
    check("litellm", plain, history, streaming)
