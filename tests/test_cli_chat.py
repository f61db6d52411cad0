"""`hotplug chat` in a terminal: keys, history, several lines, and ways out. Through a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from types import SimpleNamespace
from hotplug.cli import chat
from hotplug.core.request import SamplingParams

class Echo:
    def chat_stream(self, messages, params):
        text = messages[-1]["content"]
        yield SimpleNamespace(text=f"got {text!r} as {len(messages)}")
        while text == "wait":
            time.sleep(0.01)
            yield SimpleNamespace(text=".")

chat._talk(chat.Conversation(Echo(), SamplingParams()))
print("left")
"""


class Terminal:
    """A program in a pseudo-terminal: what is typed, and what it shows."""

    def __init__(self, cache: Path) -> None:
        self._main, other = pty.openpty()
        termios.tcsetwinsize(other, (40, 120))
        environment = {**os.environ, "TERM": "xterm", "HOTPLUG_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=other, stdout=other, stderr=other,
                                         env=environment, start_new_session=True,
                                         preexec_fn=_controlling_terminal)  # fmt: skip
        os.close(other)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def wait_for(self, text: str, timeout: float = 20.0) -> None:
        """Read until `text` is shown, and forget what was shown up to it."""
        deadline = time.monotonic() + timeout
        while text not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._main], [], [], left)[0], f"{text!r} is not in {self._seen!r}"
            try:
                data = os.read(self._main, 4096)
            except OSError:  # the program has left
                data = b""
            assert data, f"{text!r} is not in {self._seen!r}"
            self._seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
        self._seen = self._seen[self._seen.index(text) + len(text) :]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)


def _controlling_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path: Path):
    opened = Terminal(tmp_path / "cache")
    opened.wait_for(">")
    yield opened
    opened.close()


def test_enter_sends_and_the_conversation_goes_on(terminal: Terminal) -> None:
    terminal.type("hello\r")
    terminal.wait_for("got 'hello' as 1")
    terminal.wait_for(">")
    terminal.type("again\r")
    terminal.wait_for("got 'again' as 3")


def test_alt_enter_begins_a_new_line(terminal: Terminal) -> None:
    terminal.type("one\x1b\rtwo\r")
    terminal.wait_for(r"got 'one\ntwo' as 1")


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~\r")
    terminal.wait_for(r"got 'one\ntwo\nthree' as 1")


def test_the_arrow_key_brings_back_an_earlier_message_also_of_another_conversation(tmp_path: Path) -> None:
    for said in ("first\r", "\x1b[A\r"):
        opened = Terminal(tmp_path / "cache")
        opened.wait_for(">")
        opened.type(said)
        opened.wait_for("got 'first' as 1")
        opened.close()
    assert (tmp_path / "cache" / "chat_history").stat().st_mode & 0o777 == 0o600


def test_ctrl_c_drops_what_was_typed(terminal: Terminal) -> None:
    terminal.type("never\x03")
    terminal.wait_for(">")
    terminal.type("hello\r")
    terminal.wait_for("got 'hello' as 1")


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(terminal: Terminal) -> None:
    terminal.type("wait\r")
    terminal.wait_for("got 'wait' as 1...")
    terminal.type("\x03")
    terminal.wait_for(">")
    terminal.type("more\r")
    terminal.wait_for("got 'more' as 3")


@pytest.mark.parametrize("keys", ["\x04", "/exit\r"])
def test_ctrl_d_and_exit_leave(terminal: Terminal, keys: str) -> None:
    terminal.type(keys)
    terminal.wait_for("left")


def test_a_cache_that_cannot_be_written_keeps_no_history(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    opened = Terminal(tmp_path / "file" / "cache")
    opened.wait_for(">")
    opened.type("hello\r")
    opened.wait_for("got 'hello' as 1")
    opened.close()
