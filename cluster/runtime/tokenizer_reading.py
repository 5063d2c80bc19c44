"""Reads a tokenizer in the background while an engine starts."""

from concurrent.futures import wait
from functools import partial
from pathlib import Path
from threading import Lock

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.runtime.background import in_background

SOON_S = 0.2  # within which most of what may be wrong with small files is found


class TokenizerReading:
    """A tokenizer, which takes a second or so, and the process that its chat template needs."""

    def __init__(self, folder: Path) -> None:
        """Begin. Raises `ValueError` for what is seen soon."""
        self._lock = Lock()  # so that a process is either not started any more, or known to whoever gives up
        self._given_up = False
        self._warmed: Tokenizer | None = None  # once it has started a process
        self._tokenizer = in_background(partial(self._read, folder), "tokenizer")
        wait([self._tokenizer], SOON_S)
        self.check()

    def _read(self, folder: Path) -> Tokenizer:
        tokenizer = Tokenizer.from_dir(folder)
        with self._lock:
            if not self._given_up and tokenizer.warm_up():
                self._warmed = tokenizer
        return tokenizer

    def check(self) -> None:
        """Raise what is wrong with it, if that is known by now."""
        if self._tokenizer.done():
            self._tokenizer.result()

    def result(self) -> Tokenizer:
        """Wait for it. Raises what is wrong with it."""
        return self._tokenizer.result()

    def give_up(self) -> None:
        """Leave no process that only this has started."""
        with self._lock:
            self._given_up = True
            if self._warmed is not None:
                self._warmed.cool_down()
