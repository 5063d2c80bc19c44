"""Launches an engine with a front end, from the options that `LLM` and `AsyncLLM` share."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.front_end import FrontEnd, OnEnd, unwatched
from eagleray.cluster.frontend.generation_config import default_params, drawable, eos_token_ids
from eagleray.cluster.frontend.inputs import ModelLimits, derive_seed
from eagleray.cluster.runtime.engine_client import EngineClient, nothing_else
from eagleray.cluster.runtime.placement import Room
from eagleray.cluster.runtime.resolve import folder_of, found
from eagleray.cluster.runtime.start_display import shown_start
from eagleray.cluster.runtime.tokenizer_reading import TokenizerReading
from eagleray.models.loading.model_dir import is_of_hub, model_dir
from eagleray.workers.protocol.startup import OnProgress


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
    the options or the small files is said before anything starts, but for what only shows once the tokenizer is built:
    that ends the start. Of one that has ended nothing is left but Ray.

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
    reading = None if skip_tokenizer_init else TokenizerReading(Path(tokenizer or folder))
    shown = shown_start(config, Console(stderr=True)) if on_progress is None else nullcontext(on_progress)
    engine = None
    try:
        with shown as progress:
            engine = EngineClient.start(config, progress, room, nothing_else if reading is None else reading.check)
        text = None if reading is None else reading.result()
        eos = drawable(eos_token_ids(folder, text), engine.info.vocab_size)
        limits = ModelLimits(
            max_model_len=engine.info.max_model_len, vocab_size=engine.info.vocab_size, eos_token_ids=eos
        )
        seed = config.seed if config.seed is None or replica == 0 else derive_seed(config.seed, replica)
        return engine, FrontEnd(text, limits, seed, on_end, defaults)
    except BaseException as error:
        if reading is not None:
            reading.give_up()
        if engine is not None:
            engine.close()
        if reading is not None and isinstance(error, Exception):
            reading.check()  # files that are wrong will be so at the next start, too
        raise
