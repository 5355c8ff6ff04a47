"""A headless Chromium, asked over its debugging pipe: what a page loads, complains about, measures and looks like."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


@dataclass
class Browser:
    """One page of a browser."""

    to: BinaryIO
    back: BinaryIO
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come in between are kept."""
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file at that width, until it is done."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression amounts to in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """What stands in the page's console."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """All addresses that the page asked for, its own first."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [str(request["request"]["url"]) for request in sent]

    def screenshot(self, to: Path) -> None:
        """The whole page as PNG."""
        self.to.flush()
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(found["data"]))

    def _read(self) -> dict[str, Any]:
        parts = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "chromium is gone"
            parts += byte
        message: dict[str, Any] = json.loads(parts)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a new profile, and end it."""
    assert CHROMIUM is not None
    (read_theirs, write_ours), (read_ours, write_theirs) = os.pipe(), os.pipe()
    start = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
    command = ["bash", "-c", start, CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    theirs = (read_theirs, write_theirs)
    with subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL) as process:
        for end in theirs:
            os.close(end)
        with os.fdopen(write_ours, "wb") as to, os.fdopen(read_ours, "rb") as back:
            page = Browser(to, back)
            try:
                targets = page.ask("Target.getTargets")["targetInfos"]
                target = next(t["targetId"] for t in targets if t["type"] == "page")
                session = page.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                page.session = str(session)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    page.ask(f"{domain}.enable")
                yield page
            finally:
                process.terminate()
