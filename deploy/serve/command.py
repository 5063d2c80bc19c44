"""`eagleray serve`: deploys a model on Ray Serve and drains it when told to stop.

The work is done in a process of its own, which `supervisor` answers for. Imports of Ray stand where they are needed:
they take seconds, which what is refused need not wait for.
"""

import argparse
import errno
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.runtime.background import in_background
from eagleray.cluster.runtime.ray_address import LOCAL, cluster_address
from eagleray.deploy.cli.engine import quiet_ray
from eagleray.deploy.cli.main import guarded
from eagleray.deploy.serve.arguments import Site, serve_args
from eagleray.deploy.serve.config import ServeArgs
from eagleray.deploy.serve.environment import set_environment
from eagleray.deploy.serve.haproxy import HIDE_ROUTES
from eagleray.deploy.serve.private_ray import private_ray, reap_ray, set_place, set_token, socket_folders
from eagleray.deploy.serve.progress import forget, latest, shown_serve
from eagleray.deploy.serve.server_link import News, ServerEnd
from eagleray.deploy.serve.startup import ANSWER, IMPORTS, RAY, REPLICA, SERVE, Laps, line, open_here, replica_parts
from eagleray.deploy.serve.supervisor import supervised
from eagleray.workers.protocol.startup import READY, OnProgress, Progress

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger(__name__)

END_S = 30.0  # how long the end may take beyond drain_timeout_s
DELETE_S = 15.0  # of these, how long Serve may take to take the application away
LEAVE_S = 40.0  # how long a start on a cluster of others may take to end
APPEAR_S = 20.0  # of these, how long Serve may take to be there, which cannot be ended before
LAST_S = 5.0  # and how long its start may take to notice that it has ended
SHORT = "/tmp"  # since a socket's path has 107 characters at most
POLL_S = 0.1
LOOK_S = 5.0  # between two looks at Serve while the model serves
SILENCE_S = 60.0  # how long Serve's controller may be away, which Ray starts anew
RAISED = re.compile(r"^[\w.]*(?:Error|Exception): ", re.MULTILINE)  # how a traceback's last part begins


class ToldToEnd(Exception):
    """Before there was anything to drain."""


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end. Raises `ValueError` before anything starts."""
    args, site = serve_args(arguments)
    private = cluster_address() in (None, LOCAL)
    folder = Path(SHORT, f"eagleray-{secrets.token_hex(4)}")
    if args.guard_all:
        os.environ[HIDE_ROUTES] = "1"
    if private:
        set_place()
        set_token()
    set_environment(site.host, str(folder))  # before anything imports Serve, which reads it then
    ended = (0.0 if private else LEAVE_S, args.drain_timeout_s + END_S)

    def work(link: ServerEnd) -> int:
        return guarded(lambda _: serve(args, site, link, folder), arguments)

    return supervised(work, ended, lambda pid: [folder, *socket_folders(pid)])


def serve(args: ServeArgs, site: Site, link: ServerEnd, folder: Path) -> int:
    """In a process and a new folder of its own. Raises `EngineStartError` if the model does not start."""
    laps = Laps()
    folder.mkdir(0o700, exist_ok=True)  # for this user alone
    try:
        with (
            shown_serve(args) as show,
            _on_ray(args, link, laps, show) as private,
            _deployed(args, site, private, link, laps, show) as url,
        ):
            _first_answer(url, args.engine.start_timeout_s, link)
            laps.end(ANSWER)
            show(Progress(READY))
            link.tell(News(serving=True))
            print(f"{args.model_name} answers at {url}/v1", flush=True)
            key = next(iter(args.read_api_keys()), None)
            logger.info("%s", line(laps.seconds, replica_parts(url, args.engine.start_timeout_s, key)))
            _stay(site, link)
            logger.info("no new requests from now on; those that run may take %g s", args.drain_timeout_s)
    except ToldToEnd:
        pass
    return 0


@contextmanager
def _on_ray(args: ServeArgs, link: ServerEnd, laps: Laps, show: OnProgress) -> Iterator[bool]:
    """Join or start Ray for as long as the server runs; gives whether it ends with it."""
    import ray

    from eagleray.cluster.runtime.placement import connect

    _check_told(link)
    quiet_ray()
    laps.end(IMPORTS)
    show(Progress(RAY))
    private = connect(args.engine, args.max_replicas)
    if private:
        link.tell(private_ray())
    laps.end(RAY)
    try:
        _check_told(link)
        yield private
    finally:
        if not private:  # or else the command ends it
            ray.shutdown()


@contextmanager
def _deployed(
    args: ServeArgs, site: Site, private: bool, link: ServerEnd, laps: Laps, show: OnProgress
) -> Iterator[str]:
    """The application's address, for as long as it is to run. On a Ray that others use, Serve ends if it began here."""
    from eagleray.deploy.serve.app import build

    laps.end(IMPORTS)
    show(Progress(SERVE))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _check_told(link)
    mute = ran = served = False  # Serve hears nothing any more; it has an application; there may be requests
    serving = _begin_serving(site) if _check_site(site) else None
    try:
        if serving is not None:
            _await_controller(serving, link)
        laps.end(SERVE)
        _check_told(link)
        show(Progress(REPLICA))
        ran = True
        _run(build(args), site, link, show, serving)
        laps.end(REPLICA)
        yield site.url(_here(site, private))
        served = True
    except EngineDeadError:
        mute = True
        raise
    finally:
        if not mute and ran and (link.told_to_end.is_set() or not private):
            _drain(site.name, args.drain_timeout_s + DELETE_S if served else 0.0)
        if not mute and serving is not None and not private:
            _end_serve(serving)


