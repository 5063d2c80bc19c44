"""instructor, for text: what it does beyond that needs tools or JSON modes."""

from typing import Any

import instructor
import openai

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def ask(site: Site, messages: list[Any], **others: Any) -> Any:
    client = instructor.from_openai(openai.OpenAI(base_url=site.url, api_key=KEY))
    return client.chat.completions.create(
        model=site.model, messages=messages, max_tokens=MAX_TOKENS, response_model=None, **others
    )


def plain(site: Site) -> object:
    return ask(site, [{"role": "user", "content": FIRST}]).choices[0].message.content


def history(site: Site) -> object:
    asked = {"role": "user", "content": FIRST}
    reply = ask(site, [asked]).choices[0].message.model_dump()
    return ask(site, [asked, reply, {"role": "user", "content": SECOND}]).choices[0].message.content


def streaming(site: Site) -> object:
    chunks = ask(site, [{"role": "user", "content": FIRST}], stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


if __name__ == "__main__":
    check("instructor", plain, history, streaming)
