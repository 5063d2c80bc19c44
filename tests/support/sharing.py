"""Which tests run on one worker of pytest-xdist: those that share an engine, a server, a cluster or a pool of ranks."""

from typing import Any

import pytest

# By the beginnings of their files' names; the groups that take longest come first. All others go a file at a time.
SHARING = {
    "cluster": ["cluster/runtime", "deploy/openai", "deploy/bench", "deploy/profile", "test_demo_model_against"],
    "commands": ["deploy/cli", "deploy/serve/test_serve_command", "deploy/serve/test_serve_host"],  # Rays of their own
    "batch": ["deploy/batch"],
    "serve": [f"deploy/serve/test_{name}" for name in ("many_", "serve.", "serve_demo", "serve_replicas", "serve_run")],
    "sampling": ["workers/sampling/test_reference"],  # shares nothing, but is the longest without an engine
    "ranks": ["models/test_against", "models/test_compile", "models/test_sinks", "parallel/test_collectives"],
}
GROUPS = list(SHARING)


def group_of(nodeid: str) -> str:
    """One of `GROUPS`, or the file."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, places in SHARING.items() if file.startswith(tuple(places))), file)


def place(item: pytest.Item) -> tuple[int, bool, bool]:
    """Groups come first, then files that start engines, then slow ones: at the end, a long one leaves a worker idle."""
    group = group_of(item.nodeid)
    place_of_group = GROUPS.index(group) if group in GROUPS else len(GROUPS)
    file = item.getparent(pytest.Module)
    is_slow = file is not None and any(mark.name == "slow" for mark in file.own_markers)
    return place_of_group, item.get_closest_marker("engine") is None, not is_slow


def scheduler(config: pytest.Config, log: Any) -> Any:
    """In place of `--dist loadgroup`, which with pytest 9.2 ignores groups: pytest-xdist's issue 1386."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # in the order of the tests, and not the fullest group first
    return Scheduler(config, log)
