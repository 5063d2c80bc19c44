"""LlamaIndex."""

from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def model(site: Site) -> Any:
    return OpenAILike(api_base=site.url, api_key=KEY, model=site.model, is_chat_model=True, max_tokens=MAX_TOKENS)


def plain(site: Site) -> object:
    return model(site).chat([ChatMessage(role="user", content=FIRST)]).message.content


def history(site: Site) -> object:
    asked = ChatMessage(role="user", content=FIRST)
    reply = model(site).chat([asked]).message
    return model(site).chat([asked, reply, ChatMessage(role="user", content=SECOND)]).message.content


def streaming(site: Site) -> object:
    return "".join(each.delta or "" for each in model(site).stream_chat([ChatMessage(role="user", content=FIRST)]))


if __name__ == "__main__":
    check("llama-index-llms-openai-like", plain, history, streaming)
