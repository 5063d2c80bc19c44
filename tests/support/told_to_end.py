"""A program that deploys as `eagleray serve` does, on the cluster of its environment, and is told to end on its way.

Its argument says when: at once ("imports"), while it joins Ray ("Ray"), or as Serve begins to start ("Serve"), which
then takes longer than a server would that does not wait for it. It writes, as JSON, what it came to and what it has
left on the cluster.
"""

import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve

from eagleray.cluster.config import EngineConfig
from eagleray.deploy.serve import command
from eagleray.deploy.serve.arguments import Site
from eagleray.deploy.serve.config import ServeArgs
from eagleray.deploy.serve.server_link import ServerEnd
from support.free_port import free_port

PATIENCE_S = 2.0


class Told:
    """When, and what was called before and after."""

    def __init__(self, when: str) -> None:
        self.told_to_end = threading.Event()
        self.came_to: list[str] = []
        self.over = threading.Event()  # the server has ended
        self.served = threading.Event()  # Serve's start has
        self._when = when
        self.note("imports")

    def note(self, name: str) -> None:
        self.came_to.append(name)
        if name == self._when:
            self.told_to_end.set()

    def join(self, join: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.note("Ray")
        return join(*args, **options)

    def start(self, start: Callable[..., None], **options: Any) -> None:
        self.note("Serve")
        self.over.wait(PATIENCE_S)
        try:
            start(**options)
        finally:
            self.served.set()


def main(when: str) -> None:
    told, join = Told(when), ray.init
    ray.init = partial(told.join, join)
    serve.start = partial(told.start, serve.start)
    engine = EngineConfig(model="demo", device="cpu", cpus_per_rank=0.1)
    args = ServeArgs.model_validate({"engine": engine})
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    code = command.serve(args, Site(port=free_port()), cast(ServerEnd, told), folder)
    told.over.set()
    in_time = "Serve" not in told.came_to or told.served.is_set()
    if not in_time:
        told.served.wait(60)
    joined = ray.is_initialized()
    if not joined:
        join(os.environ["RAY_ADDRESS"], logging_level=logging.ERROR, log_to_driver=False)
    left = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    about = {"code": code, "came_to": told.came_to, "in_time": in_time, "joined": joined, "left": left}
    print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
