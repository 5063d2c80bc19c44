"""`eagleray serve`: deploys a model on Ray Serve, and drains it when told to end.

Imports of Ray stand where they are needed: they take seconds, which what is refused need not wait for.
"""

import argparse
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from eagleray.cluster.errors import EngineStartError
from eagleray.deploy.engine import quiet_ray
from eagleray.deploy.serve_args import ServeArgs
from eagleray.deploy.serve_arguments import Site, serve_args
from eagleray.deploy.serve_environment import set_environment
from eagleray.deploy.server_start import ANSWER, IMPORTS, RAY, REPLICA, SERVE, Laps, line, replica_parts

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

END_S = 30.0  # how long the end may take beyond drain_timeout_s
DELETE_S = 15.0  # of these, how long Serve may take to take the application away
POLL_S = 0.1
RAISED = re.compile(r"^[\w.]*(?:Error|Exception): ", re.MULTILINE)  # how a traceback's last part begins
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
FORCED = 1


class ToldToEnd(BaseException):
    """A signal came before there was anything to drain."""


class End:
    """The first signal asks for an end, which then has a limited time; the second ends the process at once.

    Between `begin` and `wait` it interrupts whatever runs with `ToldToEnd`. Before that Ray starts, which cannot be
    interrupted without leaving half of it behind.
    """

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._told = threading.Event()
        self._interrupts = False
        self.code = 0

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from whoever has them."""
        for number in EXIT_CODES:
            signal.signal(number, self._hear)

    def begin(self) -> None:
        """From now on a signal interrupts; if there was one, it does so here."""
        self._interrupts = True
        if self._told.is_set():
            raise ToldToEnd

    def wait(self) -> None:
        """Sleep until a signal comes."""
        self._interrupts = False
        self._told.wait()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._told.is_set():
            os._exit(EXIT_CODES[signal.SIGINT])
        self._told.set()
        self.code = EXIT_CODES[signal.Signals(number)]
        late = threading.Timer(self._bound_s, os._exit, [FORCED])
        late.daemon = True
        late.start()
        if self._interrupts:
            raise ToldToEnd


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end. Raises `ValueError` before anything starts, `EngineStartError` if the model does not."""
    laps = Laps()
    set_environment(arguments.host)  # before anything imports Serve, which reads it then
    args, site = serve_args(arguments)
    end = End(args.drain_timeout_s + END_S)
    end.listen()
    try:
        with _on_ray(args, end, laps) as private, _deployed(args, site, private, laps) as url:
            urllib.request.urlopen(f"{url}/health", timeout=args.engine.start_timeout_s).close()
            laps.end(ANSWER)
            print(f"{args.model_name} answers at {url}/v1", flush=True)
            logger.info("%s", line(laps.seconds, replica_parts(url, args.engine.start_timeout_s)))
            end.wait()
            logger.info("no new requests from now on; those that run may take %g s", args.drain_timeout_s)
    except ToldToEnd:
        logger.info("ended before the model was ready")
    return end.code


@contextmanager
def _on_ray(args: ServeArgs, end: End, laps: Laps) -> Iterator[bool]:
    """Join or start Ray for as long as the command runs; gives whether it ends with the command."""
    import ray

    from eagleray.cluster.placement import connect

    quiet_ray()
    laps.end(IMPORTS)
    try:
        private = connect(args.engine, args.max_replicas)
        laps.end(RAY)
        end.listen()  # Ray's own handler of SIGTERM would end the process
        end.begin()
        yield private
    finally:
        ray.shutdown()


@contextmanager
def _deployed(args: ServeArgs, site: Site, private: bool, laps: Laps) -> Iterator[str]:
    """The application's address, for as long as it is to run. On a Ray that others use, Serve ends if it began here."""
    from ray import serve

    from eagleray.deploy.serve import build

    laps.end(IMPORTS)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ours = _check_site(site)
    try:
        if ours:
            serve.start(http_options={"host": site.host, "port": site.port})
        laps.end(SERVE)
        _run(build(args), site)
        laps.end(REPLICA)
        yield site.url(_here(site))
    finally:
        _drain(site.name, args.drain_timeout_s + DELETE_S)
        if ours and not private:
            serve.shutdown()


def _drain(name: str, timeout_s: float) -> None:
    """Delete the application and wait: Serve sends it no more requests, and kills replicas after drain_timeout_s."""
    from ray import serve
    from ray.serve.context import _get_global_client

    if _get_global_client(raise_if_no_controller_running=False) is None:
        return  # told to end before Serve was there
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _run(application: "Application", site: Site) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.run(application, name=site.name, route_prefix=site.route_prefix)
    except (RuntimeError, RayServeException) as error:
        raise EngineStartError(_cause(site.name) or str(error)) from None


def _cause(name: str) -> str | None:
    """Why the application's replicas did not start, if one said so: the end of the traceback that Serve keeps."""
    from ray import serve

    application = serve.status().applications.get(name)
    deployments = () if application is None else application.deployments.values()
    causes = [RAISED.split(deployment.message)[1:] for deployment in deployments]
    return next((pieces[-1].strip() for pieces in causes if pieces), None)


def _check_site(site: Site) -> bool:
    """Whether Ray Serve is still to be started. Raises `ValueError` if it cannot be had where it is wanted."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_free(site)
        return True
    options = client.http_config
    if (options.host, options.port) != (site.host, site.port):
        raise ValueError(
            f"Ray Serve already listens at {options.host}:{options.port} on this cluster, not at "
            f"{site.host}:{site.port}; give --host {options.host} --port {options.port}"
        )
    if site.name in serve.status().applications:
        raise ValueError(f"there is an application {site.name!r} on this cluster; choose another --name")
    return False


def _check_free(site: Site) -> None:
    family = socket.AF_INET6 if ":" in site.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((site.host, site.port))
        except OSError as error:
            raise ValueError(f"cannot listen at {site.host}:{site.port} ({error}); choose another --port") from None


def _here(site: Site) -> str | None:
    """An address at which what listens everywhere can be reached: the head node's, which has a proxy always."""
    if site.host not in ("0.0.0.0", "::"):
        return None
    import ray

    return str(ray.get_runtime_context().gcs_address.rpartition(":")[0])
