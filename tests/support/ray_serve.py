"""Ray Serve on a test's cluster, and a model on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve

from eagleray.deploy.serve.app import build
from eagleray.deploy.serve.config import ServeArgs
from support.free_port import free_port


@contextmanager
def ray_serve() -> Iterator[str]:
    """Its address, for as long as it runs."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def deploy(model: Path, options: dict[str, Any]) -> None:
    """Returns once it answers, or runs in a new configuration."""
    serve.run(build(ServeArgs.model_validate({"model": str(model)} | options)))
