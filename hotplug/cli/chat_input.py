"""The lines that a person types into `hotplug chat`: history, editing, and messages of several lines.

Enter sends, Alt-Enter begins a new line, and pasted text keeps its lines. The history of earlier conversations lies
beside the models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

HISTORY = "chat_history"


def reader(folder: Path) -> Callable[[], str]:
    """What asks for the next message, with its history in `folder`.

    The function raises KeyboardInterrupt where Ctrl-C drops what was typed, and EOFError for Ctrl-D.
    """
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(history=_history(folder), key_bindings=_keys(), multiline=True,
                                                prompt_continuation="  ")  # fmt: skip
    return lambda: session.prompt("\n> ")


def _keys() -> KeyBindings:
    """Enter sends; the terminal marks pasted text, whose line ends therefore come as text."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(folder: Path) -> History:
    """Kept in a file that only its owner reads; in memory where none can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = folder / HISTORY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("a"):
            return FileHistory(file)
    except OSError:
        return InMemoryHistory()
