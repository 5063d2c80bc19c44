"""Places an engine on a Ray cluster: one bundle per rank, within a bounded time or refused with the figures."""

import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.core.executor import LOOK_S
from eagleray.cluster.errors import EngineStartError, counted
from eagleray.cluster.runtime.process_state import descendants
from eagleray.cluster.runtime.ray_address import LOCAL, answers, cluster_address, how_found, is_tcp
from eagleray.cluster.runtime.ray_token import use_token
from eagleray.cluster.runtime.signals import end_on_sigterm, kill
from eagleray.parallel.device_kind import HOST, KINDS, kind_of
from eagleray.workers.protocol.socket_directory import MAX_PATH

logger = logging.getLogger(__name__)

Resources = dict[str, float]

RAY_WAITED_S = 10.0  # a start that took as long to fail has waited for something in vain
RAYS_LIMITS = ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds")  # of parts of its start
SHORT_PLACE = "/tmp"
MAX_RAY_PLACE = MAX_PATH - len("/ray/session_2026-11-29_01-54-00_123456_1234567/sockets/plasma_store")
TO_START = (
    "try again when the machine is less busy, or start Ray with `ray start --head` first; Ray's logs are in "
    "ray/session_latest/logs in RAY_TMPDIR, or else in /tmp"
)


@dataclass(frozen=True)
class Room:
    """A placement group with a bundle per rank, and whether it was reserved for this engine alone."""

    group: PlacementGroup
    owned: bool = True

    def leave(self) -> None:
        """Give the resources back, unless they belong to whoever lent them."""
        if self.owned:
            remove_placement_group(self.group)


def connect(config: EngineConfig, num_engines: int = 1) -> bool:
    """Join the Ray cluster that `cluster_address` finds; else start one for this process alone.

    One that is started has room for this many engines on CPU, and ends with this process; returns whether it is such a
    one. Raises `EngineStartError` if the cluster cannot be joined or started.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = cluster_address() or LOCAL
    found, to_join = how_found()
    if not answers(address):  # which Ray would find out after two minutes
        raise EngineStartError(f"nothing answers at {address}, the address of the Ray cluster {found}; {to_join}")
    if is_tcp(address):
        raylet: Any = ray._raylet
        use_token(
            address, found, raylet.AuthenticationTokenLoader.instance(), authentication_token_setup._enable_token_auth
        )
    if address == LOCAL:
        options |= _ray_place()
    end_on_sigterm()
    end_ray = _end_of_ray()
    try:
        with _sigterm_kept():
            _init(address, config, num_engines, options)
        _keep_remarks_off_standard_output()
    except (KeyboardInterrupt, SystemExit):
        end_ray()
        raise
    except Exception as error:  # Ray has many kinds, none of them its own
        cause = f"{type(error).__name__}: {error}"
        end_ray()
        said = f"the Ray cluster at {address} ({found}) cannot be joined ({cause}); {to_join}"
        if address == LOCAL:
            said = f"Ray did not start on this machine ({cause}); {TO_START}"
        raise EngineStartError(said) from error
    return address == LOCAL


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray would put handlers of its own in the place of whoever has one, which print a stack of C++."""
    before = signal.getsignal(signal.SIGTERM)
    constants: Any = ray_constants
    constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True  # in this process; ranks that crash still say where
    utils: Any = ray._private.utils
    rays, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _init(address: str, config: EngineConfig, num_engines: int, options: dict[str, Any]) -> None:
    if address != LOCAL:
        ray.init(address=address, **options)
        return
    wanted = ceil(num_engines * config.tensor_parallel_size * config.cpus_per_rank)
    options |= {"num_cpus": max(os.cpu_count() or 1, wanted)}  # logical ones, which are ours to choose
    for limit in RAYS_LIMITS:
        os.environ.setdefault(limit, str(ceil(config.start_timeout_s)))
    with _private_ports():
        start_patiently(
            lambda: ray.init(address=LOCAL, include_dashboard=False, **options),
            _end_of_ray(),
            config.start_timeout_s,
        )


@contextmanager
def _private_ports() -> Iterator[None]:
    """A Ray that starts meanwhile listens at 127.0.0.1 alone, as it does on systems other than Linux.

    Its agent takes any port that is free. It would have 52365, and wait for it for 3 s where another Ray has it.
    """
    parameter: Any = ray._private.parameter
    elsewhere, parameters = ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams
    ray_constants.ENABLE_RAY_CLUSTER = False
    parameter.RayParams = partial(parameters, dashboard_agent_listen_port=None)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams = elsewhere, parameters


def start_patiently(start: Callable[[], object], clear: Callable[[], None], timeout_s: float) -> None:
    """Call `start` until it succeeds. Raises its error once `timeout_s` are over, or if it did not even wait.

    Ray gives up by limits of its own, which a machine with much else to do does not keep. `clear` is called in between.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        begin = time.monotonic()
        try:
            start()
            return
        except Exception as error:
            clear()
            now = time.monotonic()
            if now >= deadline or now - begin < RAY_WAITED_S:
                raise
            words = "Ray has not started within its own limits (%s); trying again, for %.0f s at most"
            logger.warning(words, str(error).partition("\n")[0], deadline - now)


def _end_of_ray() -> Callable[[], None]:
    """What ends all processes of Ray's below this one that are not there yet, their own children included."""
    before = descendants(os.getpid())

    def end() -> None:
        new = descendants(os.getpid()) - before  # before the shutdown, after which orphans are no longer below
        ray.shutdown()
        kill({pid for pid in new | descendants(os.getpid()) - before if _is_of_ray(pid)})

    return end


