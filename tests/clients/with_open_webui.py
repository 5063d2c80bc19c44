"""The calls that Open WebUI makes of a server with OpenAI's API, as it sends them; it needs nothing installed."""

import json
import sys
import urllib.request
from typing import Any

from clients.checks import FIRST, KEY, SECOND, Site, check

HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
HEADERS |= {"HTTP-Referer": "https://openwebui.com/", "X-Title": "Open WebUI"}


def call(site: Site, route: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(site.url + route, data, HEADERS)
    with urllib.request.urlopen(request, timeout=120) as answer:
        read: bytes = answer.read()
    return read


def plain(site: Site) -> object:
    """The list of models, then a title for a conversation."""
    models = [model["id"] for model in json.loads(call(site, "/models"))["data"]]
    title = {"model": site.model, "messages": [{"role": "user", "content": f"### Task:\nTitle: {FIRST}"}]}
    answer = json.loads(call(site, "/chat/completions", title | {"stream": False, "max_completion_tokens": 16}))
    return site.model in models and answer["choices"][0]["message"]["content"]


def history(site: Site) -> object:
    turns = [("system", "Be brief."), ("user", FIRST), ("assistant", "Red."), ("user", SECOND)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return streamed(site, messages)


def streaming(site: Site) -> object:
    return streamed(site, [{"role": "user", "content": [{"type": "text", "text": FIRST}]}])


def streamed(site: Site, messages: list[dict[str, Any]]) -> object:
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 0.9}
    events = call(site, "/chat/completions", {"model": site.model, "messages": messages, "max_tokens": 12, **options})
    print(events.decode()[-300:], file=sys.stderr)
    return events.endswith(b"data: [DONE]\n\n") and b'"usage"' in events


if __name__ == "__main__":
    check("pip", plain, history, streaming)