def _begin_serving(site: Site) -> "Future[None]":
    """Start Serve; its controller and proxies are there once this is done."""
    from ray import serve

    return in_background(lambda: serve.start(http_options={"host": site.host, "port": site.port}), "Serve")


def _await_controller(serving: "Future[None]", link: ServerEnd) -> None:
    """Until Serve can be told what to run, while its proxies are on their way.

    Raises what keeps Serve's controller from starting.
    """
    while not (serving.done() or _has_controller()):
        wait([serving], POLL_S)
        _check_told(link)
    _check_serving(serving)


def _has_controller() -> bool:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _end_serve(serving: "Future[None]") -> None:
    """Serve may not be there yet: what nobody finds would be there later, and stay on the cluster.

    Its start must have ended, too, before the process that it runs in leaves Ray.
    """
    from ray import serve

    due = time.monotonic() + APPEAR_S
    while not (there := serving.done() or _has_controller()) and time.monotonic() < due:
        wait([serving], POLL_S)
    if not there:
        logger.warning("Ray Serve has not started for %g s; if it does, `serve shutdown` ends it", APPEAR_S)
        return
    serve.shutdown()
    wait([serving], LAST_S)


def _check_serving(serving: "Future[None] | None") -> None:
    """Raise `EngineStartError` if Serve's proxies do not start."""
    if serving is not None and serving.done():
        try:
            serving.result()
        except TimeoutError as error:  # which is an `OSError`, but nothing that the user gave
            raise EngineStartError(str(error)) from None


def _check_told(link: ServerEnd) -> None:
    if link.told_to_end.is_set():
        raise ToldToEnd


def _drain(name: str, patience_s: float) -> None:
    """Delete the application and wait: Serve sends it no more requests. Its replicas have so long to end."""
    from ray import serve

    serve.delete(name, _blocking=False)
    due = time.monotonic() + patience_s
    while name in serve.status().applications and time.monotonic() < due + DELETE_S:
        if time.monotonic() >= due:
            _kill_replicas(name)
        time.sleep(POLL_S)


def _kill_replicas(name: str) -> None:
    """Those that do not listen, since they start, or do not end. Engines end with them."""
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(f"SERVE_REPLICA::{name}#"):
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(**actor))


