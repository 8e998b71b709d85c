"""Runs an expression in a page that headless Chromium has opened, over its debugging pipe."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

LOOK = """({
  wide: document.documentElement.scrollWidth > window.innerWidth,
  scripts: document.scripts.length,
  foreign: [...document.images].filter((one) => !one.src.startsWith("data:")).length,
  broken: [...document.images].filter((one) => one.complete && !one.naturalWidth).length,
})"""
"""What may go wrong on any page: too wide for the window, scripts, images from elsewhere or damaged."""
GOOD = {"wide": False, "scripts": 0, "foreign": 0, "broken": 0}
"""What `LOOK` finds on a page without scripts."""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CPPO_NEED_BROWSER"), reason="no Chromium; CPPO_NEED_BROWSER=1 makes it fail"
)
"""A test that opens a page; continuous integration sets the variable, so that it cannot be left out there."""


def evaluate_in_page(page: Path, expression: str, *, width: int, profile: Path) -> Any:
    """The value of a promise evaluated in `page`, `width` pixels wide; every script error of the page fails."""
    assert BROWSER is not None, "no Chromium on the PATH"
    commands, to_browser = os.pipe()
    from_browser, replies = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe"
    command = f'exec "$0" {flags} --user-data-dir="$1" 3<&{commands} 4>&{replies}'
    process = subprocess.Popen(
        ["bash", "-c", command, BROWSER, str(profile)],
        pass_fds=(commands, replies),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(replies)
    try:
        with open(to_browser, "wb", buffering=0) as writer, open(from_browser, "rb") as reader:
            return _Session(writer, reader).run(page, expression, width)
    finally:
        process.kill()
        process.wait()


class _Session:
    def __init__(self, writer: Any, reader: Any) -> None:
        self.writer, self.reader, self.sent, self.session = writer, reader, 0, None
        self.failures: list[Any] = []

    def run(self, page: Path, expression: str, width: int) -> Any:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Runtime.enable")
        self.ask("Page.enable")
        self.ask("Log.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.ask("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        self.ask("Page.navigate", url=page.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass
        reply = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert not self.failures, self.failures
        assert "exceptionDetails" not in reply, reply
        return reply["result"]["value"]

    def ask(self, method: str, **parameters: Any) -> Any:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self.read()
            if reply.get("id") == self.sent:
                assert "error" not in reply, reply
                return reply["result"]

    def read(self) -> Any:
        buffer = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "the browser has gone"
            buffer += byte
        message = json.loads(buffer)
        entry = message.get("params", {}).get("entry", {})
        # What the page's own policy forbids, such as a script that slipped in, is logged as an error.
        if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            self.failures.append(message["params"])
        return message
