"""openai's own client, by its helper `.stream()`, whose messages have more fields."""

from typing import Any

import openai

from clients.checks import FIRST, KEY, SECOND, Site, check


def gathered(site: Site, messages: list[Any]) -> Any:
    client = openai.OpenAI(base_url=site.url, api_key=KEY)
    with client.chat.completions.stream(model=site.model, messages=messages, stop=["\n"]) as stream:
        return stream.get_final_completion().choices[0].message


def plain(site: Site) -> object:
    return gathered(site, [{"role": "user", "content": FIRST}]).content


def history(site: Site) -> object:
    asked = {"role": "user", "content": FIRST}
    reply = gathered(site, [asked])
    return gathered(site, [asked, reply.model_dump(), {"role": "user", "content": SECOND}]).content


if __name__ == "__main__":
    check("openai", plain, history, plain)
