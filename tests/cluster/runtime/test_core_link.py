"""A front end's link to the core: what is lost or silent is noticed, and what was only stopped goes on."""

import logging
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from eagleray.cluster.core.messages import EngineOutputs, EngineRequest, Submit
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.runtime import core_link
from eagleray.cluster.runtime.core_link import CoreLink
from eagleray.cluster.runtime.process_state import state_of
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.protocol.messages import Sampling
from support.toy_core import Core
from support.toy_rank import generate

PROMPT = [1, 2, 3]


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    for name in ("PING_S", "WARN_S", "STOPPED_S"):
        monkeypatch.setattr(core_link, name, getattr(core_link, name) / 100)


@pytest.fixture
def stopped_process() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGSTOP)
    while state_of(process.pid) != "T":
        pass
    yield process.pid
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def submit(request_id: Any = 0, max_tokens: int = 20) -> Submit:
    return Submit([EngineRequest(request_id, array("i", PROMPT).tobytes(), Sampling(), max_tokens)])


def until_end(link: CoreLink) -> list[int]:
    """The tokens of the one request."""
    token_ids: list[int] = []
    while True:
        news = link.receive(0.02)
        link.look()
        for tokens in news.outputs if news else []:
            token_ids += tokens.token_ids
            if tokens.finish_reason:
                return token_ids


def wait_for_news(link: CoreLink) -> EngineOutputs | None:
    """As a front end waits; returns what is more than a sign of life."""
    while not (news := link.receive(0.005)) or not news.outputs:
        link.look()
    return news


@pytest.mark.usefixtures("hasty")
def test_an_idle_core_gives_signs_of_life_and_then_serves(core: Core) -> None:
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)
    signs = 0
    while signs < 5:
        signs += link.receive(0.02) is not None
        link.look()
    link.send(submit())
    assert until_end(link) == generate(PROMPT, 20)
    link.close()


@pytest.mark.usefixtures("hasty")
def test_a_message_that_never_arrived_is_noticed(core: Core) -> None:
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)
    link.send(submit(request_id="zero"))  # the core cannot read it, and so knows nothing of the request
    with pytest.raises(EngineDeadError, match="1 of 2 messages were lost"):
        wait_for_news(link)
    for _ in range(2):  # whatever else comes
        with pytest.raises(EngineDeadError, match="1 of 2 messages were lost"):
            link.receive(30)
    link.close()


@pytest.mark.usefixtures("hasty")
def test_news_that_never_arrived_are_noticed(core: Core) -> None:
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)
    link.send(submit())
    assert until_end(link) == generate(PROMPT, 20)
    link.close()
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)  # knows nothing of what its name was sent
    with pytest.raises(EngineDeadError, match="news were lost"):
        wait_for_news(link)
    link.close()


@pytest.mark.usefixtures("hasty")
def test_a_stopped_core_is_named_first_and_given_up_then(
    stopped_process: int, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub()  # nobody serves it
    link = CoreLink(hub.endpoint, b"one", stopped_process, silence_limit_s=30)
    caplog.set_level(logging.WARNING)
    with pytest.raises(EngineDeadError, match=rf"no sign of life .*\(process {stopped_process} is stopped\)"):
        wait_for_news(link)
    (warning,) = caplog.messages
    assert f"process {stopped_process} is stopped" in warning
    assert "waiting for it" in warning
    link.close()
    hub.close()


@pytest.mark.usefixtures("hasty")
def test_a_core_that_was_only_stopped_for_a_while_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub()
    link = CoreLink(hub.endpoint, b"one", None, silence_limit_s=30)
    link.send(submit())
    while not caplog.messages:  # somebody waits, and nobody answers
        assert link.receive(0.005) is None
        link.look()
    core = Core(hub=hub)
    assert until_end(link) == generate(PROMPT, 20)
    assert caplog.messages[1] == "the engine core is responding again"
    link.close()
    core.close()


def test_a_front_end_that_was_away_gives_the_core_a_new_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    now = 100.0
    monkeypatch.setattr("eagleray.cluster.runtime.core_link.time.monotonic", lambda: now)
    link = CoreLink(hub.endpoint, b"one", None, silence_limit_s=20)
    now = 1000.0  # stopped, or busy with other things
    link.look()
    for second in range(1, 20):
        now = 1000.0 + second
        link.look()
    now = 1020.0
    with pytest.raises(EngineDeadError, match="for 20 s"):
        link.look()
    link.close()
    hub.close()


def test_many_requests_go_in_messages_that_the_core_takes(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_link, "MAX_SUBMIT_BYTES", 100)
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)
    prompt = array("i", PROMPT).tobytes()
    link.send(Submit([EngineRequest(i, prompt, Sampling(), 2) for i in range(50)]))
    ended: set[int] = set()
    while len(ended) < 50:
        news = link.receive(10)
        assert news is not None
        ended |= {tokens.id for tokens in news.outputs if tokens.finish_reason == "length"}
    link.close()


def test_lists_and_seeds_count_for_the_length_of_a_message() -> None:
    prompt = array("i", PROMPT).tobytes()
    wishes = Sampling(logit_bias={2**31 - 1 - i: 0.1 for i in range(20_000)})
    many = [EngineRequest(i, prompt, wishes, 2, seeds=[2**64 - 1] * 10_000) for i in range(100)]
    parts = core_link._parts(Submit(many))
    assert [request.id for part in parts for request in part.requests] == list(range(100))
    assert max(len(msgspec.msgpack.encode(part)) for part in parts) <= core_link.MAX_SUBMIT_BYTES


@pytest.mark.usefixtures("hasty")
def test_a_message_that_cannot_be_made_is_not_missed(core: Core) -> None:
    link = CoreLink(core.hub.endpoint, b"one", None, silence_limit_s=30)
    with pytest.raises(UnicodeEncodeError):
        link.send(Submit([EngineRequest(0, b"", Sampling(), 2, tenant="\udcff")]))
    signs = 0
    while signs < 3:  # it says, too, if it misses anything
        signs += link.receive(0.02) is not None
        link.look()
    link.send(submit(1))
    assert until_end(link) == generate(PROMPT, 20)
    link.close()


def test_a_peer_that_is_stopped_for_long_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With heartbeats as between nodes, a hundred times faster, it would be dropped."""
    monkeypatch.setattr("eagleray.workers.protocol.channel.HEARTBEAT_MS", 20)
    monkeypatch.setattr("eagleray.workers.protocol.channel.SILENT_MS", 40)
    hub = Hub()
    echo = (
        "import sys\nfrom eagleray.workers.protocol.channel import Endpoint, Peer\n"
        "peer = Peer(Endpoint(sys.argv[1], token=sys.argv[2].encode()), b'echo')\n"
        "peer.send(b'here')\n"
        "while True: peer.send(peer.receive())\n"
    )
    arguments = [hub.endpoint.address, hub.endpoint.token.decode()]
    process = subprocess.Popen([sys.executable, "-c", echo, *arguments])
    try:
        assert hub.socket.poll(30_000)
        assert hub.receive() == (b"echo", b"here")
        process.send_signal(signal.SIGSTOP)
        for number in range(10):
            hub.send(b"echo", b"%d" % number)
            assert not hub.socket.poll(50)
        process.send_signal(signal.SIGCONT)
        for number in range(10):
            assert hub.socket.poll(30_000)
            assert hub.receive() == (b"echo", b"%d" % number)
    finally:
        process.kill()
        process.wait()
        hub.close()
