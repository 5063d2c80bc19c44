"""A page in headless Chromium, driven over its pipe with the devtools protocol."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"]
TO_BROWSER, FROM_BROWSER = 3, 4  # the file descriptors that it reads and writes
REPLY_S, CHANGE_S = 60.0, 60.0


class Page:
    """One tab. Scripts may await; what they throw is an `AssertionError` here."""

    def __init__(self, into: int, out: int) -> None:
        self._into = into
        self._out = out
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + REPLY_S
        while (reply := self._read(deadline)).get("id") != self._number:
            pass  # events, which nobody waits for
        assert "error" not in reply, reply["error"]
        result: dict[str, Any] = reply["result"]
        return result

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._out, 1 << 16)
            assert piece, "the browser has gone"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def evaluate(self, script: str) -> Any:
        """The value of an expression."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + CHANGE_S
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"never true: {script}; the page says {self.text()!r}"
            time.sleep(0.05)

    def text(self) -> Any:
        """All that a reader sees."""
        return self.evaluate("document.body.innerText")

    def open(self, url: str) -> None:
        """Wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """A key by its name and its Windows virtual key code."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """As a phone or a desktop of this size, in CSS pixels."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path) -> None:
        """What is seen now, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium_page() -> Iterator[Page]:
    """A tab of a browser of its own. Skips where there is none."""
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    theirs_in, into = os.pipe()
    out, theirs_out = os.pipe()
    high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (theirs_in, theirs_out))

    def place() -> None:
        os.dup2(high_in, TO_BROWSER)
        os.dup2(high_out, FROM_BROWSER)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [browser, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            pass_fds=(TO_BROWSER, FROM_BROWSER),
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, high_in, high_out):
            os.close(end)
        try:
            yield Page(into, out)
        finally:
            os.close(into)  # which tells it to end
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(out)
