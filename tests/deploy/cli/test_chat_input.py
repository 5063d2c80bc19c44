"""What is typed or pasted into `eagleray chat` as messages, on a pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

PROGRAM = """
from eagleray.deploy.cli.chat_input import ChatInput
messages = ChatInput()
while (message := messages.read()) is not None:
    print("<", ascii(message), ">", flush=True)
print("end")
"""
PATIENCE_S = 60.0
UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


class Typist:
    """Presses keys, and sees the messages that come of them."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._seen = ""

    def wait_for(self, pattern: str) -> str:
        """The next of it; what came before is forgotten."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self._seen)) is None:
            assert select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))[0], self._seen
            self._seen += os.read(self._file, 65536).decode()
        self._seen = self._seen[found.end() :]
        return found[0]

    def press(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, and again if nothing comes of it: Python's readline misses signals between two of its waits."""
        self._seen = ""
        deadline = time.monotonic() + PATIENCE_S
        self.press(CTRL_C)
        while "> " not in self._seen:
            assert time.monotonic() < deadline, self._seen
            if select.select([self._file], [], [], 5.0)[0]:
                self._seen += os.read(self._file, 65536).decode()
            else:
                self.press(CTRL_C)
        self._seen = ""

    def message(self, keys: str) -> str:
        self.press(keys)
        return self.wait_for(r"< .* >").strip("<> ")


@pytest.fixture
def typist() -> Iterator[Typist]:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True, preexec_fn=become_foreground,
    )  # fmt: skip
    os.close(theirs)
    try:
        typist = Typist(ours)
        typist.wait_for(r"\x1b\[\?2004h")  # or terminals put no brackets around a paste
        typist.wait_for("> ")
        yield typist
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def become_foreground() -> None:
    """So that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def pasted(text: str) -> str:
    """As terminals send it to programs that ask for brackets around it; they put a return for every new line."""
    return f"\x1b[200~{text}\x1b[201~".replace("\n", "\r")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        (pasted("one\n\n  two\nthree") + "\r", "one\n\n  two\nthree"),
        ("see: " + pasted("a\nb\n") + "what is it?\r", "see: a\nb\nwhat is it?"),
        (pasted("/home/me\n/exit") + "\r", "/home/me\n/exit"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("one\\\rtwo\\\rthree\r", "one\ntwo\nthree"),
        ('"""\rone\r\r  two\r"""\r', "one\n\n  two"),
        ('"""one\rtwo"""\r', "one\ntwo"),
        ('"""one line"""\r', "one line"),
        (f'"""one\rtwo\r{CTRL_D}', "one\ntwo"),
    ],
)
def test_several_lines_are_one_message(typist: Typist, keys: str, message: str) -> None:
    assert typist.message(keys) == ascii(message)
    typist.wait_for("> ")
    assert typist.message("next\r") == "'next'"


@pytest.mark.parametrize("begun", ["hel", '"""\rone\r', "one\\\r"])
def test_ctrl_c_forgets_what_was_begun(typist: Typist, begun: str) -> None:
    typist.press(begun)
    if "\r" in begun:
        typist.wait_for(r"\. ")  # the next line's prompt
    else:
        typist.wait_for(begun)
    typist.interrupt()
    assert typist.message("next\r") == "'next'"


def test_what_was_pasted_is_in_the_history(typist: Typist) -> None:
    assert typist.message(pasted("one\ntwo") + "\r") == ascii("one\ntwo")
    typist.wait_for("> ")
    assert typist.message(f"{UP}\r") == ascii("one\ntwo")


def test_ctrl_d_ends(typist: Typist) -> None:
    typist.press(CTRL_D)
    typist.wait_for("end")


def test_without_a_terminal_every_line_is_a_message_and_a_byte_order_mark_is_none() -> None:
    text = 'one\\\n"""two\n'.encode("utf-8-sig")
    run = subprocess.run([sys.executable, "-c", PROGRAM], input=text, capture_output=True, check=True, timeout=60)
    assert run.stdout.decode().split("\n")[:2] == [f"< {'one' + chr(92)!a} >", '< \'"""two\' >']
