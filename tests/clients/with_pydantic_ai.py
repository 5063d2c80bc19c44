"""pydantic-ai."""

import asyncio
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def agent(site: Site) -> Any:
    model = OpenAIChatModel(site.model, provider=OpenAIProvider(base_url=site.url, api_key=KEY))
    return Agent(model, model_settings={"max_tokens": MAX_TOKENS})


def plain(site: Site) -> object:
    return agent(site).run_sync(FIRST).output


def history(site: Site) -> object:
    first = agent(site).run_sync(FIRST)
    return agent(site).run_sync(SECOND, message_history=first.all_messages()).output


def streaming(site: Site) -> object:
    async def stream() -> str:
        async with agent(site).run_stream(FIRST) as run:
            return "".join([text async for text in run.stream_text(delta=True)])

    return asyncio.run(stream())


if __name__ == "__main__":
    check("pydantic-ai-slim", plain, history, streaming)
