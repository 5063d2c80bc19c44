"""`eagleray profile` with a real engine on CPU, and what it refuses."""

import json
from pathlib import Path

import pytest

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.deploy.cli import main as cli
from eagleray.deploy.profile.sizes import fill_steps
from eagleray.deploy.profile.trace import ORDER, read_trace, step_profile
from support.inline_engine import InlineEngine
from support.tiny_model import write_tiny_model
from support.toy_rank import ToyRank

pytestmark = pytest.mark.engine

SMALL = ["--threads-per-rank", "1", "--max-model-len", "256", "--kv-cache-bytes"]
OF_DEMO, OF_TINY = "20000000", "57000"  # bytes of 27 blocks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.usefixtures("ray_cluster")
def test_decode_steps_of_each_batch_size_are_profiled(
    demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--context-len", "5", "--num-steps", "2", "--batch-size", "1", "3", "--output-dir", str(tmp_path)]
    assert cli.main(["profile", str(demo_model_dir), *SMALL, OF_DEMO, *words]) == 0
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
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--context-len", "150", "--num-steps", "2", "--batch-size", "9", "--output-dir", str(tmp_path)]
    assert cli.main(["profile", str(tiny), *SMALL, OF_TINY, *words]) == 2
    shown = capsys.readouterr().err
    assert "--batch-size 9 with --context-len 150 needs 109 KV blocks of 16 tokens, but there are 27" in shown
    assert "lower the first to 2 or" in shown


@pytest.mark.usefixtures("ray_cluster")
def test_of_the_default_batch_sizes_those_run_that_fit(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--context-len", "150", "--num-steps", "2", "--output-dir", str(tmp_path)]
    assert cli.main(["profile", str(tiny), *SMALL, OF_TINY, *words]) == 0
    cases = json.loads((tmp_path / "profile.json").read_text())["cases"]
    assert [case["batch_size"] for case in cases] == [1]
    left_out = [message for message in caplog.messages if "is left out" in message]
    assert [message.split(":")[0] for message in left_out] == [
        "batch size 64 is left out",
        "batch size 256 is left out",
    ]
    assert "lower the first to 2 or" in left_out[0]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("batch_size", "context_len", "max_step_tokens", "max_chunk_tokens", "mixed_step_tokens"),
    [
        (1, 5, 8, None, None),
        (8, 64, 8, None, None),
        (8, 64, 20, None, None),
        (8, 64, 20, 3, None),
        (8, 64, 1000, 16, None),
        (9, 50, 32, 31, None),
        (8, 64, 100, None, 12),
        (8, 64, 100, 7, 12),
        (20, 64, 100, None, 8),
        (4, 200, 64, None, 64),
        (9, 50, 32, None, 1),
    ],
)
def test_the_steps_in_which_a_batch_fills_are_foretold(
    batch_size: int,
    context_len: int,
    max_step_tokens: int,
    max_chunk_tokens: int | None,
    mixed_step_tokens: int | None,
    depth: int,
) -> None:
    """Never too few: the first request must not outgrow the model. And hardly too many where chunks are not short."""
    num_blocks, block_size = 400, 4
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=batch_size,
        max_num_batched_tokens=max_step_tokens,
        max_chunk_tokens=max_chunk_tokens,
        mixed_step_tokens=mixed_step_tokens,
        enable_prefix_caching=False,
    )
    engine = InlineEngine(scheduler, ToyRank(num_blocks, block_size), depth)
    for index in range(batch_size):
        engine.add(index, [index + 1] * context_len, max_tokens=250, temperature=0.0)
    num_steps = 0
    while not all(engine.token_ids(index) for index in range(batch_size)):
        engine.turn()
        num_steps += 1
    foretold = fill_steps(batch_size, context_len, max_step_tokens, max_chunk_tokens, mixed_step_tokens)
    assert len(engine.token_ids(0)) <= num_steps <= foretold
    if max_chunk_tokens is None and mixed_step_tokens is None:
        assert foretold <= 1 + 1.5 * num_steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output-dir {folder} --context-len 250", "may grow to 352 tokens before the profile ends"),
        ("--output-dir {folder} --context-len 256", "--context-len is 256, but the model holds 256"),
        (
            "--output-dir {folder} --context-len 64 --num-steps 2 --batch-size 1 8 --max-num-seqs 8 "
            "--max-num-batched-tokens 8",
            "with --batch-size 8, --context-len 64 and --num-steps 2 a request may grow to 273 tokens before the "
            "profile ends, but the model holds 256; raise --max-model-len to 273 or",
        ),
        ("--output-dir {folder} --batch-size 1 999 --context-len 9", "--batch-size is 999"),
        ("--output-dir {folder}/file/x --context-len 9", "cannot be made: Not a directory"),
        ("--output-dir {folder} --context-len 9", "--output-dir: {folder}/profile.json cannot be written: Is a dir"),
        ("--output-dir= --context-len 9", "--output-dir: '' is not a directory; name one"),
        ("--context-len 9", "required: --output-dir"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_starts(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "profile.json").mkdir()
    try:
        code: object = cli.main(["profile", str(tiny), *SMALL, OF_TINY, *words.format(folder=tmp_path).split()])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message.format(folder=tmp_path) in err
