"""Starts an engine for as long as a command runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.runtime.resolve import folder_of
from eagleray.cluster.runtime.start_display import shown_start

if TYPE_CHECKING:
    from eagleray.cluster.async_llm import AsyncLLM
    from eagleray.cluster.frontend.front_end import FrontEnd
    from eagleray.cluster.runtime.engine_client import EngineClient


@contextmanager
def running_engine(config: EngineConfig, err: Console) -> "Iterator[AsyncLLM]":
    """Start an engine, with a line on the terminal while that takes; close it whatever happens."""
    with starting(config, err):
        from eagleray.cluster.async_llm import AsyncLLM  # takes a second or two, under the line that says so
    engine = AsyncLLM(**asdict(config), generation_config="none")  # the command asks for each parameter
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def measured_engine(config: EngineConfig, err: Console) -> "Iterator[tuple[EngineClient, FrontEnd]]":
    """As `running_engine`, but the engine and the bookkeeping that its front ends share, for those who take the time.

    A directory without a tokenizer will do: prompts are token ids then.
    """
    with starting(config, err):
        from eagleray.cluster.runtime.launch import launch  # noqa: F401  # as above
    engine, front_end = launch_for_tokens(config)
    try:
        yield engine, front_end
    finally:
        engine.close()


def launch_for_tokens(config: EngineConfig) -> "tuple[EngineClient, FrontEnd]":
    """`launch` with nothing of the model's own defaults; without a tokenizer there, prompts are token ids."""
    from eagleray.cluster.runtime.launch import launch

    no_tokenizer = not (folder_of(config) / "tokenizer.json").is_file()
    return launch(config, skip_tokenizer_init=no_tokenizer, generation_config="none")


@contextmanager
def starting(config: EngineConfig, err: Console) -> Iterator[None]:
    """The same line that `launch` shows, for as long as what it needs is imported."""
    quiet_ray()
    with shown_start(config, err):
        yield


def chat_templates(config: EngineConfig, wanted: bool | None) -> bool:
    """Whether prompts go through the model's chat template: as `wanted`, or whenever it has one if that is None.

    Raises `ValueError` if one is wanted and there is none.
    """
    if wanted is False:
        return False
    from eagleray.cluster.frontend.tokenizer import Tokenizer  # late, since only some commands need it

    has_template = Tokenizer.from_dir(folder_of(config)).has_chat_template
    if wanted and not has_template:
        raise ValueError(
            f"the model {config.model} has no chat template, which --chat, --system and messages need; use --raw"
        )
    return has_template


def quiet_ray() -> None:
    """Keep one remark of Ray's off the terminal."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """All but Ray's remark at every start that its cluster asks for a token, as it should."""
    return not record.getMessage().startswith("Token authentication is enabled")
