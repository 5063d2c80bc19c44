"""dspy: its language model as it is, since its programs need answers in a form that tiny models do not write."""

import asyncio
from typing import Any

import dspy
import litellm

from clients.checks import FIRST, KEY, MAX_TOKENS, SECOND, Site, check


def model(site: Site) -> Any:
    return dspy.LM(f"openai/{site.model}", api_base=site.url, api_key=KEY, max_tokens=MAX_TOKENS, cache=False)


def plain(site: Site) -> object:
    return model(site)(FIRST)[0]


def history(site: Site) -> object:
    (reply,) = model(site)(FIRST)
    said = {"role": "assistant", "content": reply if isinstance(reply, str) else reply["text"]}
    return model(site)(messages=[{"role": "user", "content": FIRST}, said, {"role": "user", "content": SECOND}])[0]


def streaming(site: Site) -> object:
    class Ask(dspy.Module):  # type: ignore[misc]  # which mypy does not see
        def forward(self) -> Any:
            return dspy.Prediction(text=model(site)(FIRST)[0])

    async def stream() -> int:
        chunks = [chunk async for chunk in dspy.streamify(Ask(), is_async_program=False)()]
        return sum(isinstance(chunk, litellm.ModelResponseStream) for chunk in chunks)

    return asyncio.run(stream())


if __name__ == "__main__":
    check("dspy", plain, history, streaming)
