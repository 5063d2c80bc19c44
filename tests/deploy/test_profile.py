"""`eagleray profile` with a real engine on CPU, and what it refuses."""

import json
from pathlib import Path

import pytest

from eagleray.deploy import cli
from eagleray.deploy.profile_trace import ORDER, read_trace, step_profile

SMALL = ["--threads-per-rank", "1", "--max-model-len", "256", "--kv-cache-bytes", "20000000"]


@pytest.mark.usefixtures("ray_cluster")
def test_decode_steps_of_each_batch_size_are_profiled(
    demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--context-len", "5", "--num-steps", "2", "--batch-size", "1", "3", "--output-dir", str(tmp_path)]
    assert cli.main(["profile", str(demo_model_dir), *SMALL, *words]) == 0
    shown = capsys.readouterr().out
    cases = json.loads((tmp_path / "profile.json").read_text())["cases"]
    assert [case["batch_size"] for case in cases] == [1, 3]
    for case in cases:
        trace = read_trace(tmp_path / f"batch-{case['batch_size']}" / "rank0.json.gz")
        profile = step_profile(trace)
        assert profile.num_steps == case["profiled"]["num_steps"] >= 2
        calls = {share.name: share.calls for share in profile.kernels}
        assert calls["eagleray::attention"] == 30, "one for each layer in a step"
        assert calls["aten::embedding"] == 1
        groups = {share.name: share.us for share in profile.groups}
        assert tuple(groups) == ORDER
        assert groups["weights"] > groups["sampling"]
        assert sum(groups.values()) == pytest.approx(profile.step_us, rel=0.01), "one thread, so nothing overlaps"
        assert case["step_us"] > 0
        assert f"batch size {case['batch_size']}, 5 tokens of context: {case['step_us']:.0f} us a step" in shown
    assert "eagleray::attention" in shown
    assert "whole step" in shown


@pytest.mark.usefixtures("ray_cluster")
def test_a_batch_that_the_cache_cannot_hold_is_refused(
    demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--context-len", "150", "--num-steps", "2", "--batch-size", "9", "--output-dir", str(tmp_path)]
    assert cli.main(["profile", str(demo_model_dir), *SMALL, *words]) == 2
    assert "--batch-size 9 needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output-dir {folder} --context-len 250", "together, but the model holds 256"),
        ("--output-dir {folder} --batch-size 1 999 --context-len 9", "--batch-size is 999"),
        ("--output-dir {folder}/file/x --context-len 9", "cannot be made: Not a directory"),
        ("--context-len 9", "required: --output-dir"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_starts(
    demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (tmp_path / "file").touch()
    try:
        code: object = cli.main(["profile", str(demo_model_dir), *SMALL, *words.format(folder=tmp_path).split()])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
