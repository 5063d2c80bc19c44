"""Streamed completions in threads, each kept to its end."""

import json
import threading
from typing import Any

import httpx

PATIENCE_S = 120.0


class Stream(threading.Thread):
    """One completion as events; `events` grows while it runs, and `failure` says how the connection broke."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = body | {"stream": True}
        self.events: list[str] = []
        self.failure: str | None = None

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=PATIENCE_S) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.failure = repr(error)

    @property
    def model(self) -> str:
        """Which one answered."""
        name: str = json.loads(self.events[0])["model"]
        return name

    @property
    def end(self) -> str | None:
        """The finish_reason of a stream that came to its end; else whatever came last."""
        if self.failure is not None or self.events[-1:] != ["[DONE]"]:
            return self.failure or "".join(self.events[-1:])
        reason: str = json.loads(self.events[-2])["choices"][0]["finish_reason"]
        return reason
