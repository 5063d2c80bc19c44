"""`eagleray bench serve` against our own server: every token is counted, and a refusal says why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from eagleray.deploy.bench.arguments import add_serve
from eagleray.deploy.bench.serve import plan
from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import Parser
from support.http_server import Server

WORDS = "--num-prompts 6 --input-len 20 --output-len 9 --range-ratio 0.5 --temperature 0 --vocab-size 256"


def bench(tiny: Server, words: str, output: Path, code: int = 0) -> dict[str, Any]:
    command = ["bench", "serve", "--base-url", f"{tiny.url}/v1", "--model", "tiny", "--output-json", str(output)]
    assert cli.main([*command, *WORDS.split(), *words.split()]) == code
    content: dict[str, Any] = json.loads(output.read_text())
    (case,) = content["cases"]
    return dict(case)


def prompt_ids(tiny: Server, body: Mapping[str, Any]) -> list[int]:
    """The tokens of what was asked, the template's included."""
    if "prompt" in body:
        return list(body["prompt"])
    text = tiny.served.tokenizer.apply_chat_template(body["messages"])
    return tiny.served.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_token_is_counted_however_many_come_in_an_event(tiny: Server, tmp_path: Path, endpoint: str) -> None:
    case = bench(tiny, f"--endpoint {endpoint} --max-concurrency 3", tmp_path / "x")
    assert (case["num_requests"], case["num_failed"]) == (6, 0)
    parser = Parser()
    add_serve(parser)
    bodies = [ask.body for ask in plan(parser.parse_args(["--model", "tiny", *WORDS.split(), "--endpoint", endpoint]))]
    assert case["num_output_tokens"] == sum(body["max_tokens"] for body in bodies)
    assert case["num_input_tokens"] == sum(len(prompt_ids(tiny, body)) for body in bodies)
    assert 6 < case["num_events"] <= case["num_output_tokens"]
    assert case["latency_s"]["p50"] >= case["time_to_first_token_s"]["p50"] > 0


def test_what_the_server_refuses_is_told(tiny: Server, tmp_path: Path) -> None:
    case = bench(tiny, "--max-concurrency 3 --output-len 900 --range-ratio 0 --num-warmups 0", tmp_path / "x", code=1)
    assert case["num_failed"] == 6
    assert "512" in case["errors"]["HTTP 400"]["first"]
