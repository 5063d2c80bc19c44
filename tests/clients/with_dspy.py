"""dspy: its language model as it is, since its programs need answers in a form that tiny models do not write."""

import asyncio
import contextlib
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

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
    """The pieces of a program's answer; whether it has the form that the program wants is the model's affair."""

    async def stream() -> int:
        pieces = 0
        with dspy.context(lm=model(site)), contextlib.suppress(AdapterParseError):
            async for piece in dspy.streamify(dspy.Predict("question -> answer"))(question=FIRST):
                pieces += not isinstance(piece, dspy.Prediction)
        return pieces

    return asyncio.run(stream())


if __name__ == "__main__":
    check("dspy", plain, history, streaming)
