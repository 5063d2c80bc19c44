"""Reads a message for `eagleray chat`: one line, several lines or a paste."""

import readline
import sys

BLOCK = '"""'  # begins and ends a message of several lines, as in Python
CONTINUED = "\\"  # at a line's end
PROMPT, MORE = "> ", ". "
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"  # that Windows puts before a text


class ChatInput:
    """Messages from a terminal, with editing and history; elsewhere every line of standard input is one."""

    def __init__(self) -> None:
        self.at_terminal = sys.stdin is not None and sys.stdin.isatty()
        if self.at_terminal:
            readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one text, whatever lines it has
            readline.parse_and_bind(r'"\e\C-m": "\C-q\C-j"')  # Alt-Enter begins a line

    def read(self) -> str | None:
        """The next message without white space around it, or None at the end of input. Ctrl-C begins anew."""
        while True:
            try:
                return self._message() if self.at_terminal else input().removeprefix(BOM).strip()
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return None

    def _message(self) -> str:
        text = input(PROMPT)
        if text.lstrip().startswith(BLOCK):
            return _block(text.lstrip().removeprefix(BLOCK)).strip()
        while text.endswith(CONTINUED):
            text = f"{text.removesuffix(CONTINUED)}\n{_more()}"
        return text.strip()


def _block(text: str) -> str:
    """Lines up to the one that ends with the mark, or up to the end of input."""
    while not text.rstrip().endswith(BLOCK):
        try:
            text = f"{text}\n{input(MORE)}"
        except EOFError:
            print()
            return text
    return text.rstrip().removesuffix(BLOCK)


def _more() -> str:
    try:
        return input(MORE)
    except EOFError:
        print()
        return ""
