"""Headless Chromium for tests, by the standard library alone: its DevTools protocol over two pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "google-chrome")
SECONDS = 60.0  # that an answer may take: the first one on a machine in use takes ten


class Browser:
    """One tab. ``problems``: errors and warnings of the console, exceptions, loads that were blocked or not local."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._data, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, scripts: bool = True, dark: bool = False) -> None:
        """Load a file in a window of ``width`` pixels, and wait until it has loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + SECONDS
        while not self._loaded:
            self._event(until)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """One key on the keyboard, by its name."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Enter": 13, " ": 32, "Tab": 9, "ArrowLeft": 37}[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "",
                      windowsVirtualKeyCode=code)  # fmt: skip

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while (answer := self._event(until)).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _event(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._data:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium did not answer within {SECONDS:.0f} s"
            part = os.read(self._from, 1 << 20)
            assert part, "Chromium ended"
            self._data += part
        line, _, self._data = self._data.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        self._note(found.get("method", ""), found.get("params", {}))
        return found

    def _note(self, method: str, its: dict[str, Any]) -> None:
        self._loaded |= method == "Page.loadEventFired"
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(its["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and its["type"] in ("error", "warning"):
            self.problems.append(str(its["args"]))
        elif method == "Log.entryAdded" and its["entry"]["level"] in ("error", "warning"):
            self.problems.append(its["entry"]["text"])
        elif method == "Network.requestWillBeSent" and its["request"]["url"].split(":")[0] not in (
            "file",
            "data",
            "about",
        ):
            self.problems.append(f"it asked for {its['request']['url']}")


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block; ``profile``: an empty folder for its files."""
    program = next(filter(None, map(shutil.which, NAMES)))
    reads, to_browser = os.pipe()
    from_browser, writes = os.pipe()
    # Above 4, so that neither of the two numbers that Chromium expects is overwritten by the other.
    child_reads, child_writes = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (reads, writes))
    os.close(reads)
    os.close(writes)
    command = ["bash", "-c", f'exec "$@" 3<&{child_reads} 4>&{child_writes} {child_reads}<&- {child_writes}>&-', "-",
               program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--mute-audio",
               "--no-first-run", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required",
               f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(command, pass_fds=(child_reads, child_writes), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(child_reads)
    os.close(child_writes)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_browser)
        os.close(from_browser)
