"""A rank's profiler on CPU: whole steps in one trace, and failures that the rank survives."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from eagleray.workers.profiler import RankProfiler
from eagleray.workers.protocol.messages import TRACE_NUM_STEPS, RankControl, RankReply


def profiler() -> RankProfiler:
    return RankProfiler(1, torch.device("cpu"))


def steps(profiler: RankProfiler, count: int) -> None:
    for _ in range(count):
        torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.count_step()


def is_running() -> bool:
    return torch._C._autograd._profiler_enabled()


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return content


def test_a_trace_holds_the_steps_between_start_and_stop(tmp_path: Path) -> None:
    rank, folder = profiler(), tmp_path / "made" / "if need be"
    for count in (3, 2):  # again, in place of the first
        steps(rank, 5)
        assert rank.handle(RankControl("start_profile", {"directory": str(folder)})) == RankReply(1)
        steps(rank, count)
        file = folder / "rank1.json.gz"
        assert rank.handle(RankControl("stop_profile")) == RankReply(1, str(file))
        trace = read(file)
        assert trace[TRACE_NUM_STEPS] == count
        assert sum(event["name"] == "aten::matmul" for event in trace["traceEvents"]) == count
        assert list(folder.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rank = profiler()
    answer = rank.handle(RankControl("start_profile", {"directory": str(tmp_path / "file" / "below")}))
    assert answer is not None
    assert "Not a directory" in (answer.error or "")
    assert rank.handle(RankControl("start_profile", {"directory": str(tmp_path / "folder")})) == RankReply(1)
    assert rank.handle(RankControl("stop_profile")) == RankReply(1, str(tmp_path / "folder" / "rank1.json.gz"))


def test_what_goes_wrong_at_the_end_is_an_answer_too(tmp_path: Path) -> None:
    rank = profiler()
    (tmp_path / "rank1.json.gz").mkdir()
    rank.handle(RankControl("start_profile", {"directory": str(tmp_path)}))
    answer = rank.handle(RankControl("stop_profile"))
    assert answer is not None
    assert "Is a directory" in (answer.error or "")
    assert list(tmp_path.iterdir()) == [tmp_path / "rank1.json.gz"]
    rank.handle(RankControl("start_profile", {"directory": str(tmp_path / "folder")}))
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").touch()
    answer = rank.handle(RankControl("stop_profile"))
    assert answer is not None
    assert answer.error
    assert rank.handle(RankControl("stop_profile")) == RankReply(1, error="the profiler does not run")


def test_a_dropped_profile_leaves_nothing_and_another_can_start(tmp_path: Path) -> None:
    rank = profiler()
    assert rank.handle(RankControl("drop_profile")) == RankReply(1)
    rank.handle(RankControl("start_profile", {"directory": str(tmp_path)}))
    assert is_running()
    assert rank.handle(RankControl("drop_profile")) == RankReply(1)
    assert not is_running()
    assert list(tmp_path.iterdir()) == []
    assert rank.handle(RankControl("start_profile", {"directory": str(tmp_path)})) == RankReply(1)
    rank.drop()
    assert not is_running()
