"""The engine core's loop with real sockets and a toy rank in this process."""

import os
import socket
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from eagleray.cluster.core.messages import (
    Abort,
    Control,
    ControlReply,
    EngineRequest,
    Shutdown,
    Submit,
)
from eagleray.cluster.errors import EngineDeadError
from eagleray.workers.protocol.messages import Sampling
from support.toy_core import Core
from support.toy_rank import VOCAB_SIZE, generate


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


def test_front_ends_with_the_same_ids_get_their_own_tokens(core: Core) -> None:
    front_ends = [core.front_end(b"one"), core.front_end(b"two")]
    for number, front_end in enumerate(front_ends):
        front_end.submit(0, [number, 1, 2], max_tokens=30)
    for number, front_end in enumerate(front_ends):
        front_end.wait(front_end.has_ended)
        assert front_end.tokens[0] == generate([number, 1, 2], 30)


def test_an_abort_ends_one_request_and_no_other(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.submit(0, [1], max_tokens=200)
    front_end.submit(1, [2], max_tokens=20)
    front_end.send(Abort([0, 99]))
    front_end.wait(front_end.has_ended)
    assert front_end.ends[0].finish_reason == "abort"
    core.executor.open()
    front_end.send(Abort([]))  # wakes the core
    front_end.wait(lambda: 1 in front_end.ends)
    assert front_end.tokens[1] == generate([2], 20)


def test_who_arrives_during_a_long_step_is_in_the_next_one(core: Core) -> None:
    """And not in the one after it, since that is not sent long before the ranks need it."""
    front_end, executor = core.front_end(b"one"), core.executor
    executor.seconds = 1000.0
    front_end.submit(0, [1], max_tokens=20)  # after which it is known how long steps of a token take
    front_end.wait(front_end.has_ended)
    executor.gate.clear()
    num_ran = len(executor.steps)
    for request_id in (1, 2):
        front_end.submit(request_id, [request_id], max_tokens=5)
        front_end.wait_for_answer()
    assert len(executor.sent) == num_ran + 1
    executor.open()
    front_end.send(Abort([]))  # wakes the core
    front_end.wait(lambda: len(front_end.ends) == 3)
    assert [len(step.start) for step in executor.steps[num_ran : num_ran + 2]] == [1, 1]
    assert all(front_end.tokens[request_id] == generate([request_id], 5) for request_id in (1, 2))


def test_a_forecast_that_is_far_too_long_delays_nobody_for_ever(core: Core) -> None:
    """The step is there earlier, and then the next one is scheduled."""
    front_end = core.front_end(b"one")
    core.executor.seconds = 1000.0
    for request_id in range(4):
        front_end.submit(request_id, [request_id, 1], max_tokens=30)
    front_end.wait(lambda: len(front_end.ends) == 4)
    assert all(front_end.tokens[request_id] == generate([request_id, 1], 30) for request_id in range(4))


def test_a_request_that_cannot_run_fails_alone(core: Core) -> None:
    front_end = core.front_end(b"one")
    front_end.submit(0, [1, 2, 3], max_tokens=20)
    front_end.submit(1, [1] * 300, max_tokens=20)
    front_end.wait(lambda: len(front_end.ends) == 2)
    assert front_end.ends[1].finish_reason == "error"
    assert "256 tokens" in (front_end.ends[1].error or "")
    assert front_end.tokens[0] == generate([1, 2, 3], 20)


def test_a_front_end_that_is_gone_takes_only_its_own_requests_along(core: Core) -> None:
    lost, other = core.front_end(b"lost"), core.front_end(b"other")
    core.executor.gate.clear()
    lost.submit(0, [1], max_tokens=200)
    other.submit(0, [2], max_tokens=200)
    lost.send(Abort([77]))
    lost.peer.close()
    core.executor.open()
    other.send(Abort([]))
    other.wait(other.has_ended)
    assert other.tokens[0] == generate([2], 200)
    core.close()
    assert core.scheduler.num_unfinished == 0


def test_a_rank_that_never_answers_ends_every_request_with_the_cause() -> None:
    core = Core(step_timeout_s=0.2)
    core.executor.gate.clear()
    front_end = core.front_end(b"one")
    for request_id in range(3):
        front_end.submit(request_id, [request_id], max_tokens=5)
    front_end.wait(lambda: len(front_end.ends) == 3)
    for tokens in front_end.ends.values():
        assert tokens.finish_reason == "error"
        assert "step_timeout_s, 0.2 s" in (tokens.error or "")
    core.close()
    assert isinstance(core.error, EngineDeadError)
    assert core.scheduler.kv_cache.num_used == 0


def test_a_message_that_cannot_be_read_harms_only_its_sender(core: Core) -> None:
    bad, good = core.front_end(b"bad"), core.front_end(b"good")
    good.submit(0, [1, 2], max_tokens=100)
    bad.peer.send(msgspec.msgpack.encode({"type": "submit", "requests": [{"id": "zero"}]}))
    bad.peer.send(b"\xc1")
    good.wait(good.has_ended)
    assert good.tokens[0] == generate([1, 2], 100)


def strangers_messages() -> list[list[bytes]]:
    """Frames that no peer of ours sends."""
    unreadable = [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, os.urandom(1000)]
    shutdown = msgspec.msgpack.encode(Shutdown())
    return [[], [b""], [shutdown], [shutdown, shutdown], [b""] * 50, *([each] for each in unreadable)]


def connect(address: str, name: bytes) -> "zmq.Socket[bytes]":
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, name)
    dealer.connect(address)
    return dealer


