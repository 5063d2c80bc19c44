"""One Ray Serve on the tests' cluster, for all applications that are deployed on it one after the other."""

import time
from collections.abc import Iterator

import pytest
from ray import serve
from ray.util.placement_group import placement_group_table

from support.processes import children_named
from support.ray_serve import ray_serve

PATIENCE_S = 90.0


@pytest.fixture(scope="package")
def serve_url(ray_cluster: None) -> Iterator[str]:
    """Its address. An application takes the place of the one before."""
    with ray_serve() as url:
        yield url


@pytest.fixture(scope="module")
def empty_serve_url(serve_url: str) -> str:
    """The same without an application, nor anything left of one."""
    for name in serve.status().applications:
        serve.delete(name)
    deadline = time.monotonic() + PATIENCE_S
    while children_named("RankActor", "CoreActor", "ServeReplica") or groups():
        assert time.monotonic() < deadline, "an application does not end"
        time.sleep(0.1)
    return serve_url


def groups() -> list[str]:
    """States of the placement groups that there are."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
