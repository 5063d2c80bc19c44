"""Templates that would take for ever, or all memory, are refused; others go on meanwhile, and after."""

import asyncio
import os
import signal
import subprocess
import sys
from enum import StrEnum
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from eagleray.cluster.frontend.chat import with_texts
from eagleray.cluster.frontend.chat_renderer import ChatRenderer

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Hello"}]
USUAL = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
TEXT = "<user>Hello\n"
TOO_LONG = [  # `n` is 10**9, a client's
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (n * 10) }}",
    "{{ lipsum(n=10**6) }}",
]
TOO_MUCH = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * n }}",
    "{{ [1] * n }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (n, 1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ 'x'.rjust(n) }}",
    "{{ 'x'|center(n) }}",
    "{{ 'x'|indent(n) }}",
    "{{ messages|tojson(indent=n) }}",
    "{% set s = namespace(s='aa') %}{% for i in range(60) %}{% set s.s = s.s ~ s.s %}{% endfor %}{{ s.s }}",
]
REFUSED = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ 10.0 ** 400 }}": "out of range",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ raise_exception('only users may speak') }}": "only users may speak",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{{ messages[5].content.x }}": "no element 5",
    "{{ range(10**9) | list }}": "Range too big",
    "{{ 'a' + 1 }}": "concatenate",
    "{% if %}": "Expected an expression",
    "{{ messages | nothing }}": "No filter named 'nothing'",
    "{{ {}['a'].b }}": "no attribute 'a'",
    "{{ ''.join(5) }}": "iterable",
    "{{ messages.append(1) }}": "unsafe",
}


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


@pytest.mark.parametrize("template", TOO_LONG)
def test_a_template_that_takes_long_is_ended(renderer: ChatRenderer, template: str) -> None:
    with pytest.raises(ValueError, match=r"the chat template (takes more than|ended the process)"):
        renderer.render(template, MESSAGES, {"n": 10**9})
    assert renderer.render(USUAL, MESSAGES, {}) == TEXT


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else bounds memory so")
@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_that_takes_much_memory_is_ended(renderer: ChatRenderer, template: str) -> None:
    with pytest.raises(ValueError, match="the chat template needs more than 512 MiB"):
        renderer.render(template, MESSAGES, {"n": 10**9})
    assert renderer.render(USUAL, MESSAGES, {}) == TEXT


@pytest.mark.parametrize(("template", "why"), REFUSED.items())
def test_whatever_a_template_raises_is_its_refusal(renderer: ChatRenderer, template: str, why: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses the messages: ") as refusal:
        renderer.render(template, MESSAGES, {})
    assert why in str(refusal.value)


class Mood(StrEnum):
    CALM = "calm"


@pytest.mark.parametrize(
    "variables",
    [
        {"x": 10**40, "y": -0.0, "z": None},
        {"x": "\ud800", "y": "é\0", "z": True},
        {"x": {1: [2, (3, "a")]}, "y": Mood.CALM, "z": object},
    ],
)
def test_a_template_sees_what_it_does_in_transformers(renderer: ChatRenderer, variables: dict[str, Any]) -> None:
    template = USUAL + "{{ x }}|{{ y }}|{{ z is none }}{% if add_generation_prompt %}>{% endif %}"
    options = {**variables, "add_generation_prompt": True}
    rendered: Any = render_jinja_template([MESSAGES], chat_template=template, **options)
    assert renderer.render(template, MESSAGES, options) == rendered[0][0]


async def test_quick_conversations_do_not_wait_for_slow_ones(renderer: ChatRenderer) -> None:
    slow = [asyncio.create_task(renderer.arender(TOO_LONG[0], MESSAGES, {})) for _ in range(3)]
    while not any(task.done() for task in slow):
        assert await renderer.arender(USUAL, MESSAGES, {}) == TEXT
    for task in slow:
        with pytest.raises(ValueError, match="takes more than"):
            await task


def processes() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize("which", ["all", "one"])
def test_another_process_takes_the_place_of_one_that_was_killed(which: str) -> None:
    before = processes()
    renderer = ChatRenderer()
    assert renderer.render(USUAL, MESSAGES, {}) == TEXT
    started = sorted(processes() - before)
    assert len(started) == 3
    for each in started if which == "all" else started[1:]:
        os.kill(each, signal.SIGKILL)
    assert [renderer.render(USUAL, MESSAGES, {}) for _ in range(3)] == [TEXT] * 3


def test_the_process_ends_with_the_one_that_started_it() -> None:
    program = (
        "import os, psutil\n"
        "from eagleray.cluster.frontend.chat_renderer import ChatRenderer\n"
        "renderer = ChatRenderer()\n"
        "renderer.render('x', [{'role': 'user', 'content': ''}], {})\n"
        "print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 3
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(left, timeout=30)[1]


def test_contents_may_be_parts() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    assert with_texts([{"role": "user", "content": parts}]) == [{"role": "user", "content": "Hello\nthere"}]
    assert with_texts(MESSAGES) == MESSAGES
    with pytest.raises(ValueError, match=r"a message has the part \{'type': 'image_url'\}; give texts or"):
        with_texts([{"role": "user", "content": [{"type": "image_url"}]}])
