"""openai-agents, over chat completions."""

import asyncio
from typing import Any

import agents
import openai

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def agent(site: Site) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=site.url, api_key=KEY)
    model = agents.OpenAIChatCompletionsModel(model=site.model, openai_client=client)
    return agents.Agent(name="A", model=model, model_settings=agents.ModelSettings(max_tokens=MAX_TOKENS))


def plain(site: Site) -> object:
    return agents.Runner.run_sync(agent(site), FIRST).final_output


def history(site: Site) -> object:
    first = agents.Runner.run_sync(agent(site), FIRST)
    return agents.Runner.run_sync(
        agent(site), [*first.to_input_list(), {"role": "user", "content": SECOND}]
    ).final_output


def streaming(site: Site) -> object:
    async def stream() -> int:
        run = agents.Runner.run_streamed(agent(site), FIRST)
        return len([event async for event in run.stream_events() if event.type == "raw_response_event"])

    return asyncio.run(stream())


if __name__ == "__main__":
    check("openai-agents", plain, history, streaming)
