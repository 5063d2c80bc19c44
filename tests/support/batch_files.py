"""Inputs of batch jobs, and what is to be true of their outputs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def row(index: int, **body: Any) -> dict[str, Any]:
    """A completion or a conversation in turn, greedy; `body` changes it."""
    what: dict[str, Any]
    if index % 2:
        url, what = "/v1/completions", {"prompt": f"Number {index} is"}
    else:
        url, what = "/v1/chat/completions", {"messages": [{"role": "user", "content": f"What is {index}?"}]}
    request = {**what, "max_tokens": 4 + index % 9, "temperature": 0, "ignore_eos": True, **body}
    return {"custom_id": f"row {index}", "method": "POST", "url": url, "body": request}


NUM_ROWS = 80  # that are answered
BAD: list[tuple[str, str | None, str | None]] = [  # rows that are not: the line, the custom_id, and the error's code
    ('{"custom_id": ', None, "invalid_row"),
    ('{"custom_id": "no body", "method": "POST", "url": "/v1/completions"}', "no body", "invalid_row"),
    (json.dumps(row(0)), "row 0", "duplicate_custom_id"),
    (json.dumps({**row(2), "custom_id": "m", "method": "GET"}), "m", "invalid_method"),
    (json.dumps({**row(2), "custom_id": "u", "url": "/v1/embeddings"}), "u", "invalid_url"),
    (json.dumps({**row(2, stream=True), "custom_id": "s"}), "s", "invalid_stream"),
    (json.dumps({**row(2, tools=[{"type": "function"}]), "custom_id": "tools"}), "tools", None),
    (json.dumps({**row(2, temperature=-1), "custom_id": "range"}), "range", None),
    (json.dumps({**row(3, prompt="a " * 3000), "custom_id": "long"}), "long", "context_length_exceeded"),
    (json.dumps({**row(3, model="gpt"), "custom_id": "model"}), "model", "model_not_found"),
]


def write_rows(file: Path, rows: Iterable[dict[str, Any] | str]) -> None:
    """Each as a line; texts as they are."""
    lines = (each if isinstance(each, str) else json.dumps(each) for each in rows)
    file.write_text("".join(f"{line}\n" for line in lines))


def read_results(file: Path) -> list[dict[str, Any]]:
    """Every line of an output."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The answer to each custom_id. Fails if one is there twice or is an error."""
    found: dict[str, str] = {}
    for result in results:
        assert result["custom_id"] not in found, "a row was answered twice"
        assert result["error"] is None, result
        assert result["response"]["status_code"] == 200, result
        choice = result["response"]["body"]["choices"][0]
        found[result["custom_id"]] = choice["text"] if "text" in choice else choice["message"]["content"]
    return found
