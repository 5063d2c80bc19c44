"""What the user sees of answers: order, text, JSON, figures, and the live region of a terminal."""

import io
import json

import pytest
from rich.console import Console

from eagleray.cluster.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from eagleray.deploy.cli.answers import Answer, InOrder, as_json, printable
from eagleray.deploy.cli.prompts import Task
from eagleray.deploy.cli.render import tail, whole, write_plain
from eagleray.deploy.cli.summary import Figures, percentile, time_per_output_token
from eagleray.deploy.cli.views import PlainView, TerminalView


def sequence(text: str, finish_reason: str | None = "stop", index: int = 0) -> CompletionOutput:
    return CompletionOutput(index, text, [7] * len(text.split()), None, None, finish_reason)


def output(*sequences: CompletionOutput, first: float = 1.0, last: float = 3.0) -> RequestOutput:
    finished = all(each.finish_reason for each in sequences)
    metrics = RequestMetrics(0.5, first, last if finished else None)
    return RequestOutput("0", "prompt", [1, 2, 3], None, list(sequences), finished, None, metrics)


def answer(index: int, text: str, finish_reason: str | None = "stop") -> Answer:
    return Answer(index, Task(prompt=f"prompt {index}"), output(sequence(text, finish_reason)))


def terminal(width: int = 60, height: int = 12) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_answers_come_out_in_the_order_of_the_prompts() -> None:
    seen: list[int] = []
    order = InOrder(lambda ready: seen.append(ready.index))
    progress = []
    for index in (2, 0, 3, 1):
        order.done(answer(index, "x"))
        progress.append(list(seen))
    assert progress == [[], [0], [0], [0, 1, 2, 3]]


def test_what_is_held_back_comes_out_in_the_end() -> None:
    seen: list[int] = []
    order = InOrder(lambda ready: seen.append(ready.index))
    order.done(answer(3, "x"))
    order.done(answer(1, "x"))
    order.flush()
    assert seen == [1, 3]


def test_json_says_everything_of_an_answer() -> None:
    entry = json.loads(as_json(answer(4, "two words", "length")))
    assert entry == {
        "index": 4,
        "prompt": "prompt 4",
        "num_prompt_tokens": 3,
        "outputs": [{"index": 0, "text": "two words", "token_ids": [7, 7], "finish_reason": "length"}],
    }


def test_json_has_the_messages_the_error_and_the_logprobs_where_there_are_any() -> None:
    messages = [{"role": "user", "content": "ü"}]
    failed = Answer(0, Task(messages=messages), error="the prompt is empty")
    assert as_json(failed) == json.dumps(
        {"index": 0, "messages": messages, "error": "the prompt is empty"}, ensure_ascii=False
    )
    logprob = Logprob(-0.5, 1, "a")
    told = CompletionOutput(0, "a", [5], -0.5, [{5: logprob}], "stop")
    metrics = RequestMetrics(0.0)
    full = Answer(0, Task(prompt="p"), RequestOutput("0", "p", [1, 5], [None, {5: logprob}], [told], True, 0, metrics))
    entry = json.loads(as_json(full))
    at = {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}
    assert entry["outputs"][0]["logprobs"] == [at]
    assert entry["prompt_logprobs"] == [None, at]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\tb\n\x07ü\x9b") == "a\N{REPLACEMENT CHARACTER}[31m\tb\n" + (
        "\N{REPLACEMENT CHARACTER}ü\N{REPLACEMENT CHARACTER}"
    )
    console = terminal()
    console.print(whole(answer(0, "a\x1b[31mb")))
    assert "\x1b[31m" not in written(console)


@pytest.mark.parametrize(
    ("titled", "expected"), [(False, "first\nsecond\n"), (True, "> prompt 0\nfirst\n\n> prompt 1\nsecond\n\n")]
)
def test_plain_text_has_titles_only_if_asked(titled: bool, expected: str) -> None:
    file = io.StringIO()
    write = write_plain(file, titled)
    write(answer(0, "first"))
    write(answer(1, "second"))
    assert file.getvalue() == expected


def test_the_whole_answer_says_why_it_ended_early() -> None:
    assert "(cut at 2 tokens)" in whole(answer(0, "two words", "length")).plain
    assert "(" not in whole(answer(0, "two words", "stop")).plain
    assert "(interrupted)" in whole(answer(0, "two words", None)).plain
    assert whole(Answer(0, Task(prompt="p"), error="too long")).plain == "p\n(failed)"


