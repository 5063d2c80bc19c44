"""The benchmarks with a real engine and tiny counts: what they measure adds up, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.bench.arguments import add_throughput
from eagleray.deploy.bench.throughput import plan
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import Parser, engine_config
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

SMALL = ["--threads-per-rank", "1", "--max-model-len", "256", "--kv-cache-bytes", "50000000"]


def bench(kind: str, model: Path, words: str, output: Path) -> dict[str, Any]:
    """Run to the end; the record."""
    assert cli.main(["bench", kind, "--model", str(model), *SMALL, *words.split(), "--output-json", str(output)]) == 0
    content: dict[str, Any] = json.loads(output.read_text())
    return content


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config_only(model: Path, tmp_path: Path) -> Path:
    """A directory with nothing but the model's config.json."""
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


@pytest.mark.usefixtures("ray_cluster")
def test_latency_of_each_batch_size_adds_up(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--input-len 3 --output-len 5 --batch-size 2 1 --num-iters 2 --num-iters-warmup 1 --temperature 0"
    content = bench("latency", model, words, tmp_path / "latency.json")
    assert [case["batch_size"] for case in content["cases"]] == [2, 1]
    for case in content["cases"]:
        mean, first = case["latency_s"]["mean"], case["first_token_latency_s"]["mean"]
        assert case["time_per_output_token_s"] == pytest.approx((mean - first) / 4)
        assert case["output_tokens_per_s"] == pytest.approx(case["batch_size"] * 5 / mean)
        assert 0 < case["latency_s"]["p50"] <= case["latency_s"]["p99"]
    assert (content["settings"]["temperature"], content["engine_config"]["enable_prefix_caching"]) == (0, False)
    assert content["engine"]["device"] == "cpu"
    assert {"python", "torch", "ray", "eagleray"} <= set(content["versions"])
    assert content["hardware"]["cpu_cores"] >= 1
    shown = capsys.readouterr().out
    assert "3 tokens in, 5 out" in shown
    assert f"{content['cases'][0]['output_tokens_per_s']:.1f}" in shown


@pytest.mark.usefixtures("ray_cluster")
def test_throughput_of_a_dataset_counts_its_tokens(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text('Hello\n{"prompt": [1, 2, 3]}\n{"messages": [{"role": "user", "content": "Hello"}]}\n')
    words = f"--dataset {dataset} --output-len 4 --goodput ttft:100000 --goodput tpot:90000 --num-warmups 0"
    (case,) = bench("throughput", model, words, tmp_path / "throughput.json")["cases"]
    tokenizer = Tokenizer.from_dir(model)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert case["num_input_tokens"] == 2 * len(tokenizer.encode(chat, add_special_tokens=False)) + 3
    assert (case["num_requests"], case["num_failed"], case["num_output_tokens"]) == (3, 0, 12)
    assert case["goodput_requests_per_s"] == case["requests_per_s"] == pytest.approx(3 / case["duration_s"])
    assert case["total_tokens_per_s"] == pytest.approx(case["input_tokens_per_s"] + case["output_tokens_per_s"])
    assert case["time_to_first_token_s"]["p99"] <= case["latency_s"]["p99"]
    shown = capsys.readouterr().out
    assert "3 of 3" in shown
    assert "within ttft 100000 ms, tpot 90000 ms" in shown
    assert "inter-token latency" in shown


@pytest.mark.usefixtures("ray_cluster")
def test_requests_arrive_at_their_rate_and_no_tokenizer_is_needed(config_only: Path, tmp_path: Path) -> None:
    words = "--load-format dummy --num-prompts 6 --input-len 9 --output-len 2 --range-ratio 0.5 --request-rate 2"
    (case,) = bench("throughput", config_only, words, tmp_path / "throughput.json")["cases"]
    parser = Parser()
    add_throughput(parser)
    arguments = parser.parse_args(["--model", str(config_only), *words.split()])
    planned = plan(arguments, engine_config(arguments))
    assert (case["num_requests"], case["num_failed"]) == (6, 0)
    assert case["num_input_tokens"] == sum(len(each.prompt) for each in planned)
    assert 1.0 < planned[-1].due < case["duration_s"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("latency --batch-size 4 300", "--batch-size is 300, but --max-num-seqs lets 256"),
        ("latency --batch-size 0", "'0' is not a whole number of at least 1"),
        ("latency --input-len 200 --output-len 100", "input and output are 300 tokens together"),
        ("latency --output-json /nowhere/x.json", "--output-json: /nowhere/x.json cannot be written: No such file"),
        ("throughput --input-len 200 --output-len 100", "a request has 200 tokens in and 100 out"),
        ("throughput --input-len 9 --request-rate 0", "--request-rate is 0"),
        ("throughput --goodput tfft:3", "the names are ttft, tpot, e2el"),
        ("throughput --goodput ttft:-3", "'ttft:-3' is not a limit such as ttft:200"),
        ("throughput --input-len 9 --goodput ttft:3 tpot:5 ttft:4", "--goodput has ttft:3 and ttft:4; give one limit"),
        ("throughput --input-len 9 --goodput ttft:3 --goodput ttft:4", "--goodput has ttft:3 and ttft:4; give one"),
        ("throughput --dataset x --input-len 3", "leave out --input-len"),
        ("throughput --dataset /nowhere", "--dataset /nowhere cannot be read"),
        ("throughput --dataset {folder}", "--dataset {folder} cannot be read: Is a directory"),
        ("throughput --dataset {folder}/binary", "--dataset {folder}/binary is not UTF-8"),
        ("throughput --dataset {folder}/empty", "--dataset {folder}/empty holds no prompt"),
        ("throughput --dataset {folder}/odd", "--dataset {folder}/odd, line 2 is"),
        ("throughput --input-len 9 --temperature -1", "temperature is -1"),
        ("speed", "there is no command 'speed'"),
        ("", "which command? latency, throughput, serve"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "odd").write_text('Hello\n{"prompt": 5}\n')
    kind, *others = words.format(folder=tmp_path).split() or [""]
    command = ["bench", kind, "--model", str(config_only), *SMALL, *others] if kind else ["bench"]
    try:
        code: object = cli.main(command)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message.format(folder=tmp_path) in err