def test_whoever_was_not_told_the_token_is_not_heard(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    front_end = core.front_end(b"one")
    front_end.submit(0, [1, 2], max_tokens=5)
    front_end.wait(front_end.has_ended)
    stranger = connect(core.hub.endpoint.address, b"one")
    for frames in strangers_messages():
        if frames:
            stranger.send_multipart(frames)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(core.hub.endpoint.address.removeprefix("ipc://"))
        raw.sendall(os.urandom(5000))
    front_end.submit(1, [1, 2], max_tokens=100)
    front_end.wait(lambda: 1 in front_end.ends)
    while core.hub.num_dropped < len(strangers_messages()) - 1:
        front_end.submit(2, [1, 2], max_tokens=1)
        front_end.wait(lambda: front_end.ends.pop(2, None) is not None)
    assert front_end.tokens[1] == generate([1, 2], 100)
    assert len(caplog.messages) == 1
    assert "not one of ours" in caplog.messages[0]
    stranger.close()


def test_what_cannot_be_read_is_counted_and_logged_once(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = core.front_end(b"bad"), core.front_end(b"good")
    good.submit(0, [1, 2], max_tokens=100)
    half_read = msgspec.msgpack.encode({"type": "abort", "ids": [1], "more": 0})[:-1]
    wrong = [
        {"type": "submit", "requests": [{"id": "zero"}]},
        {"type": "submit", "requests": 5},
        {"type": "abort", "ids": [None]},
        {"type": "ping", "num_sent": 2**70 * 1.0},
        {"type": "control", "id": 1, "verb": 7},
        {"type": "unknown"},
        {},
        [],
        None,
        "shutdown",
    ]
    deep = half_read + b"\x91" * 100_000 + b"\xc0"
    no_text = b"\x83\xa4type\xa7control\xa2id\x01\xa4verb\xa3\xff\xfe\xfd"
    payloads = [b"", b"\xc1", half_read, deep, no_text, *(msgspec.msgpack.encode(each) for each in wrong)]
    for payload in payloads:
        bad.peer.send(payload)
        bad.peer.socket.send_multipart([payload, payload])
    bad.submit(0, [3], max_tokens=50)
    for front_end, prompt, length in ((good, [1, 2], 100), (bad, [3], 50)):
        front_end.wait(front_end.has_ended)
        assert front_end.tokens[0] == generate(prompt, length)
    assert core.hub.num_dropped == len(payloads)
    unreadable, in_parts = caplog.messages
    assert unreadable.startswith("a message from bad cannot be read")
    assert "of 3 frames" in in_parts


def test_a_message_longer_than_any_of_ours_ends_its_senders_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.workers.protocol.channel.MAX_BYTES", 10_000)
    core = Core()
    bad, good = core.front_end(b"bad"), core.front_end(b"good")
    good.submit(0, [1, 2], max_tokens=100)
    bad.peer.send(b"\xc1" * 10_001)
    good.wait(good.has_ended)
    assert good.tokens[0] == generate([1, 2], 100)
    core.close()


def test_a_request_that_is_sent_again_is_not_run_again(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    for _ in range(3):
        front_end.submit(0, [1], max_tokens=20)
    core.executor.open()
    front_end.submit(1, [2], max_tokens=30)
    front_end.wait(lambda: 1 in front_end.ends)
    assert front_end.tokens[0] == generate([1], 20)
    assert core.scheduler.num_unfinished == 0


@pytest.mark.parametrize(
    ("changes", "sampling", "message"),
    [
        ({"prompt_token_ids": b""}, {}, "prompt has 0 bytes"),
        ({"prompt_token_ids": b"12345"}, {}, "prompt has 5 bytes"),
        ({"prompt_token_ids": array("i", [1, -1]).tobytes()}, {}, "token id -1"),
        ({"prompt_token_ids": array("i", [VOCAB_SIZE]).tobytes()}, {}, f"token id {VOCAB_SIZE}"),
        ({"max_tokens": 0}, {}, "max_tokens is 0"),
        ({"max_tokens": -(2**63)}, {}, "max_tokens is -9223372036854775808"),
        ({"max_tokens": 2**63}, {}, "max_tokens is 9223372036854775808"),
        ({"priority": 2**31}, {}, "priority is 2147483648"),
        ({"seeds": [-1]}, {}, "a seed does not fit in 64 bits"),
        ({}, {"temperature": float("nan")}, "temperature is nan"),
        ({}, {"temperature": -1.0}, "temperature is -1.0"),
        ({}, {"top_k": 2**40}, "top_k is"),
        ({}, {"top_p": 0.0}, "top_p is 0"),
        ({}, {"min_p": 1.5}, "min_p is 1.5"),
        ({}, {"seed": 2**64 - 1, "repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({}, {"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({}, {"logit_bias": {-5: 1.0}}, "token id -5"),
        ({}, {"logit_bias": {5: float("nan")}}, "logit_bias holds"),
        ({}, {"allowed_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE}"),
        ({}, {"min_tokens": -1}, "min_tokens is -1"),
        ({}, {"logprobs": 10**9}, "logprobs is 1000000000"),
        ({}, {"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ],
)
def test_what_would_crash_a_rank_does_not_reach_one(
    core: Core, changes: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"id": -7, "prompt_token_ids": array("i", [1]).tobytes(), "max_tokens": 5}
    front_end = core.front_end(b"one")
    front_end.submit(0, [1], max_tokens=20)
    front_end.tokens |= {-7: [], -6: []}
    front_end.send(Submit([EngineRequest(**(usual | changes), sampling=Sampling(**sampling))]))
    front_end.wait(lambda: len(front_end.ends) == 2 + len(changes.get("seeds", [])))
    assert message in (front_end.ends[-7].error or "")
    assert front_end.tokens[0] == generate([1], 20)


def test_tokens_leave_while_the_ranks_keep_up(core: Core) -> None:
    front_end = core.front_end(b"one")
    front_end.submit(0, [1], max_tokens=100)
    front_end.wait(front_end.has_ended)
    assert front_end.num_messages > 20


def test_shutdown_ends_what_runs(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.submit(0, [1], max_tokens=200)
    front_end.send(Shutdown())
    front_end.wait(front_end.has_ended)
    assert front_end.ends[0].finish_reason == "error"
    assert front_end.ends[0].error == "the engine was shut down"


def test_a_profile_begins_and_ends_between_steps_and_harms_no_request(core: Core) -> None:
    runs, asks = core.front_end(b"runs"), core.front_end(b"asks")
    runs.submit(0, [1], max_tokens=150)
    runs.wait(lambda: len(runs.tokens[0]) > 3)
    assert asks.ask(Control(7, "start_profile", {"directory": "/traces"})) == ControlReply(7)
    assert asks.ask(Control(8, "stop_profile")) == ControlReply(8, ["trace", "trace"])
    runs.wait(runs.has_ended)
    assert runs.tokens[0] == generate([1], 150)
    assert runs.replies == []
    assert [what for what in core.executor.sent if what != "step"] == ["start_profile", "stop_profile"]


def test_no_step_is_sent_until_every_rank_profiles(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.send(Control(0, "start_profile", {"directory": "/traces"}))
    front_end.submit(0, [1], max_tokens=3)
    front_end.send(Control(1, "stop_profile"))  # refused, and so a sign that the request has been taken in
    front_end.wait(lambda: bool(front_end.replies))
    assert front_end.replies[0].error == "start_profile is under way; wait for it to end"
    assert core.executor.sent == ["start_profile"]
    core.executor.open()
    front_end.send(Abort([]))
    front_end.wait(front_end.has_ended)
    assert front_end.replies[1:] == [ControlReply(0)]
    assert front_end.tokens[0] == generate([1], 3)


def test_only_one_profile_runs_over_all_front_ends(core: Core) -> None:
    one, two = core.front_end(b"one"), core.front_end(b"two")
    assert one.ask(Control(0, "stop_profile")).error == "no profile is running; start one first"
    assert one.ask(Control(1, "start_profile", {"directory": "/traces"})).error is None
    assert (
        two.ask(Control(1, "start_profile", {"directory": "/others"})).error
        == "a profile into /traces is already running; stop it first"
    )
    assert two.ask(Control(2, "stop_profile")).error is None
    assert one.ask(Control(3, "stop_profile")).error == "no profile is running; start one first"


def test_if_one_rank_cannot_profile_none_does(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.fault = "disk full"
    error = "the profile cannot be written to /traces: rank 1: disk full"
    assert front_end.ask(Control(0, "start_profile", {"directory": "/traces"})).error == error
    core.executor.fault = None
    assert front_end.ask(Control(1, "start_profile", {"directory": "/traces"})).error is None
    core.executor.fault = "disk full"
    assert front_end.ask(Control(2, "stop_profile")).error == error
    assert front_end.ask(Control(3, "stop_profile")).error == "no profile is running; start one first"
    assert core.executor.sent == ["start_profile", "drop_profile", "start_profile", "stop_profile"]


def test_a_control_that_does_not_exist_is_refused_by_name(core: Core) -> None:
    front_end = core.front_end(b"one")
    assert front_end.ask(Control(0, "fly")).error == "'fly' is not one of start_profile, stop_profile"
    front_end.submit(1, [1])
    front_end.wait(front_end.has_ended)
    assert front_end.tokens[1] == generate([1], 8)
