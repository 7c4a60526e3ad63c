"""A real headless Chromium for tests, spoken to over its DevTools pipe; nothing is downloaded or installed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds that an answer may take on a busy machine
# Chromium reads from descriptor 3 and writes to 4, whatever numbers the pipes have here
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number, inheritable=True)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page. `problems`: what the page said on its console as a warning or an error, and what it threw.

    `requests`: every address that the page asked for.
    """

    def __init__(self, program: str, profile: Path) -> None:
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _START,
                str(there),
                str(back),
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-extensions",
                "--disable-background-networking",
                "--no-first-run",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(there, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._buffer, self._number = b"", 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._session: str | None = None
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._out)
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._in)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        while True:
            found = self._next()
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])

    def open(
        self, path: Path, width: int, height: int = 900, dark: bool = False, phone: bool = False
    ) -> None:
        """Load a file and wait until it is loaded."""
        self.problems, self.requests, self._loaded = [], [], False
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.scheme(dark)
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._next()
        self.settle()

    def scheme(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def settle(self) -> None:
        """Wait until the page has been painted twice."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait(self, selector: str) -> None:
        """Until the page holds such an element, and has been painted with it."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"!!document.querySelector({json.dumps(selector)})"):
            assert time.monotonic() < end, f"no {selector}; {self.problems}"
            time.sleep(0.02)
        self.settle()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's when it is kept."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, out: Path, whole: bool = True, size: tuple[int, int] | None = None) -> None:
        """size: width and height from the page's top left corner, one pixel each; else all of it, or what is in view."""
        view: dict[str, Any] = {"captureBeyondViewport": whole}
        if size is not None:
            ratio = self.run("devicePixelRatio")
            view |= {"clip": {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 / ratio}}
        data = self.call("Page.captureScreenshot", format="png", **view)["data"]
        out.write_bytes(base64.b64decode(data))

    def pdf(self, out: Path) -> None:
        data = self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"]
        out.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0], "no answer"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser has gone"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        what, seen = message.get("method"), message.get("params", {})
        if what == "Page.loadEventFired":
            self._loaded = True
        elif what == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(seen["exceptionDetails"]))
        elif what == "Runtime.consoleAPICalled" and seen["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(seen["args"]))
        elif what == "Log.entryAdded" and seen["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(seen["entry"]))
        elif what == "Network.requestWillBeSent":
            self.requests.append(seen["request"]["url"])
        return message
