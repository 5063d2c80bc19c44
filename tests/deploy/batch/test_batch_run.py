"""A batch around its engines: rows in flight, those of an engine that dies, and where files are."""

import asyncio
import errno
import io
import logging
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.deploy.batch import progress as batch_progress
from eagleray.deploy.batch import run as batch_run
from eagleray.deploy.batch.input import read_lines, survey
from eagleray.deploy.batch.journal import Identity, Journal
from eagleray.deploy.batch.progress import BatchProgress
from eagleray.deploy.batch.replica import AppReplica
from eagleray.deploy.batch.rows import Answer, Line
from eagleray.deploy.batch.run import BatchRun
from eagleray.deploy.batch.storage import Places
from support.batch_files import read_results, row, write_rows

NUM_ROWS = 60
POISON = "poison"


class Server:
    """A tiny app instead of a model: it repeats what it is asked, and dies after so many answers or of a poison."""

    def __init__(self, dies_after: int | None = None, max_restarts: int = 0) -> None:
        self.num_running = self.most_running = self.num_answers = self.num_restarts = self.num_steps = 0
        self._dies_after = dies_after
        self._max_restarts = max_restarts
        self._dead = False
        routes = [Route(url, self._answer, methods=["POST"]) for url in ("/v1/completions", "/v1/chat/completions")]
        self._replica = AppReplica(Starlette(routes=routes))

    async def answer(self, url: str, body: bytes, number: int) -> Answer:
        return await self._replica.answer(url, body)

    async def num_unfinished_tokens(self) -> int:
        return self.num_steps

    async def restart(self) -> None:
        if self.num_restarts == self._max_restarts:
            raise EngineStartError("no GPU is left")
        await asyncio.sleep(0)
        self._dead = False
        self._dies_after = None if self._dies_after else self._dies_after  # 0 is always
        self.num_restarts += 1

    async def _answer(self, request: Request) -> JSONResponse:
        asked = await request.json()
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for _ in range(asked["max_tokens"]):
            await asyncio.sleep(0)
            self.num_steps += 1
        self.num_running -= 1
        self.num_answers += 1
        if asked.get("user") == POISON or (self._dies_after is not None and self.num_answers > self._dies_after):
            self._dead = True
        if self._dead:
            return JSONResponse({"error": {"message": "rank 1 is gone"}}, 503)
        return JSONResponse({"id": "cmpl-1", "asked": asked, "usage": {"completion_tokens": 2}})