def test_several_sequences_are_numbered() -> None:
    both = Answer(0, Task(prompt="p"), output(sequence("left"), sequence("right", index=1)))
    assert whole(both).plain == "p\n1 of 2\nleft\n2 of 2\nright"


def test_the_tail_is_the_last_lines_that_fit() -> None:
    console = terminal(width=10)
    console.print(tail(answer(0, "one two three four five six seven"), console, rows=2))
    assert [line.rstrip() for line in written(console).splitlines()] == ["prompt 0", "four five", "six seven", ""]


def test_a_plain_view_writes_nothing_but_finished_answers_in_order() -> None:
    lines: list[str] = []
    quiet = Console(file=io.StringIO(), force_terminal=False)
    with PlainView(lambda ready: lines.append(as_json(ready)), quiet, num_requests=3) as view:
        for index in (2, 1):
            view.news(answer(index, "x", None))
            view.done(answer(index, "x y"))
        assert lines == []
        view.done(answer(0, "x y"))
        assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    assert written(quiet) == ""


def test_a_bar_on_the_terminal_leaves_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    err = terminal()
    with PlainView(lambda ready: print(as_json(ready)), err, num_requests=1) as view:
        view.done(answer(0, "x y"))
    assert json.loads(capsys.readouterr().out)["outputs"][0]["text"] == "x y"
    assert "1/1 requests" in written(err)
    assert "outputs" not in written(err)


def test_an_interrupted_plain_view_writes_what_was_finished() -> None:
    seen: list[int] = []

    def interrupted() -> None:
        with PlainView(lambda ready: seen.append(ready.index), terminal(), num_requests=3) as view:
            view.news(answer(0, "x", None))
            view.done(answer(2, "x"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [2]


def test_a_terminal_view_streams_at_the_bottom_and_leaves_whole_answers_in_order() -> None:
    console = terminal(height=20)
    with TerminalView(console, num_requests=2) as view:
        view.news(answer(0, "half", None))
        view.done(answer(1, "second whole"))
        view.refresh()
        streaming = written(console)
        view.done(answer(0, "half and half"))
    kept = written(console)[len(streaming) :]
    assert streaming.index("half") < streaming.index("second whole")
    assert "1/2 requests" in streaming
    assert kept.rindex("half and half") < kept.rindex("second whole")


def test_a_terminal_view_never_outgrows_the_terminal() -> None:
    console = terminal(height=10)
    with TerminalView(console, num_requests=50) as view:
        for index in range(50):
            view.news(answer(index, "word " * 200, None))
        region = console.render_lines(view.render())
    assert len(region) < console.height
    text = "".join(segment.text for line in region for segment in line)
    assert "prompt 0" in text
    assert "more" in text


def test_an_interrupted_terminal_view_keeps_what_was_said() -> None:
    console = terminal()

    def interrupted() -> None:
        with TerminalView(console, num_requests=1) as view:
            view.news(answer(0, "half an ans", None))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "(interrupted)" in written(console)
    assert "half an ans" in written(console)


def test_figures_count_tokens_and_time_each_request() -> None:
    slow = output(sequence("a b c"), first=1.0, last=3.0)  # submitted at 0.5
    quick = output(sequence("a b c d e"), sequence("a", index=1), first=0.6, last=1.0)
    running = output(sequence("a b", None), first=0.7)
    figures = Figures.of([slow, quick, running], elapsed=2.0)
    assert (figures.num_requests, figures.num_prompt_tokens, figures.num_output_tokens) == (3, 9, 11)
    assert figures.first_token == pytest.approx([0.5, 0.1, 0.2])
    assert figures.per_output_token == pytest.approx([1.0, 0.1])
    assert figures.line() == (
        "3 requests · 9 prompt + 11 output tokens in 2.0 s · 5.5 tokens/s · first token 200 ms median, 500 ms p99 · "
        "550 ms per output token"
    )


def test_figures_of_nothing_are_short() -> None:
    assert Figures.of([], elapsed=0.0).line() == "0 requests · 0 prompt + 0 output tokens in 0.0 s · 0.0 tokens/s"
    assert time_per_output_token(output(sequence("one"))) is None


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 99) == 99.0
    assert percentile(values, 50) == 50.0
    assert percentile([4.0], 99) == 4.0
