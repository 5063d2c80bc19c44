"""Renders an answer: bare text for files and pipes, rich text for a terminal."""

from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group
from rich.text import Text

from eagleray.deploy.cli.answers import FAILED, Answer, printable, remark

TITLE, ASIDE, FAULT = "bold cyan", "dim", "red"


def write_plain(file: TextIO, titled: bool) -> Callable[[Answer], None]:
    """A writer of answers as bare text; with titles if there are several."""

    def write(answer: Answer) -> None:
        texts = [sequence.text for sequence in answer.sequences]
        if titled:
            print(f"> {answer.task.title}", file=file)
        if answer.error is not None:
            texts.append(FAILED)
        print("\n\n".join(texts), end="\n\n" if titled else "\n", file=file, flush=True)

    return write


def title(answer: Answer) -> Text:
    """The prompt in one line."""
    return Text(printable(" ".join(answer.task.title.split())), style=TITLE, no_wrap=True, overflow="ellipsis")


def whole(answer: Answer) -> Text:
    """The answer as it stays on the screen."""
    parts = [title(answer)]
    for sequence in answer.sequences:
        if len(answer.sequences) > 1:
            parts.append(Text(f"{sequence.index + 1} of {len(answer.sequences)}", style=ASIDE))
        parts.append(Text(printable(sequence.text.strip("\n"))))
        if answer.error is None and (note := remark(sequence)):
            parts.append(Text(note, style=ASIDE))
    if answer.error is not None:
        parts.append(Text(FAILED, style=FAULT))
    return Text("\n").join(parts)


def tail(answer: Answer, console: Console, rows: int) -> Group:
    """The title and the last lines of the answer that is longest so far."""
    text = max((sequence.text for sequence in answer.sequences), key=len, default="").strip("\n")
    end = Text(printable(text[-console.width * (rows + 1) :]))
    lines = end.wrap(console, console.width)[-rows:]
    return Group(title(answer), *lines, Text())
