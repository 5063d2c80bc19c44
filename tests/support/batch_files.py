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
