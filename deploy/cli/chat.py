"""`eagleray chat`: a conversation on the terminal."""

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from eagleray.cluster.frontend.prompts import Message
from eagleray.cluster.runtime.resolve import folder_of
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.cli.answers import printable
from eagleray.deploy.cli.arguments import CHAT_SAMPLING, check_sampling, engine_config, sampling_params
from eagleray.deploy.cli.chat_input import ChatInput
from eagleray.deploy.cli.engine import chat_templates, running_engine

if TYPE_CHECKING:
    from eagleray.cluster.frontend.async_client import AsyncClient

HELP = """\
/help   show this
/reset  forget the conversation, all but the system message
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it clears what is written
Several lines are one message: paste them, press Alt-Enter between
them, end all but the last in \\, or write \"\"\" before and after them"""
GREETING = "Talk to the model; /help shows what else can be typed."


def run(arguments: argparse.Namespace) -> int:
    """Talk until the user leaves. Raises `ValueError`, `EngineStartError`, `DemoModelError` before the first turn."""
    check_sampling(arguments)
    config = engine_config(arguments)
    params = sampling_params(arguments, folder_of(config), CHAT_SAMPLING)
    chat_templates(config, wanted=True)
    with running_engine(config, Console(stderr=True)) as engine, asyncio.Runner() as runner:
        _talk(Conversation(engine, params, arguments.system), runner)
    return 0


class Conversation:
    """The messages so far; the last turn is kept only if it was answered, in whole or in part."""

    def __init__(self, engine: "AsyncClient", params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._system)

    def reset(self) -> None:
        """Back to the start."""
        self._messages = list(self._system)

    async def answer(self, text: str) -> None:
        """Stream the answer to standard output. If that is cut short, what was shown belongs to the conversation."""
        messages = [*self._messages, {"role": "user", "content": text}]
        shown = ""
        try:
            async for output in self._engine.chat(messages, self._params):
                new = output.outputs[0].text[len(shown) :]
                print(printable(new), end="", flush=True)
                shown += new
        finally:
            if shown:
                self._messages = [*messages, {"role": "assistant", "content": shown}]
                print(flush=True)


def _talk(conversation: Conversation, runner: asyncio.Runner) -> None:
    messages = ChatInput()
    if messages.at_terminal:
        print(GREETING)
    while (text := messages.read()) not in (None, "/exit"):
        match text:
            case "":
                continue
            case "/help":
                print(HELP)
            case "/reset":
                conversation.reset()
            case str() if text.startswith("/") and "\n" not in text:
                print(f"there is no command {text}; /help shows those there are")
            case str():
                _answer(conversation, text, runner)


def _answer(conversation: Conversation, text: str, runner: asyncio.Runner) -> None:
    try:
        runner.run(conversation.answer(text))
    except KeyboardInterrupt:
        print("(stopped)")
    except ValueError as error:
        print(f"eagleray: {error}; /reset forgets what was said", file=sys.stderr)
