"""The playground in a real browser, with a real engine behind it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.cluster.async_llm import AsyncLLM
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.middleware.admission import ApiKeys
from eagleray.deploy.openai.middleware.playground import Playground
from eagleray.deploy.openai.middleware.probes import Figures, Health
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.serve.metrics import Metrics
from support.asgi_server import asgi_server
from support.chromium import Page, chromium_page
from support.tiny_model import write_tiny_model

KEY = "sk-play"
ENTER, ESCAPE = ("Enter", 13), ("Escape", 27)
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"
IDLE = "running === null"
ROOM = 20_000  # tokens, so that no answer ends before the page has seen it run


class Recorder:
    """Keeps the bodies of requests on their way to the app."""

    def __init__(self, app: ASGIApp) -> None:
        self.bodies: list[bytes] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def heard() -> dict[str, object]:
            message = await receive()
            if message.get("body"):
                self.bodies.append(message["body"])
            return dict(message)

        await self._app(scope, heard, send)


@pytest.fixture(scope="module")
def recorder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Recorder, AsyncLLM]]:
    """The layers of `eagleray serve` that the page meets, and an address; the engine has one API key."""
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"), ROOM)
    llm = AsyncLLM(path, max_model_len=ROOM, block_size=16, kv_cache_bytes=4_000_000, threads_per_rank=1)
    metrics = Metrics()

    def text() -> bytes:
        metrics.look(llm.stats, idle=llm.num_requests == 0)
        return metrics.text()

    recorder = Recorder(make_app(ServedModel(llm, "tiny", ROOM, created=0)))
    app = Health(Figures(Playground(ApiKeys(recorder, [KEY])), text), lambda: None)
    with asgi_server(app, on_end=llm.close) as url:
        yield url, recorder, llm


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium_page() as page:
        yield page


@pytest.fixture
def page(browser: Page, recorder: tuple[str, Recorder, AsyncLLM]) -> Page:
    """The playground, anew and with the key."""
    browser.resize(1200, 800)
    browser.open("about:blank")
    browser.open(f"{recorder[0]}/")
    browser.evaluate(f"parameters.key.value = {KEY!r}; greet()")
    browser.wait_for("document.getElementById('model').textContent.startsWith('tiny')")
    return browser


def ask(page: Page, text: str, **parameters: object) -> None:
    for name, value in parameters.items():
        page.evaluate(f"parameters.{name}.value = {json.dumps(str(value))}")
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press(*ENTER)


def test_a_message_is_answered_with_what_the_engine_says(page: Page, recorder: tuple[str, Recorder, AsyncLLM]) -> None:
    url, seen, _ = recorder
    ask(page, "Hello", temperature=0, max_tokens=12, seed=5, system="Be brief.", top_p=0.9)
    page.wait_for(f"{LAST}?.innerText.length > 0 && {IDLE}")
    body = json.loads(seen.bodies[-1])
    assert body == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0,
        "top_p": 0.9,
        "max_tokens": 12,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    whole = {name: value for name, value in body.items() if not name.startswith("stream")}
    reply = httpx.post(f"{url}/v1/chat/completions", json=whole, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    text = reply.json()["choices"][0]["message"]["content"]
    assert page.evaluate(f"{LAST}.textContent") == text
    assert page.evaluate("document.getElementById('figures').textContent").startswith("12 tokens · ")
    assert "tokens/s" in page.text()
    assert "0 running · 0 waiting" in page.text()

    ask(page, "And again")
    page.wait_for(f"document.querySelectorAll('.assistant').length === 2 && {IDLE}")
    roles = [message["role"] for message in json.loads(seen.bodies[-1])["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert json.loads(seen.bodies[-1])["messages"][2]["content"] == text


@pytest.mark.parametrize("by_key", [True, False])
def test_an_answer_can_be_stopped_and_the_engine_stops_too(
    page: Page, recorder: tuple[str, Recorder, AsyncLLM], by_key: bool
) -> None:
    ask(page, "Go on and on", max_tokens=ROOM - 100, temperature=0)
    page.wait_for(f"{LAST}?.innerText.length > 5")
    page.wait_for("look(), document.getElementById('load').textContent === '1 running · 0 waiting'")
    if by_key:
        page.press(*ESCAPE)
    else:
        page.evaluate("document.getElementById('stop').click()")
    page.wait_for(IDLE)
    assert page.evaluate(f"{LAST}.innerText").endswith("stopped")
    assert page.evaluate("turns.length") == 2
    page.wait_for("look(), document.getElementById('load').textContent === '0 running · 0 waiting'")
    assert recorder[2].num_requests == 0


def test_what_the_server_refuses_is_shown_and_can_be_asked_again(page: Page) -> None:
    ask(page, "Hello", max_tokens=2 * ROOM)
    page.wait_for(IDLE)
    assert "max_tokens" in page.evaluate(f"{LAST}.querySelector('.fault').textContent")
    assert page.evaluate("[turns.length, document.getElementById('prompt').value]") == [0, "Hello"]


def test_a_number_has_the_bounds_of_its_option(recorder: tuple[str, Recorder, AsyncLLM]) -> None:
    """What the page lets through is what `SamplingParams` takes, up to what a page's numbers can tell apart."""
    text = httpx.get(recorder[0]).text
    found = re.findall(r'<input name="(\w+)" type="number" min="(\S+)" max="(\S+)" step="(1|any)"', text)
    assert [name for name, *_ in found] == re.findall(r'<input name="(\w+)" type="number"', text)
    assert {name for name, *_ in found} == {"temperature", "top_p", "max_tokens", "seed"}
    for name, *bounds, step in found:
        low, high = (int(bound) if step == "1" else float(bound) for bound in bounds)
        value: Any
        for value in (high,) if name == "top_p" else (low, high):  # 0, which a page cannot exclude
            SamplingParams(**{name: value})
        for value in (low - 1, high + 1):
            if abs(value) <= 2**53:
                with pytest.raises(ValueError, match=f"^{name} is"):
                    SamplingParams(**{name: value})


