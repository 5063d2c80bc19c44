"""A tokenizer is read while an engine starts: what is wrong with it is said, and no process outlives a failed start."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from eagleray import EngineConfig, EngineStartError
from eagleray.cluster.frontend.chat_renderer import chat_renderer
from eagleray.cluster.runtime.launch import launch
from eagleray.workers.protocol.startup import Progress
from support.processes import children_named
from support.small_engine import CONFIG, KV_CACHE_BYTES
from support.tiny_model import write_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]

PATIENCE_S = 30.0
MANY = 2_000_000  # words that take seconds to read
BROKEN = r"tokenizer\.json cannot be read as a tokenizer"


@pytest.fixture
def no_renderer() -> Iterator[None]:
    """As in a process that has not asked for a chat template yet."""
    chat_renderer.cache_clear()
    yield
    chat_renderer.cache_clear()


def broken_at_its_end(folder: Path) -> Path:
    """A tokenizer that is found to be none when a start is on its way."""
    vocab = ",".join(f'"word {number}": {number}' for number in range(MANY))
    (folder / "tokenizer.json").write_text(f'{{"model": {{"type": "WordLevel", "vocab": {{{vocab}}}}}, "decoder": 1}}')
    return folder


def with_chat_template(folder: Path, num_words: int) -> Path:
    """A model whose chat template needs a process, and whose tokenizer has so many words more."""
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 258}))
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    about["model"]["vocab"] |= {f"word {number}": 1000 + number for number in range(num_words)}
    file.write_text(json.dumps(about))
    return folder


def config(folder: Path, **options: Any) -> EngineConfig:
    small: dict[str, Any] = {"load_format": "dummy", "threads_per_rank": 1, "kv_cache_bytes": KV_CACHE_BYTES}
    return EngineConfig(model=str(folder), **small | options)


def wait_for_the_reader() -> None:
    for thread in threading.enumerate():
        if thread.name == "tokenizer":
            thread.join()


def template_processes() -> set[psutil.Process]:
    return set(children_named("template_process"))


def test_it_ends_a_start_that_waits_for_room(tmp_path: Path, model_dir: Path) -> None:
    before, begin = placement_group_table().keys(), time.monotonic()
    with pytest.raises(ValueError, match=BROKEN):
        launch(config(model_dir, cpus_per_rank=100.0, placement_timeout_s=200.0), broken_at_its_end(tmp_path))
    assert time.monotonic() - begin < 100
    groups = placement_group_table()
    left = {groups[name]["state"] for name in groups.keys() - before}
    assert left <= {"REMOVED"}, "none at all if the tokenizer was read before there was one"


def test_it_is_what_is_said_of_a_start_that_fails_for_another_reason_too(tmp_path: Path, model_dir: Path) -> None:
    def fail_once_it_is_read(_: Progress) -> None:
        wait_for_the_reader()
        raise EngineStartError("there is no room")

    with pytest.raises(ValueError, match=BROKEN) as caught:
        launch(config(model_dir), broken_at_its_end(tmp_path), on_progress=fail_once_it_is_read)
    assert isinstance(caught.value.__context__, EngineStartError)


def test_an_interrupt_stays_one(tmp_path: Path, model_dir: Path) -> None:
    def interrupt(_: Progress) -> None:
        wait_for_the_reader()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(config(model_dir), broken_at_its_end(tmp_path), on_progress=interrupt)


@pytest.mark.usefixtures("no_renderer")
@pytest.mark.parametrize("num_words", [0, MANY], ids=["read before", "read after"])
def test_no_process_for_chat_templates_is_left_of_a_start_that_fails(tmp_path: Path, num_words: int) -> None:
    before = template_processes()
    with pytest.raises(ValueError, match="max_model_len"):
        launch(config(with_chat_template(tmp_path, num_words), max_model_len=10**9))
    assert not template_processes() - before, "at once"
    wait_for_the_reader()
    assert not template_processes() - before, "nor later"


@pytest.mark.usefixtures("no_renderer")
def test_one_that_others_use_stays(tmp_path: Path) -> None:
    folder = with_chat_template(tmp_path, 0)
    before = template_processes()
    assert chat_renderer().warm_up()
    deadline = time.monotonic() + PATIENCE_S
    while not (mine := template_processes() - before):  # the kernel says a moment later how it was called
        assert time.monotonic() < deadline
    with pytest.raises(ValueError, match="max_model_len"):
        launch(config(folder, max_model_len=10**9))
    assert mine <= template_processes()
    assert chat_renderer().render("{{ messages[0].role }}", [{"role": "user"}], {}) == "user"
    chat_renderer().end_unused()
    assert mine <= template_processes(), "it has been used"


@pytest.mark.usefixtures("no_renderer")
def test_a_process_that_cannot_start_is_said_before_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Progress] = []
    folder = with_chat_template(tmp_path, 0)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        launch(config(folder), on_progress=heard.append)
    assert heard == []
    assert ray.is_initialized()
