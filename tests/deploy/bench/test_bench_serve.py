"""`eagleray bench serve` against a server whose delays are known, and that notes what it did."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from eagleray.deploy.bench.arguments import add_serve
from eagleray.deploy.bench.http_load import is_here
from eagleray.deploy.bench.metrics import RequestTimes, serving_figures
from eagleray.deploy.bench.serve import WORDS, plan
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import Parser
from support.asgi_server import asgi_server
from support.slow_server import SlowServer

pytestmark = pytest.mark.slow


def bench(url: str, words: str, output: Path, code: int = 0) -> dict[str, Any]:
    """Run to the end; what it measured."""
    command = ["bench", "serve", "--base-url", f"{url}/v1", "--model", "tiny", "--output-json", str(output)]
    assert cli.main([*command, *words.split()]) == code
    content: dict[str, Any] = json.loads(output.read_text())
    (case,) = content["cases"]
    return dict(case)


def test_figures_are_those_of_what_the_server_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = SlowServer(first_s=0.2, next_s=0.05)
    words = "--num-prompts 4 --input-len 7 --output-len 5 --num-warmups 1 --goodput ttft:100000 tpot:0.001"
    with asgi_server(server) as url:
        begin = time.monotonic()
        case = bench(url, words, tmp_path / "serve.json")
        passed = time.monotonic() - begin
    warm_up, *measured = server.seen
    assert (case["num_requests"], case["num_failed"], case["errors"]) == (4, 0, {})
    assert (case["num_input_tokens"], case["num_output_tokens"], case["num_events"]) == (28, 20, 20)
    assert warm_up.body["prompt"] not in [each.body["prompt"] for each in measured]
    as_sent = serving_figures(
        RequestTimes(due=each.sent[0] - 0.2, num_input_tokens=7, tokens=each.sent) for each in measured
    )
    first, each, every = case["time_to_first_token_s"], case["time_per_output_token_s"], case["latency_s"]
    for name in ("time_to_first_token_s", "latency_s"):  # what was sent has yet to arrive
        assert case[name]["mean"] >= getattr(as_sent, name).mean
    assert 0 <= case["send_lag_s"]["mean"] <= first["mean"] - 0.2
    assert 0 < each["mean"] == pytest.approx((every["mean"] - first["mean"]) / 4)
    assert case["inter_token_latency_s"]["mean"] == pytest.approx(each["mean"])
    assert every["p99"] <= case["duration_s"] <= passed
    assert case["goodput_requests_per_s"] == 0
    assert 0 < case["client_busy_share"] < 1.5
    shown = capsys.readouterr().out
    assert "4 of 4" in shown
    assert "inter-token latency" in shown


def test_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc")
    server = SlowServer(first_s=0, next_s=0)
    words = "--num-prompts 2 --input-len 4 --output-len 3 --num-warmups 0 --api-key-env SECRET"
    with asgi_server(server) as url:
        bench(url, f"{words} --vocab-size 9 --temperature 0 --top-k 5", tmp_path / "ids.json")
        bench(url, f"{words} --endpoint chat --no-ignore-eos", tmp_path / "chat.json")
    ids, _, chat, _ = server.seen
    assert (ids.path, chat.path) == ("/v1/completions", "/v1/chat/completions")
    assert all(each.headers["authorization"] == "Bearer abc" for each in server.seen)
    assert "abc" not in (tmp_path / "ids.json").read_text()
    prompt = ids.body.pop("prompt")
    assert len(prompt) == 4
    assert set(prompt) <= set(range(9))
    streamed = {"model": "tiny", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    assert ids.body == {**streamed, "ignore_eos": True, "temperature": 0.0, "top_k": 5}
    (message,) = chat.body.pop("messages")
    assert len(message["content"].split()) == 4
    assert set(message["content"].split()) <= set(WORDS.split())
    assert chat.body == streamed


@pytest.mark.parametrize(
    ("models", "option", "asked"),
    [
        (["SmolLM2-135M-Instruct"], ["--model", "demo"], "SmolLM2-135M-Instruct"),
        (["x", "demo"], ["--model", "demo"], "demo"),
        (["some-body/tiny"], [], "some-body/tiny"),
    ],
)
def test_a_model_is_called_as_the_server_calls_it(models: list[str], option: list[str], asked: str) -> None:
    server = SlowServer(first_s=0, next_s=0, models=models)
    with asgi_server(server) as url:
        words = ["--num-prompts", "1", "--input-len", "4", "--output-len", "2"]
        assert cli.main(["bench", "serve", "--base-url", f"{url}/v1", *option, *words]) == 0
    assert {seen.body["model"] for seen in server.seen} == {asked}


@pytest.mark.parametrize(("models", "option"), [(["a", "b"], []), ([], []), (["a"], ["--model", "demo"])])
def test_which_model_is_meant_must_be_clear(
    models: list[str], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with asgi_server(SlowServer(first_s=0, next_s=0, models=models)) as url:
        assert cli.main(["bench", "serve", "--base-url", f"{url}/v1", *option]) == 2
    assert f"has these models: {', '.join(models) or 'none'}; name one with --model" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_of_the_environment_is_for_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with asgi_server(SlowServer(first_s=0, next_s=0)) as url:
        words = "--num-prompts 2 --input-len 4 --output-len 3 --num-warmups 0"
        case = bench(url.replace("127.0.0.1", host), words, tmp_path / "serve.json")
    assert (case["num_failed"], case["errors"]) == (0, {})
    assert not is_here("http://10.0.0.1:8000/v1/completions")
    assert not is_here("https://localhost.example/v1/completions")


def test_no_more_than_the_limit_run_and_waiting_for_room_is_no_delay(tmp_path: Path) -> None:
    server = SlowServer(first_s=0.3, next_s=0)
    with asgi_server(server) as url:
        case = bench(
            url, "--num-prompts 6 --input-len 2 --output-len 1 --max-concurrency 2 --num-warmups 0", tmp_path / "x"
        )
    assert server.most_running == 2
    assert case["duration_s"] >= 3 * 0.3
    assert case["time_to_first_token_s"]["p50"] >= 0.3
    # At most two run at any time, so two times the duration is all that they take: a third of it each. If their
    # waiting counted, it would be two thirds.
    assert case["time_to_first_token_s"]["mean"] < case["duration_s"] / 2


def test_requests_do_not_arrive_before_they_are_due(tmp_path: Path) -> None:
    server = SlowServer(first_s=0, next_s=0)
    words = "--num-prompts 6 --input-len 2 --output-len 1 --request-rate 5 --num-warmups 0"
    begin = time.monotonic()
    with asgi_server(server) as url:
        bench(url, words, tmp_path / "x")
    parser = Parser()
    add_serve(parser)
    due = [ask.due for ask in plan(parser.parse_args(["--model", "tiny", *words.split()]))]
    assert due[-1] > 0.3
    assert all(each.sent[0] - begin >= after for each, after in zip(server.seen, due, strict=True))


def test_failures_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = SlowServer(first_s=0, next_s=0, refused={1: 429, 2: 500, 3: 429}, cut=4)
    with asgi_server(server) as url:
        words = "--num-prompts 6 --input-len 2 --output-len 2 --max-concurrency 1 --num-warmups 0"
        case = bench(url, words, tmp_path / "x", code=1)
    assert (case["num_requests"], case["num_failed"], case["num_output_tokens"]) == (6, 4, 4)
    assert case["errors"] == {
        "HTTP 429": {"count": 2, "first": "not now"},
        "HTTP 500": {"count": 1, "first": "not now"},
        "cut off": {"count": 1, "first": "the stream ended before [DONE]"},
    }
    assert "eagleray: 2 of 6 requests failed: HTTP 429: not now\n" in capsys.readouterr().err


def test_a_silent_server_is_a_failure(tmp_path: Path) -> None:
    server = SlowServer(first_s=2, next_s=0)
    with asgi_server(server) as url:
        words = "--num-prompts 2 --input-len 2 --output-len 2 --num-warmups 0 --timeout 0.2"
        case = bench(url, words, tmp_path / "x", code=1)
    assert case["errors"]["ReadTimeout"]["count"] == 2


def test_where_nobody_listens_it_ends_with_the_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    with asgi_server(SlowServer(first_s=0, next_s=0)) as url:
        pass
    assert cli.main(["bench", "serve", "--base-url", url, "--model", "tiny"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "eagleray: 1 warm-up request failed: ConnectError: " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--base-url ftp://x", "'ftp://x' is not an address"),
        ("--base-url http://", "'http://' is not an address"),
        ("--base-url http://x:999999", "is not an address"),
        ("--base-url http://x/v1?a=b", "is not an address"),
        ("--endpoint embeddings", "invalid choice: 'embeddings'"),
        ("--timeout 0", "'0' is not a number of seconds above 0"),
        ("--max-concurrency 0", "'0' is not a whole number of at least 1"),
        ("--request-rate -1", "--request-rate is -1"),
        ("--goodput ttft:3 ttft:4", "give one limit"),
        ("--input-len-sigma 1", "give --max-model-len"),
        ("--max-model-len 100 --input-len 90 --output-len 11", "90 tokens in and 11 out, but the model holds 100"),
        ("--temperature -1", "temperature is -1"),
        ("--api-key-env NOT_SET_ANYWHERE", "--api-key-env names NOT_SET_ANYWHERE, which is not set"),
        ("--output-json /nowhere/x.json", "cannot be written"),
        ("--dataset {folder}/chats", "give --endpoint chat"),
        ("--dataset {folder}/ids --endpoint chat", "give --endpoint completions"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (tmp_path / "chats").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    (tmp_path / "ids").write_text('{"prompt": [1, 2]}\n')
    server = SlowServer(first_s=0, next_s=0)
    with asgi_server(server) as url:
        try:
            given = words.format(folder=tmp_path).split()
            code: object = cli.main(["bench", "serve", "--base-url", url, "--model", "tiny", *given])
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), server.seen) == (2, "", 1, [])
    assert message in err