def _is_of_ray(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False
    return b"/ray/" in words or words.startswith(b"ray::")


def _keep_remarks_off_standard_output() -> None:
    """Ray prints there when a process dies, where answers go; the engine says so itself, with the cause."""

    def note(data: dict[str, Any], **_: object) -> None:
        logger.debug("Ray: %s", " ".join(data.get("lines", ())))

    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = note


def _ray_place() -> dict[str, str]:
    """Where Ray is to put its files, if not where it would: its sockets' paths must not be too long.

    Raises `ValueError` if there is no such place.
    """
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    usual = os.environ.get(variable, SHORT_PLACE)
    if len(os.fsencode(usual)) <= MAX_RAY_PLACE:
        return {}
    if variable == "TMPDIR" and os.access(SHORT_PLACE, os.W_OK | os.X_OK):
        return {"_temp_dir": f"{SHORT_PLACE}/ray"}
    raise ValueError(f"{variable} is {usual}, too long for Ray's sockets; set one of at most {MAX_RAY_PLACE} bytes")


def choose_device(config: EngineConfig) -> str:
    """`auto` means the GPUs, if the cluster has any."""
    if config.device != "auto":
        return config.device
    have = ray.cluster_resources()
    return next((kind.name for kind in KINDS.values() if kind.resource and have.get(kind.resource, 0) > 0), HOST.name)


def rank_resources(config: EngineConfig, device: str) -> Resources:
    """Of one rank: its CPUs, and its device."""
    resource = kind_of(device).resource
    return {"CPU": config.cpus_per_rank} | ({} if resource is None else {resource: 1.0})


def place(config: EngineConfig, device: str, look: Callable[[], None]) -> Room:
    """Reserve a bundle per rank, close together. Raises `EngineStartError` after `placement_timeout_s`.

    `look` is called every second or so, and may raise what ends the wait.
    """
    bundle = rank_resources(config, device)
    resource = kind_of(device).resource
    if resource and not ray.cluster_resources().get(resource) and config.device == device:
        logger.warning("device is %r, but no node of the cluster has a %s yet; waiting for one", device, resource)
    group: PlacementGroup = placement_group([bundle] * config.tensor_parallel_size, strategy="PACK")
    try:
        ready = group.ready()
        deadline = time.monotonic() + config.placement_timeout_s
        while not ray.wait([ready], timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))[0]:
            look()
            if time.monotonic() >= deadline:
                raise EngineStartError(_no_room(config, bundle))
        return Room(group)
    except BaseException:
        remove_placement_group(group)
        raise


def room_here(config: EngineConfig) -> Room:
    """The placement group that this process itself was put in, whose bundles must be those of the ranks."""
    group = get_current_placement_group()
    if group is None:
        raise EngineStartError("this process is not in a placement group, which must hold the engine's ranks")
    if group.bundle_count != config.tensor_parallel_size:
        raise EngineStartError(
            f"the placement group has {group.bundle_count} bundles, but tensor_parallel_size is "
            f"{config.tensor_parallel_size}; make one bundle for each rank"
        )
    return Room(group, owned=False)


def nodes_of(group: PlacementGroup) -> list[str]:
    """The ids of the nodes that hold the bundles of a placed group, in order."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[bundle] for bundle in sorted(nodes)]


def address_for(group: PlacementGroup) -> str | None:
    """The address by which all nodes of a placed group reach this process, or None if they are all this node."""
    here = {ray.get_runtime_context().get_node_id()}
    return None if set(nodes_of(group)) == here else ray.util.get_node_ip_address()


def _no_room(config: EngineConfig, bundle: Resources) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    have = ", ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in bundle)
    size, num_nodes = config.tensor_parallel_size, len(ray.nodes())
    fits = min((int(total.get(name, 0) // amount) for name, amount in bundle.items() if amount), default=size)
    each = " each" if size > 1 else ""
    return (
        f"tensor_parallel_size {size} asks for {counted(size, 'rank')} of {_text(bundle)}{each}, but after "
        f"{config.placement_timeout_s:g} s the cluster of {counted(num_nodes, 'node')} has {have}; "
        f"{_room_remedy(size, fits, no_gpu='GPU' in bundle and not total.get('GPU'))}"
    )


def _room_remedy(size: int, fits: int, *, no_gpu: bool) -> str:
    """What makes room for `size` ranks, where a cluster with no other jobs has room for `fits`."""
    if no_gpu:
        return "add a node with GPUs, or run on CPU with --device cpu"
    if fits == 0:
        return "add nodes that are large enough for a rank, or lower cpus_per_rank"
    ways = "add nodes" if fits < size else "add nodes, end other jobs"
    if size == 1:
        return ways.replace(", ", " or ")
    return f"{ways}, or lower tensor_parallel_size" + (f" to {fits} or less" if fits < size else "")


def _text(bundle: Resources) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())