def _run(
    application: "Application", site: Site, link: ServerEnd, show: OnProgress, serving: "Future[None] | None"
) -> None:
    """Until Serve is there, and the application's replicas, as far as it has any while nobody asks."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    forget(site.name)
    target = serve.RunTarget(application, name=site.name, route_prefix=site.route_prefix)
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except (RuntimeError, serve.exceptions.RayServeException) as error:
        raise EngineStartError(str(error)) from None
    while (about := serve.status().applications[site.name]).status != ApplicationStatus.RUNNING:
        if about.status == ApplicationStatus.DEPLOY_FAILED:
            raise EngineStartError(_cause(about) or about.message)
        if (progress := latest(site.name)) is not None and progress.phase != READY:
            show(progress)
        _check_serving(serving)
        if link.told_to_end.wait(POLL_S):
            raise ToldToEnd
    while serving is not None and not serving.done():
        wait([serving], POLL_S)
        _check_told(link)
    _check_serving(serving)


def _cause(about: "ApplicationStatusOverview") -> str | None:
    """Why the application's replicas did not start, if one said so: the end of the traceback that Serve keeps."""
    causes = [RAISED.split(deployment.message)[1:] for deployment in about.deployments.values()]
    return next((pieces[-1].strip() for pieces in causes if pieces), None)


def _first_answer(url: str, timeout_s: float, link: ServerEnd) -> None:
    """Wait for it; where there is no replica yet, this starts one. A balancer may be a moment behind."""
    answered = in_background(partial(_ask, url, timeout_s), "first answer")
    while not answered.done():
        _check_told(link)
        time.sleep(POLL_S)
    answered.result()


def _ask(url: str, timeout_s: float) -> None:
    """Until the server is well. Raises `EngineStartError` with its last words once the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = max(POLL_S, deadline - time.monotonic())  # a sleep may have lasted beyond the end
        try:
            open_here(f"{url}/health", left).close()
        except OSError as error:
            if time.monotonic() >= deadline - POLL_S:
                raise EngineStartError(f"the model started, but {url}/health says: {error}") from None
            time.sleep(POLL_S)
        else:
            return


def _stay(site: Site, link: ServerEnd) -> None:
    """Until told to end. Raises `EngineDeadError` if Serve cannot go on."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus

    heard = time.monotonic()
    while not link.told_to_end.wait(LOOK_S):
        reap_ray()
        try:
            client = _get_global_client()
            assert client is not None  # or else it raises
            ray.get(client._controller.check_alive.remote(), timeout=LOOK_S)
            about = serve.status().applications.get(site.name)
            heard = time.monotonic()
        except (ray.exceptions.RayError, serve.exceptions.RayServeException):
            if (silence := time.monotonic() - heard) > SILENCE_S:
                raise EngineDeadError(f"Ray Serve's controller has said nothing for {silence:.0f} s") from None
            continue
        if about is None and not link.told_to_end.is_set():
            raise EngineDeadError(f"the application {site.name} was deleted, but not by this command")
        if about is not None and about.status == ApplicationStatus.DEPLOY_FAILED:
            raise EngineDeadError(_cause(about) or about.message)


def _check_site(site: Site) -> bool:
    """Whether Ray Serve is still to be started. Raises `ValueError` if it cannot be had where it is wanted."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        check_free(site)
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


def check_free(site: Site) -> None:
    """Raise `ValueError` with the remedy where nobody can listen there."""
    family = socket.AF_INET6 if ":" in site.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((site.host, site.port))
        except OSError as error:
            remedy = "choose another --port"
            if error.errno == errno.EADDRNOTAVAIL:
                remedy = "that address is not this machine's: give --host one that is, or 0.0.0.0 for all of them"
            elif isinstance(error, socket.gaierror):
                remedy = "give --host an address of this machine, or 0.0.0.0 for all of them"
            raise ValueError(f"cannot listen at {site.host}:{site.port} ({error}); {remedy}") from None


def _here(site: Site, private: bool) -> str | None:
    """Where what listens everywhere can be reached: this machine's address, or the head node's, which has a proxy."""
    if site.host not in ("0.0.0.0", "::"):
        return None
    if not private:
        import ray

        return str(ray.get_runtime_context().gcs_address.rpartition(":")[0])
    from ray._common import network_utils

    return str(network_utils.node_ip_address_from_perspective())  # type: ignore[attr-defined]  # it is
