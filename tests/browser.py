"""A headless Chromium that tests drive through its DevTools protocol: what a page does, asks for and complains of.

Debian's and Google's builds serve; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--no-sandbox",  # continuous integration runs as root in a container; the pages are our own files
    "--remote-debugging-port=0",
)
START_SECONDS = 60


def find() -> str:
    """The browser's path. Without one the test is skipped, and fails where HOTPLUG_TEST_BROWSER=required (.ci/run)."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("HOTPLUG_TEST_BROWSER") == "required":
        pytest.fail("no Chromium is installed, and HOTPLUG_TEST_BROWSER=required")
    if found is None:
        pytest.skip(f"no browser found (one of {', '.join(NAMES)}); ci/browser.sh installs Debian's")
    return found


class Browser:
    """A running browser. `close` ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [find(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._log = (folder / "browser.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._port = 0

    def start(self) -> None:
        """Waits until the browser listens. Raises RuntimeError with its log where it does not."""
        listening = self._folder / "profile" / "DevToolsActivePort"
        until = time.monotonic() + START_SECONDS
        while not (listening.exists() and listening.read_text().count("\n")):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the browser did not start:\n{(self._folder / 'browser.log').read_text()[-2000:]}")
            time.sleep(0.05)
        self._port = int(listening.read_text().split("\n")[0])
        self._session = self._wait(_session())

    def page(self) -> Page:
        """A new tab, whose requests and complaints are recorded from the first one on."""
        return Page(*self._wait(self._tab()), self._wait)

    async def _tab(self) -> tuple[aiohttp.ClientWebSocketResponse, str]:
        assert self._session is not None
        async with self._session.put(f"http://127.0.0.1:{self._port}/json/new?about:blank") as answer:
            told = await answer.json()
        socket = await self._session.ws_connect(told["webSocketDebuggerUrl"], max_msg_size=0)
        return socket, told["id"]

    def _wait(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, START_SECONDS))

    def close(self) -> None:
        if self._session is not None:
            self._wait(self._session.close())
        self._process.terminate()
        self._process.wait(timeout=START_SECONDS)
        self._loop.close()
        self._log.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


class Page:
    """A tab: commands of the DevTools protocol, and the events that came meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, name: str, wait: Any) -> None:
        self._socket, self._name, self._wait = socket, name, wait
        self._numbers = itertools.count(1)
        self.events: list[tuple[str, dict[str, Any]]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError where the browser refuses it."""
        return self._wait(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    async def _next(self) -> dict[str, Any]:
        message = await self._socket.receive_json()
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Loads a file, `width` x `height` CSS pixels large."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._wait(self._loaded())

    async def _loaded(self) -> None:
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            await self._next()

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises RuntimeError where it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind: str, x: float, y: float, *, held: bool = False) -> None:
        """`kind` is mouseMoved, mousePressed or mouseReleased, at a place of the window."""
        button = "left" if held or kind != "mouseMoved" else "none"
        count = 0 if kind == "mouseMoved" else 1
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(held), clickCount=count)

    def complaints(self) -> list[str]:
        """Uncaught exceptions, and errors and warnings of the console, since the page was opened."""
        self.evaluate("0")  # what happened before has been told by now
        found = []
        for name, told in self.events:
            if name == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif name == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
            elif name == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """The addresses that the page asked for, its own among them."""
        self.evaluate("0")
        return [told["request"]["url"] for name, told in self.events if name == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG file of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.call("Page.close")
        self._wait(self._socket.close())
