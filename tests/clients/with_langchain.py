"""LangChain."""

from typing import Any

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def model(site: Site) -> Any:
    return ChatOpenAI(base_url=site.url, api_key=KEY, model=site.model, max_tokens=MAX_TOKENS)


def plain(site: Site) -> object:
    return model(site).invoke(FIRST).content


def history(site: Site) -> object:
    asked = HumanMessage(FIRST)
    return model(site).invoke([asked, model(site).invoke([asked]), HumanMessage(SECOND)]).content


def streaming(site: Site) -> object:
    return "".join(chunk.content for chunk in model(site).stream(FIRST))


if __name__ == "__main__":
    check("langchain-openai", plain, history, streaming)