@pytest.fixture
def input(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    write_rows(file, (row(index) for index in range(NUM_ROWS)))
    return file


async def answered(input: Path, servers: list[Server], window: int) -> tuple[BatchProgress, list[int]]:
    """Run it; how far a reader of the input was ahead of the results, at each line."""
    known = survey(input)
    progress = BatchProgress(Console(file=io.StringIO()), known.num_rows, 0, 0)
    ahead: list[int] = []

    def watched() -> Iterator[Line]:
        for line in read_lines(input, known):
            ahead.append(line.number - progress.num_done)
            yield line

    with Journal(input.with_name("out.jsonl.partial"), Identity(known.size, known.sha256, "m")) as journal:
        await BatchRun(watched(), journal, progress).run(servers, window)
    return progress, ahead


def requests(input: Path) -> list[object]:
    """What each row asked, in the order of the rows."""
    results = read_results(input.with_name("out.jsonl.partial"))
    by_id = {result["custom_id"]: result["response"]["body"]["asked"] for result in results}
    assert len(by_id) == len(results) == NUM_ROWS
    return [by_id[f"row {index}"] for index in range(NUM_ROWS)]


async def test_rows_in_flight_are_bounded_and_every_replica_has_some(input: Path) -> None:
    servers = [Server(), Server()]
    progress, ahead = await answered(input, servers, window=5)
    assert requests(input) == [row(index)["body"] for index in range(NUM_ROWS)]
    assert max(ahead) <= 10
    assert [server.most_running for server in servers] == [5, 5]
    assert (progress.num_done, progress.num_failed, progress.num_tokens) == (NUM_ROWS, 0, 2 * NUM_ROWS)


async def test_rows_of_a_replica_that_dies_go_to_the_others(input: Path) -> None:
    servers = [Server(dies_after=7), Server()]
    await answered(input, servers, window=5)
    assert requests(input) == [row(index)["body"] for index in range(NUM_ROWS)]
    assert servers[1].num_answers == NUM_ROWS - 7


async def test_a_replica_that_dies_last_leaves_its_rows_to_those_that_were_done(input: Path) -> None:
    servers = [Server(dies_after=0), Server()]
    write_rows(input, [row(0, max_tokens=500), *(row(index) for index in range(1, NUM_ROWS))])
    await answered(input, servers, window=1)
    assert len(requests(input)) == NUM_ROWS
    assert servers[1].num_answers == NUM_ROWS


async def test_the_last_replicas_death_ends_the_job_and_keeps_what_is_done(input: Path) -> None:
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        await answered(input, [Server(dies_after=3), Server(dies_after=4)], window=5)
    assert len(read_results(input.with_name("out.jsonl.partial"))) == 7


@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("poisoned", [(0,), (37,), (59,), (3, 4, 50)], ids=str)
@pytest.mark.parametrize("num_servers", [1, 3])
async def test_rows_that_kill_engines_are_found_and_fail_alone(
    input: Path, window: int, poisoned: tuple[int, ...], num_servers: int
) -> None:
    bodies = [{"user": POISON} if index in poisoned else {} for index in range(NUM_ROWS)]
    write_rows(input, [row(index, **bodies[index]) for index in range(NUM_ROWS)])
    servers = [Server(max_restarts=100) for _ in range(num_servers)]
    progress, _ = await answered(input, servers, window)
    results = read_results(input.with_name("out.jsonl.partial"))
    assert sorted(result["custom_id"] for result in results) == sorted(f"row {index}" for index in range(NUM_ROWS))
    failed = {result["custom_id"]: result for result in results if result["response"]["status_code"] != 200}
    assert failed.keys() == {f"row {index}" for index in poisoned}
    for result in failed.values():
        assert (result["response"]["status_code"], result["error"]) == (500, None)
        error = result["response"]["body"]["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_died")
        assert error["message"].startswith("2 engines died while they ran this row and no other; the last cause: ")
        assert "rank 1 is gone" in error["message"]
    assert progress.num_failed == len(poisoned)
    assert sum(server.num_restarts for server in servers) <= 6 * len(poisoned)


async def test_an_engine_that_dies_by_chance_is_replaced_and_no_row_fails(input: Path) -> None:
    server = Server(dies_after=7, max_restarts=1)
    await answered(input, [server], window=16)
    assert requests(input) == [row(index)["body"] for index in range(NUM_ROWS)]


async def test_engines_that_only_die_end_the_job_and_no_row_is_blamed(input: Path) -> None:
    server = Server(dies_after=0, max_restarts=100)
    with pytest.raises(EngineDeadError, match=r"10 engines died one after the other, and answered no row: .*rank 1"):
        await answered(input, [server], window=100)
    assert server.num_restarts == 9
    assert not input.with_name("out.jsonl.partial").exists()


async def test_a_disk_that_fails_ends_the_job_while_rows_run(input: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is kept; the row that never ends would be waited for otherwise."""
    write_rows(input, [row(0, max_tokens=10**12), *(row(index) for index in range(1, NUM_ROWS))])
    partial = input.with_name("out.jsonl.partial")
    sync = os.fsync

    def fails_once_the_others_are_done(file: int) -> None:
        if partial.exists() and os.path.samestat(os.fstat(file), partial.stat()):
            if len(read_results(partial)) == NUM_ROWS - 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return
        sync(file)

    monkeypatch.setattr(os, "fsync", fails_once_the_others_are_done)
    monkeypatch.setattr(batch_run, "SYNC_S", 0.001)
    with pytest.raises(OSError, match=r"Input/output error; results cannot be written, .*out\.jsonl\.partial"):
        await asyncio.wait_for(answered(input, [Server()], window=5), 60)
    assert len(read_results(partial)) == NUM_ROWS - 1


async def test_the_log_says_how_far_it_is_even_when_no_row_ends(
    input: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(input, [row(0, max_tokens=10**12), row(1), row(2), {"custom_id": "bad"}])
    monkeypatch.setattr(batch_run, "LOOK_S", 0.001)
    monkeypatch.setattr(batch_progress, "LOG_EVERY_S", 0.01)
    form = r"3 of 4 rows · 1 running · 1 failed · [1-9][0-9.]* tokens/s · \d:\d\d:\d\d left"
    with caplog.at_level(logging.INFO, "eagleray"):
        job = asyncio.create_task(answered(input, [Server()], window=5))
        while not job.done() and sum(bool(re.fullmatch(form, message)) for message in caplog.messages) < 3:
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job


async def test_a_full_disk_ends_the_job_while_rows_run(input: Path) -> None:
    write_rows(input, [row(0, max_tokens=10**12), *(row(index) for index in range(1, NUM_ROWS))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large; results cannot be written, .*out\.jsonl\.partial"):
            await asyncio.wait_for(answered(input, [Server()], window=5), 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert input.with_name("out.jsonl.partial").stat().st_size == 4000


def test_an_output_in_an_object_store_needs_a_work_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a directory on a disk that outlasts the job with --work-dir"):
        Places.of("in.jsonl", "s3://bucket/out.jsonl", None)


@pytest.mark.parametrize(
    ("place", "message"),
    [("s3://bucket/in.jsonl", r"pip install 'eagleray\[s3\]'"), ("x9://in", "cannot be reached: Protocol not known")],
)
def test_what_an_object_store_needs_is_named(
    tmp_path: Path, place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ValueError, match=message):
        Places.of(place, str(tmp_path / "out.jsonl"), None)


def test_objects_are_fetched_and_published_whole(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    files = MemoryFileSystem()
    files.pipe_file("/bucket/in.jsonl", b'{"custom_id": "a"}\n')
    places = Places.of("memory://bucket/in.jsonl", "memory://bucket/out.jsonl", tmp_path)
    assert places.fetch().read_bytes() == b'{"custom_id": "a"}\n'
    assert not places.output_exists()
    places.partial.write_bytes(b"results\n")
    places.publish(places.partial)
    places.clean()
    assert (places.output_exists(), files.cat_file("/bucket/out.jsonl")) == (True, b"results\n")
    assert list(tmp_path.iterdir()) == []
    missing = Places.of("memory://bucket/none.jsonl", "memory://bucket/out.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"the input memory://bucket/none\.jsonl cannot be read"):
        missing.fetch()


def test_a_work_directory_may_be_on_another_disk(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk only")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        places = Places.of("in.jsonl", str(tmp_path / "out.jsonl"), Path(folder))
        places.partial.write_bytes(b"results\n")
        places.publish(places.partial)
        assert list(Path(folder).iterdir()) == []
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.jsonl", b"results\n")]


def test_on_another_disk_the_output_is_durable_before_the_only_other_copy_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure at any moment leaves one of them: bytes are synced, then the name, then the copy goes."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk only")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        output = tmp_path / "out.jsonl"
        places = Places.of("in.jsonl", str(output), Path(folder))
        places.partial.write_bytes(b"results\n")
        synced: list[tuple[str, bool, bool]] = []
        sync = os.fsync

        def watched(file: int) -> None:
            name = Path(os.readlink(f"/proc/self/fd/{file}"))
            what = "folder" if name == tmp_path else "bytes" if name.parent == tmp_path else "work directory"
            synced.append((what, output.exists(), places.partial.exists()))
            sync(file)

        monkeypatch.setattr(os, "fsync", watched)
        places.publish(places.partial)
    assert synced[:2] == [("bytes", False, True), ("folder", True, True)]
    assert synced[-1] == ("work directory", True, False)


def test_an_output_that_cannot_be_written_to_another_disk_is_kept_where_it_is(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk only")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        places = Places.of("in.jsonl", str(tmp_path / "out.jsonl"), Path(folder))
        places.partial.write_bytes(b"results\n" * 1000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        try:
            with pytest.raises(ValueError, match=r"out\.jsonl cannot be written: .*; all results are in .*partial"):
                places.publish(places.partial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert places.partial.stat().st_size == 8000
    assert list(tmp_path.iterdir()) == []


def test_results_that_an_object_store_refuses_are_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = Places.of("in.jsonl", f"file://{tmp_path}/file/out.jsonl", tmp_path)
    places.partial.write_bytes(b"results\n")
    with pytest.raises(ValueError, match=r"cannot be written: .*; all results are in .*out\.jsonl\.partial"):
        places.publish(places.partial)
    assert places.partial.read_bytes() == b"results\n"


def test_directories_are_there_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no directory .*/none to keep results in; create it"):
        Places.of("in.jsonl", str(tmp_path / "none" / "out.jsonl"), tmp_path)


def test_outputs_of_one_name_do_not_meet_in_a_work_directory(tmp_path: Path) -> None:
    places = [Places.of("in.jsonl", f"memory://{bucket}/out.jsonl", tmp_path) for bucket in "ab"]
    assert places[0].partial != places[1].partial
