"""A model on a real local Ray Serve, two ranks on CPU: what clients see when all goes well, and when it does not."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from support.processes import children_named
from support.ray_serve import deploy
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

KEY = "sk-first"
PATIENCE_S = 120.0
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "device": "cpu",
    "cpus_per_rank": 0.1,
    "threads_per_rank": 1,
    "kv_cache_bytes": 2_000_000,
    "served_model_name": "tiny",
    "api_keys": [KEY, "sk-second"],
    "max_num_seqs": 2,
    "max_queued_requests": 1,
    "max_body_bytes": 50_000,
    "health_check_period_s": 0.5,
    "drain_timeout_s": 20,
}
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    (path / "generation_config.json").write_text('{"top_k": 1, "eos_token_id": 257}')
    return path


@pytest.fixture(scope="module")
def url(serve_url: str, model_dir: Path) -> str:
    before = rank_pids()
    deploy(model_dir, OPTIONS)
    deadline = time.monotonic() + PATIENCE_S
    while set(before) & set(rank_pids()):  # of an engine that an earlier test has closed, or of another application
        assert time.monotonic() < deadline, "an earlier test has left an engine on the cluster"
        time.sleep(0.1)
    return serve_url


def keyed(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S)


async def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(what):
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.05)


def figure(url: str, name: str) -> float:
    """One of the replica's metrics, without its prefix; 0 before its first value."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    found = re.search(rf"^eagleray_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def rank_pids() -> list[int]:
    return [process.pid for process in children_named("RankActor")]


def test_the_openai_client_lists_the_model_and_streams_what_it_gets_whole(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0}
        asked["extra_body"] = {"ignore_eos": True}
        whole = client.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == whole.finish_reason
    assert len(chunks) > 5


def test_the_models_own_sampling_counts_where_a_request_does_not_say(url: str) -> None:
    """It takes the likeliest token only."""
    with keyed(url) as client:

        def text(**asked: int) -> str:
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "ignore_eos": True} | asked
            found: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return found

        assert text(seed=1) == text(seed=2) == text(temperature=0)
        assert text(seed=1, top_k=0) != text(seed=2, top_k=0)


@pytest.mark.parametrize("key", ["sk-wrong", KEY + "x"])
def test_without_a_key_there_is_no_answer_but_to_probes(url: str, key: str) -> None:
    with (
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(AuthenticationError, match="no valid API key"),
    ):
        client.models.list()
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/metrics").status_code == 200


def test_a_page_of_another_site_can_ask_with_a_key_and_read_the_answer(url: str) -> None:
    origin = {"origin": "https://app.example.com"}
    wants = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = httpx.options(f"{url}/v1/completions", headers=wants, timeout=PATIENCE_S)
    assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "authorization")
    with keyed(url) as client:
        answers = [client.get("/v1/models", headers=origin), httpx.get(f"{url}/v1/models", headers=origin)]
        body = {"prompt": "Once", "max_tokens": 3, "stream": True}
        answers += [client.post("/v1/completions", json=body, headers=origin)]
    assert [answer.status_code for answer in answers] == [200, 401, 200]
    assert {answer.headers["access-control-allow-origin"] for answer in [preflight, *answers]} == {"*"}
    assert answers[-1].text.endswith("data: [DONE]\n\n")
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=origin, timeout=PATIENCE_S).headers


def test_a_body_that_is_too_long_is_refused_whether_or_not_it_says_how_long(url: str) -> None:
    def in_chunks() -> Iterator[bytes]:
        yield from [b"x" * 10_000] * 6

    with keyed(url) as client:
        for body in (b"x" * 60_000, in_chunks()):
            answer = client.post("/v1/completions", content=body)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_what_is_not_there_is_told_in_openais_shape(url: str, method: str, path: str, status: int) -> None:
    with keyed(url) as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_request_keeps_its_id_and_gets_one_if_it_has_none(url: str) -> None:
    with keyed(url) as client:
        answer = client.get("/v1/models", headers={"x-request-id": "mine-1"})
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
        assert len(client.get("/v1/models").headers["x-request-id"]) > 10
        bad = client.get("/v1/models", headers={"x-request-id": "no spaces"})
        assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_request_id")


async def test_a_full_queue_answers_429_says_when_to_come_again_and_empties_when_clients_go(url: str) -> None:
    short = LONG | {"max_tokens": 1}
    async with httpx.AsyncClient(base_url=url, headers=keyed(url).headers, timeout=PATIENCE_S) as client:
        posts = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(3)]
        await until(lambda: figure(url, "requests_running") == 2 and figure(url, "requests_waiting") == 1)
        answer = await client.post("/v1/completions", json=short)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        assert (await client.get("/v1/models")).status_code == 200
        for post in posts:
            post.cancel()
        await until(lambda: figure(url, "requests_running") == 0)
        assert (await client.post("/v1/completions", json=short)).status_code == 200


async def test_a_request_that_does_not_stream_ends_when_its_client_goes_away(url: str) -> None:
    """Its body comes after its head, as most clients send it."""
    before = figure(url, 'requests_total{finish_reason="length"}')
    body = json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: eagleray\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    for part in (head.encode(), body):
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05)  # a packet each
    await until(lambda: figure(url, "requests_running") == 1)
    writer.close()
    await until(lambda: figure(url, "requests_running") == 0)
    assert figure(url, 'requests_total{finish_reason="length"}') == before, "it ran to its end"


async def test_more_requests_than_serve_would_hold_get_openais_429_too(url: str) -> None:
    """Serve has limits of its own, beyond which its answer is plain text."""
    limits = httpx.Limits(max_connections=300)
    async with httpx.AsyncClient(base_url=url, headers=keyed(url).headers, timeout=PATIENCE_S, limits=limits) as client:
        posts = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(3)]
        await until(lambda: figure(url, "requests_running") == 2 and figure(url, "requests_waiting") == 1)
        answers = await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(200)))
        assert {answer.status_code for answer in answers} == {429}
        assert {answer.json()["error"]["code"] for answer in answers} == {"queue_full"}
        for post in posts:
            post.cancel()
        await until(lambda: figure(url, "requests_running") == 0)
    assert figure(url, "request_seconds_count") == figure(url, "queue_seconds_count"), "what is cut off is in neither"


def test_metrics_count_what_was_asked_and_generated(url: str) -> None:
    counters = ["prompt_tokens_total", "generation_tokens_total", 'requests_total{finish_reason="length"}']
    histograms = ["time_to_first_token_seconds", "time_per_output_token_seconds", "request_seconds"]
    names = [*counters, *(f"{name}_count" for name in histograms)]
    before = [figure(url, name) for name in names]
    with keyed(url) as client:
        client.post("/v1/completions", json=LONG | {"prompt": "abcd", "max_tokens": 7}).raise_for_status()
    after = [figure(url, name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [4, 7, 1, 1, 1, 1]
    assert figure(url, "requests_running") == 0
    assert figure(url, "kv_blocks") > 0


async def test_a_dead_rank_is_told_by_health_and_serve_replaces_the_replica(url: str) -> None:
    def health() -> int:
        try:
            return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code
        except httpx.RemoteProtocolError:  # the replica ended just then
            return 0

    before = rank_pids()
    assert len(before) == 2
    assert health() == 200
    os.kill(before[1], signal.SIGKILL)
    await until(lambda: health() == 503)
    await until(lambda: health() == 200)
    with keyed(url) as client:
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200
    assert len(rank_pids()) == 2
    assert not set(rank_pids()) & set(before)
