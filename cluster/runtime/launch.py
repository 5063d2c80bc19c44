"""Launches an engine with a front end, from the options that `LLM` and `AsyncLLM` share."""

from concurrent.futures import Future, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.front_end import FrontEnd, OnEnd, unwatched
from eagleray.cluster.frontend.generation_config import default_params, drawable, eos_token_ids
from eagleray.cluster.frontend.inputs import ModelLimits, derive_seed
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.runtime.background import in_background
from eagleray.cluster.runtime.engine_client import EngineClient
from eagleray.cluster.runtime.placement import Room
from eagleray.cluster.runtime.resolve import folder_of, found
from eagleray.cluster.runtime.start_display import shown_start
from eagleray.models.loading.model_dir import is_of_hub, model_dir
from eagleray.workers.protocol.startup import OnProgress, Progress

SOON_S = 0.2  # within which most of what may be wrong with small files is found


def config_of(model: str | Path, tensor_parallel_size: int, options: dict[str, Any]) -> EngineConfig:
    """The arguments of `LLM` and `AsyncLLM` as a configuration. Raises `ValueError` for options that do not exist."""
    if unknown := sorted(options.keys() - EngineConfig.names()):
        known = ", ".join(sorted(EngineConfig.names()))
        raise ValueError(f"no such option: {', '.join(unknown)}; the options are {known}")
    return EngineConfig(model=str(model), tensor_parallel_size=tensor_parallel_size, **options)


def launch(
    config: EngineConfig,
    tokenizer: str | Path | None = None,
    *,
    skip_tokenizer_init: bool = False,
    room: Room | None = None,
    on_end: OnEnd = unwatched,
    on_progress: OnProgress | None = None,
    replica: int = 0,
    generation_config: str = "auto",
) -> tuple[EngineClient, FrontEnd]:
    """Start an engine and wait for it, with a line on the terminal while that takes, or as `on_progress` has it.

    Without `room` the engine reserves its own; `on_end` hears of every request that has ended. Of several engines with
    one seed each `replica` draws differently. `generation_config` is a choice of `default_params`. What is wrong with
    the options or the small files is said before anything starts, but for what only shows once the tokenizer is built.

    Raises `ValueError` for what the user gave, `EngineStartError` when the cluster or a rank fails.
    """
    if skip_tokenizer_init and tokenizer is not None:
        raise ValueError(f"tokenizer is {str(tokenizer)!r} and skip_tokenizer_init is True; leave one of them out")
    config = found(config)
    folder = folder_of(config)
    if tokenizer is not None and is_of_hub(str(tokenizer)):
        tokenizer = model_dir(str(tokenizer))
    defaults = default_params(folder, generation_config)
    eos_token_ids(folder, None)  # what is wrong with its files is said before anything starts
    reading = None if skip_tokenizer_init else _begin_to_read(Path(tokenizer or folder))
    shown = shown_start(config, Console(stderr=True)) if on_progress is None else nullcontext(on_progress)
    with shown as progress:
        engine = EngineClient.start(config, partial(_go_on, reading, progress), room)
    text = _read(reading, engine)
    eos = drawable(eos_token_ids(folder, text), engine.info.vocab_size)
    limits = ModelLimits(max_model_len=engine.info.max_model_len, vocab_size=engine.info.vocab_size, eos_token_ids=eos)
    seed = config.seed if config.seed is None or replica == 0 else derive_seed(config.seed, replica)
    return engine, FrontEnd(text, limits, seed, on_end, defaults)


def _begin_to_read(folder: Path) -> "Future[Tokenizer]":
    """A tokenizer takes a second or so, and the engine starts meanwhile. Raises `ValueError` for what is seen soon."""
    reading = in_background(partial(Tokenizer.from_dir, folder), "tokenizer")
    reading.add_done_callback(_warm_up)
    wait([reading], SOON_S)
    _raise_if_unreadable(reading)
    return reading


def _go_on(reading: "Future[Tokenizer] | None", progress: OnProgress, now: Progress) -> None:
    """Hand on how far the start is, which ends here if there is no tokenizer to be had."""
    _raise_if_unreadable(reading)
    progress(now)


def _read(reading: "Future[Tokenizer] | None", engine: EngineClient) -> Tokenizer | None:
    """The tokenizer, if one was asked for; the engine ends if it cannot be read."""
    try:
        return None if reading is None else reading.result()
    except BaseException:
        engine.close()
        raise


def _raise_if_unreadable(reading: "Future[Tokenizer] | None") -> None:
    if reading is not None and reading.done():
        reading.result()


def _warm_up(reading: "Future[Tokenizer]") -> None:
    if reading.exception() is None:
        reading.result().warm_up()
