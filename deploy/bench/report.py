"""Writes a benchmark's results as JSON: settings, versions, hardware and figures."""

import argparse
import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.cluster.config import EngineConfig
from eagleray.deploy.bench.environment import hardware, versions

if TYPE_CHECKING:
    from eagleray.cluster.runtime.engine_info import EngineInfo

OF_THE_ENGINE = ("max_model_len", "vocab_size", "block_size", "num_blocks", "device", "dtype")


def check_writable(file: Path | None, option: str) -> None:
    """Raise `ValueError` now for a file that could not be written after a long run; `option` asked for it."""
    if file is None:
        return
    is_new = not file.exists()
    try:
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise ValueError(f"{option}: {file} cannot be written: {error.strerror}; name another") from error


def record(
    command: str,
    arguments: argparse.Namespace,
    config: EngineConfig | None,
    engine: "EngineInfo | None",
    cases: list[dict[str, Any]],
) -> dict[str, Any]:
    """All there is to say; nothing of an engine that is a server's. `cases` are what the command measured."""
    engine_config = {} if config is None else asdict(config)
    options = {
        name: _plain(value) for name, value in vars(arguments).items() if name not in engine_config and name != "debug"
    }
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": options,
        **({} if config is None else {"engine_config": engine_config}),
        **({} if engine is None else {"engine": {name: getattr(engine, name) for name in OF_THE_ENGINE}}),
        "versions": versions(),
        "hardware": hardware(),
        "cases": cases,
    }


def write(file: Path | None, content: dict[str, Any]) -> None:
    """Write it, if there is a file to write it to."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """JSON has no paths and no infinity."""
    if isinstance(value, Path) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return value
