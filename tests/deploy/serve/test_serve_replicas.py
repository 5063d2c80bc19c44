"""Replicas that come and go on a real local Ray Serve: none at rest, one that dies, and an update under load."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve
from ray.util.placement_group import placement_group_table

from support.http_streams import Stream
from support.processes import children_named
from support.ray_serve import deploy as deploy_model
from support.tiny_model import write_tiny_model

PATIENCE_S = 90.0
TWO_LOOKS_S = 15.0  # of Serve, which replaces a replica after three at the earliest
ACTORS = ("RankActor", "CoreActor", "ServeReplica")
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "cpus_per_rank": 0.1,
    "threads_per_rank": 1,
    "kv_cache_bytes": 8_000_000,
    "served_model_name": "tiny",
    "max_num_seqs": 8,
    "health_check_period_s": 10,
    "drain_timeout_s": 90,
}
SHORT = {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
LONG = SHORT | {"max_tokens": 1000}
QUICK = {"upscale_delay_s": 0, "downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.2}
NONE_AT_REST = {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1} | QUICK}
TWO_OTHERS = {"num_replicas": 2, "served_model_name": "other", "max_model_len": 2000, "seed": 7}

Deploy = Callable[..., None]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field"),  # whose successor is for whole clusters
]


@pytest.fixture(scope="module")
def url(empty_serve_url: str) -> str:
    return empty_serve_url


@pytest.fixture(scope="module")
def deploy(url: str, tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    """Deploys the application, or updates it, unless it is as wanted, and waits for it."""
    model = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    deployed: dict[str, Any] = {}

    def run(**options: Any) -> None:
        if options != deployed:
            deploy_model(model, OPTIONS | options)
            deployed.clear()
            deployed.update(options)

    return run


def processes(*names: str) -> list[int]:
    """Processes of engines and replicas."""
    return [process.pid for process in children_named(*(names or ACTORS))]


def groups() -> list[str]:
    """States of the placement groups that there are."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def until(what: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.1)


def complete(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)


def states() -> list[str]:
    """Of the replicas, as Serve tells them."""
    deployments = serve.status().applications["default"].deployments.values()
    return [state for each in deployments for state, count in each.replica_states.items() for _ in range(count)]


def test_at_rest_there_is_no_replica_and_a_request_starts_one_for_as_long_as_it_is_needed(
    url: str, deploy: Deploy
) -> None:
    deploy(**NONE_AT_REST)
    assert httpx.get(f"{url}/-/healthz", timeout=PATIENCE_S).status_code == 200, "Serve's own, which wakes nobody"
    assert (processes(), groups()) == ([], [])
    assert complete(url, SHORT).json()["usage"]["completion_tokens"] == 3
    assert len(processes()) == len(ACTORS)
    until(lambda: not processes() and not groups())
    assert complete(url, SHORT).status_code == 200


def test_an_update_cuts_no_stream_refuses_none_and_ends_in_the_new_configuration(url: str, deploy: Deploy) -> None:
    deploy(**NONE_AT_REST)
    streams: list[Stream] = []
    updated = threading.Event()

    def keep_streaming() -> None:
        while not updated.is_set():
            streams.append(stream := Stream(url, LONG))
            stream.run()

    clients = [threading.Thread(target=keep_streaming) for _ in range(2)]
    for client in clients:
        client.start()
    until(lambda: len(streams) == 2 and all(len(stream.events) > 3 for stream in streams))
    old = processes()
    deploy(**TWO_OTHERS)
    until(lambda: states() == ["RUNNING"] * 2 and not set(processes()) & set(old))
    updated.set()
    for client in clients:
        client.join()
    assert [stream.end for stream in streams] == ["length"] * len(streams)
    assert {stream.model for stream in streams} == {"tiny", "other"}
    (model,) = httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("other", 2000)


def test_replicas_draw_independently_even_if_they_are_given_one_seed(url: str, deploy: Deploy) -> None:
    deploy(**TWO_OTHERS)
    sampled = {"prompt": "a", "max_tokens": 12, "ignore_eos": True, "temperature": 1}
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda _: complete(url, sampled).json()["choices"][0]["text"], range(40)))
    assert len(set(answers)) == 40


def test_a_replica_whose_rank_dies_is_replaced_while_the_other_serves_on(url: str, deploy: Deploy) -> None:
    deploy(**TWO_OTHERS)
    before = processes("RankActor")
    assert len(before) == 2
    streams = [Stream(url, LONG) for _ in range(4)]
    for stream in streams:
        stream.start()
    until(lambda: all(len(stream.events) > 3 for stream in streams))
    replicas = processes("ServeReplica")
    os.kill(before[0], signal.SIGKILL)
    until(lambda: not set(replicas) <= set(processes("ServeReplica")), TWO_LOOKS_S)
    answers = []

    def replaced() -> bool:
        answers.append(complete(url, SHORT).status_code)
        return len(processes("RankActor")) == 2 and states() == ["RUNNING"] * 2

    until(replaced)
    assert set(answers) == {200}, "who has no engine draws no requests"
    for stream in streams:
        stream.join()
    ends = [stream.end for stream in streams]
    assert 0 < ends.count("length") < 4, "each replica had some"
    assert all(end == "length" or "its process is gone" in str(end) for end in ends)
    assert [complete(url, SHORT).status_code for _ in range(10)] == [200] * 10
    assert before[1] in processes("RankActor")