def test_a_wrong_key_is_said_and_a_number_out_of_range_is_not_sent(
    page: Page, recorder: tuple[str, Recorder, AsyncLLM]
) -> None:
    ask(page, "Hello", key="wrong")
    page.wait_for(IDLE)
    assert "no valid API key" in page.text()
    before = len(recorder[1].bodies)
    ask(page, "", key=KEY, temperature=-1)
    assert page.evaluate(IDLE)
    assert page.evaluate("document.activeElement.name") == "temperature"
    assert len(recorder[1].bodies) == before


def test_model_text_is_never_markup(page: Page) -> None:
    page.evaluate("show('assistant', '<b id=bold>x</b>')")
    assert page.evaluate("document.getElementById('bold')") is None


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(page: Page, width: int, dark: bool, tmp_path: Path) -> None:
    page.resize(width, 780, dark=dark)
    page.evaluate(f"document.getElementById('settings').open = {str(width > 600).lower()}")
    ask(page, "A long question, " * 12 + "without " + "end" * 90, max_tokens=300, temperature=0)
    page.wait_for(f"{LAST}?.innerText.length > 100 && {IDLE}")
    page.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"playground-{width}{'-dark' * dark}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.getElementById('send').getBoundingClientRect().bottom") <= 780
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG's level AA


CONTRAST = """
(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
  };
  const shown = [...document.querySelectorAll(".message, .quiet, label, summary, h1, button, input")];
  return Math.min(...shown.map(each => contrast(light(getComputedStyle(each).color), light(behind(each)))));
})()
"""


def test_the_page_asks_nobody_else_and_is_there_wherever_it_is_mounted(
    recorder: tuple[str, Recorder, AsyncLLM],
) -> None:
    reply = httpx.get(recorder[0])
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text
    assert "https://" not in reply.text
    head = httpx.head(recorder[0])
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(reply.content)
    assert httpx.post(recorder[0]).status_code == 401
