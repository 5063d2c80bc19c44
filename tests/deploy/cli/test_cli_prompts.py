"""Prompts from arguments, files and standard input."""

import io
from pathlib import Path

import pytest

from eagleray.deploy.cli.prompts import Task, in_chat, parse_lines, read_tasks

HELLO = {"role": "user", "content": "hello"}


def test_arguments_are_prompts() -> None:
    assert read_tasks(["a", "{not json"], None) == [Task(prompt="a"), Task(prompt="{not json")]


def test_a_file_holds_a_prompt_a_line_and_blank_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  indented\n   \nzuletzt ü")
    assert [task.prompt for task in read_tasks([], file)] == ["first", "  indented", "zuletzt ü"]


def test_an_argument_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="not a character; give UTF-8 text"):
        read_tasks(["good", "bad \udcff"], None)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hi"}\n', encoding="utf-8-sig")
    assert read_tasks([], file) == [Task(prompt="hi")]


def test_only_a_line_feed_ends_a_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\none\x0cprompt\u0085still\n', encoding="utf-8")
    assert [task.prompt for task in read_tasks([], file)] == ["a\u2028b", "one\x0cprompt\u0085still"]


@pytest.mark.parametrize("file", [None, Path("-")])
def test_standard_input_is_read_without_a_file(file: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo\n")))
    assert [task.prompt for task in read_tasks([], file)] == ["one", "two"]


@pytest.mark.parametrize("text", ["one\n{}\n", '{{"prompt": "one"}}\n{}\n', "\n\none\n{}"])
def test_a_byte_order_mark_is_no_part_of_standard_input(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that stands first; elsewhere it is a character."""
    data = text.format("\ufefftwo").encode("utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    assert [task.prompt for task in read_tasks([], None)] == ["one", "\ufefftwo"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("from_file", [False, True])
def test_utf_16_is_refused_by_name(
    encoding: str, from_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("hello\n".encode(encoding))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file.open("rb")))
    with pytest.raises(ValueError, match=r"is not UTF-8 text, but UTF-16 or no text at all; save it as UTF-8, or conv"):
        read_tasks([], file if from_file else None)


def test_a_closed_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="there is no prompt"):
        read_tasks([], None)


def test_json_lines_hold_text_token_ids_or_messages() -> None:
    lines = ['{"prompt": "hi"}', '{"prompt": [1, 2]}', '{"messages": [{"role": "user", "content": "hello"}]}', "plain"]
    assert parse_lines(lines, "x") == [
        Task(prompt="hi"),
        Task(prompt=[1, 2]),
        Task(messages=[HELLO]),
        Task(prompt="plain"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "hi"',
        '{"prompt": [' + "9" * 5000 + "]}",
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "{}",
        '{"prompt": 5}',
        '{"prompt": [1, "a"]}',
        '{"prompt": [true]}',
        '{"prompt": "hi", "temperature": 1}',
        '{"messages": []}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user"}]}',
    ],
    ids=lambda line: line[:30],
)
def test_a_line_that_cannot_be_read_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 .*give \{\"prompt\""):
        parse_lines(["fine", line], "p.jsonl")


@pytest.mark.parametrize(
    "line", ['{"prompt": "\\ud800"}', '{"messages": [{"role": "user", "content": "a\\udfff"}]}', "bad \udcff"]
)
def test_a_line_with_what_is_no_character_is_named(line: str) -> None:
    with pytest.raises(
        ValueError, match=r"p\.jsonl, line 2: the text holds .* which is not a character; give UTF-8 text"
    ):
        parse_lines(["fine", line], "p.jsonl")


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_lines(['{"prompt": "\\ud83d\\ude00"}'], "x") == [Task(prompt="\U0001f600")]


def test_standard_input_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fine\n\xff\n"), encoding="utf-8"))
    with pytest.raises(ValueError, match=r"standard input is not UTF-8 text: .* save it as UTF-8"):
        read_tasks([], None)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.bin"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompts\.bin is not UTF-8"):
        read_tasks([], file)


def test_a_file_without_prompts_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n  \n")
    with pytest.raises(ValueError, match=r"--file .*prompts\.txt holds no prompt"):
        read_tasks([], file)


def test_a_chat_puts_the_system_message_first_and_leaves_token_ids_alone() -> None:
    system = {"role": "system", "content": "be brief"}
    assert in_chat(Task(prompt="hello"), None).messages == [HELLO]
    assert in_chat(Task(prompt="hello"), "be brief").messages == [system, HELLO]
    assert in_chat(Task(messages=[HELLO]), "be brief").messages == [system, HELLO]
    assert in_chat(Task(prompt=[1, 2]), "be brief") == Task(prompt=[1, 2])


def test_the_title_is_what_was_asked() -> None:
    assert Task(prompt="hello").title == "hello"
    assert Task(prompt=[1, 2]).title == "2 token ids"
    assert in_chat(Task(prompt="hello"), "be brief").title == "hello"
