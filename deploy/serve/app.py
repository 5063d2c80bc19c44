"""The Ray Serve application: `serve run eagleray.deploy.serve.app:build model=DIR`, and the same from YAML."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from math import inf
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.generation_config import chosen_defaults
from eagleray.cluster.runtime.engine_client import EngineClient
from eagleray.cluster.runtime.launch import launch
from eagleray.cluster.runtime.placement import Room, choose_device, rank_resources, room_here
from eagleray.cluster.runtime.resolve import folder_of, found
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.middleware.admission import ApiKeys, BoundedQueue
from eagleray.deploy.openai.middleware.bodies import BodyLimit
from eagleray.deploy.openai.middleware.cors import cross_origin
from eagleray.deploy.openai.middleware.playground import Playground
from eagleray.deploy.openai.middleware.probes import Figures, Health
from eagleray.deploy.openai.middleware.request_ids import RequestIds
from eagleray.deploy.openai.middleware.timing import HttpTime
from eagleray.deploy.openai.request_context import RETRY_AFTER_S
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.serve.config import ServeArgs, in_one_line
from eagleray.deploy.serve.metrics import Metrics
from eagleray.deploy.serve.progress import ProgressReporter
from eagleray.deploy.serve.startup import BEFORE_ENGINE
from eagleray.workers.protocol.garbage import freeze_startup

logger = logging.getLogger(__name__)

SPARE_REQUESTS = 10_000  # that Serve lets through beyond a replica's own limit, which refuses them in OpenAI's shape
LOOK_S = 1.0  # between two looks at the engine's state
LAST_ANSWERS_S = 1.0  # for what a dead engine's requests are told


class ArgsError(RayServeException, ValueError):
    """An option that cannot work. Serve hands on the words of its own kind of error, and does not try again."""


def build(args: dict[str, Any] | ServeArgs) -> serve.Application:
    """The application: replicas of one engine each, whose ranks are bundles of the replica's placement group.

    So Serve and the autoscaler see all that a replica needs before it starts. Raises `ArgsError` for options
    that cannot work, in one line; the model itself is looked at where it is, by the replica.
    """
    try:
        return _build(args if isinstance(args, ServeArgs) else ServeArgs.model_validate(args))
    except ValidationError as error:
        raise ArgsError(in_one_line(error)) from None
    except ValueError as error:
        raise ArgsError(str(error)) from None


def _build(args: ServeArgs) -> serve.Application:
    bound = args.without_keys()  # what Serve keeps, and others see
    engine = args.engine
    if engine.device == "auto" and not ray.is_initialized():
        raise ValueError("device is 'auto', but there is no Ray cluster to look for GPUs in; say 'cuda' or 'cpu'")
    bundle = rank_resources(engine, choose_device(engine))
    max_requests = 2 * (engine.max_num_seqs + args.max_queued_requests)  # where keys have shares of their own, too
    scaling = args.autoscaling_config
    if scaling is not None:
        scaling = {"target_ongoing_requests": max(1, engine.max_num_seqs // 2)} | scaling
    deployment = serve.deployment(
        name="eagleray",
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle] * engine.tensor_parallel_size,
        placement_group_strategy="PACK",
        max_ongoing_requests=max_requests + SPARE_REQUESTS,
        max_queued_requests=max_requests + SPARE_REQUESTS,  # at a proxy, while no replica is there
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        health_check_period_s=args.health_check_period_s,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
        graceful_shutdown_wait_loop_s=min(1.0, args.drain_timeout_s),
        max_surge_percent=args.max_surge_percent,
        **({"num_replicas": args.num_replicas} if scaling is None else {"autoscaling_config": scaling}),
    )
    application: serve.Application = deployment(serve.ingress()(Replica)).bind(*bound)
    return application


class Replica:
    """One engine and its HTTP application. It takes no resources itself: it sits beside rank 0, in its bundle."""

    async def __init__(self, args: ServeArgs, key_digests: Sequence[bytes] = ()) -> None:  # type: ignore[misc]  # Serve awaits it
        begin = time.monotonic()
        _log_to_stderr()
        _listen_here_only()
        engine_config = await asyncio.to_thread(found, args.engine)
        self._args = args = args.model_copy(update={"engine": engine_config})
        self._metrics = Metrics()
        self._keys, self._key_digests = args.read_api_keys(), key_digests
        self._defaults = chosen_defaults(folder_of(args.engine), args.generation_config)
        here = serve.get_replica_context()
        launched = partial(_launch, args.engine, room_here(args.engine), self._metrics)
        engine, front_end = await asyncio.to_thread(launched, ProgressReporter(here.app_name), here.rank.rank)
        self._info = engine.info
        before = time.monotonic() - begin - sum(engine.info.start.seconds.values())
        self._metrics.start({BEFORE_ENGINE: before} | engine.info.start.seconds)
        self._llm = AsyncClient(engine, front_end)
        self._llm.check_health(args.stall_timeout_s)  # from now on a death is noticed
        self._looks = asyncio.create_task(self._look_often(), name="eagleray metrics")
        self._created = int(time.time())
        freeze_startup()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve mounts."""
        args = self._args
        served = ServedModel(
            engine=self._llm,
            model_name=args.model_name,
            max_model_len=self._info.max_model_len,
            created=self._created,
            defaults=self._defaults,
            allow_priority=args.allow_priority,
            root=args.engine.model,
        )
        max_sequences = args.engine.max_num_seqs + args.max_queued_requests
        num_keys = len(self._keys) + len(self._key_digests)
        app: ASGIApp = BoundedQueue(make_app(served), max_sequences, num_tenants=max(1, num_keys))
        app = BodyLimit(app, args.max_body_bytes)
        if args.guard_all:
            app = Figures(Playground(app), self._metrics_text)
        app = ApiKeys(app, self._keys, self._key_digests)
        app = HttpTime(cross_origin(RequestIds(app, reply=False), args.allowed_origins), self._metrics.observe_http)
        if not args.guard_all:
            app = Figures(Playground(app), self._metrics_text)
        return Health(app, self.check_health)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica after three failures. Raises `EngineDeadError`.

        A late step may yet end. A replica whose engine is dead does not wait for that; see `_end_if_dead`.
        """
        self._llm.check_health(self._args.stall_timeout_s)

    def __del__(self) -> None:
        """Called by Ray Serve once the replica's requests have ended, or may not go on."""
        if hasattr(self, "_llm"):
            self._looks.cancel()
            self._llm.close()

    def _metrics_text(self) -> bytes:
        self._look()
        return self._metrics.text()

    def _look(self) -> None:
        self._metrics.look(self._llm.stats, idle=self._llm.num_requests == 0)

    async def _look_often(self) -> None:
        while True:
            self._look()
            await self._end_if_dead()
            await asyncio.sleep(LOOK_S)

    async def _end_if_dead(self) -> None:
        """Without an engine this process only draws requests, since none is refused as fast. Serve sees it end."""
        try:
            self._llm.check_health(max_silence_s=inf)
        except EngineDeadError as error:
            logger.error("this replica ends, since its engine has: %s", error)
            await asyncio.sleep(LAST_ANSWERS_S)
            os._exit(1)


def _launch(
    config: EngineConfig, room: Room, metrics: Metrics, reporter: ProgressReporter, replica: int
) -> tuple[EngineClient, FrontEnd]:
    return launch(
        config,
        room=room,
        on_end=metrics.end,
        on_progress=reporter,
        replica=replica,
        generation_config="none",  # the replica asks for the model's itself
    )


def _listen_here_only() -> None:
    """Serve's proxies hand requests to replicas over gRPC, pickled: anyone who reaches that port can run code here.

    Serve listens on all addresses; one is enough, that by which other nodes know this one.
    """
    replica: Any = import_module("ray.serve._private.replica")  # which has no types
    listen = replica.add_port_to_grpc_server
    here = ray.util.get_node_ip_address()
    address = f"[{here}]:0" if ":" in here else f"{here}:0"
    replica.add_port_to_grpc_server = lambda server, _: listen(server, address)


def _log_to_stderr() -> None:
    """Ray keeps a replica's standard error with its logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("eagleray")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
