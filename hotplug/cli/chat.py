"""`hotplug chat`: a conversation in the terminal, or one line a turn from a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotplug.cli.display import device_line, fetch_model, selected
from hotplug.cli.options import takes
from hotplug.cli.sampling import MaxTokens, Temperature, TopK, TopP, sampling_params
from hotplug.core.config import EngineConfig
from hotplug.core.errors import RequestError

if TYPE_CHECKING:
    from hotplug.core.client.llm import LLM
    from hotplug.core.request import SamplingParams

HELP = "/reset starts over, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer"
KEYS = "Enter sends, Alt-Enter begins a new line, the arrow keys bring back earlier messages, Ctrl-D leaves"


@takes(engine=EngineConfig)
def chat(
    engine: EngineConfig,
    *,
    system: Annotated[str, typer.Option(help="System message of the conversation.")] = "",
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    max_tokens: MaxTokens = None,
) -> None:
    """Talk with a model in the terminal."""
    params = sampling_params(temperature, top_p, top_k, max_tokens)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        typer.echo(f"{engine.model_name} on {device_line(selected(engine.device))}")
    fetch_model(engine)
    from hotplug.core.client.llm import LLM

    conversation = Conversation(LLM.from_config(engine), params, system)
    if interactive:
        _talk(conversation)
    else:
        for line in sys.stdin:
            if not conversation.turn(line):
                return


class Conversation:
    """The messages so far, and what one input does to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str = "") -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget every turn, keep the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def turn(self, line: str) -> bool:
        """Take one input: a command, or a message that is answered on standard output. False to leave."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/exit":
                return False
            case "/reset":
                self.reset()
                typer.echo("(the conversation starts over)")
            case "/system":
                self._system = rest.strip()
                self.reset()
                typer.echo("(system message set; the conversation starts over)")
            case _ if command.startswith("/"):
                typer.echo(f"(no command {command}; {HELP})")
            case _:
                self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        """Stream the answer and remember it, also where Ctrl-C cut it short; a refused turn is forgotten."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            chunks = self._llm.chat_stream(messages, self._params)
            with _interruptible() as interrupted, contextlib.closing(chunks):  # type: ignore[type-var]
                for chunk in chunks:
                    typer.echo(chunk.text, nl=False)
                    sys.stdout.flush()
                    answer += chunk.text
                    if interrupted():
                        break
        except RequestError as error:
            typer.secho(f"error: {error}. /reset starts over.", fg="red", err=True)
            return
        typer.echo()
        self.messages = [*messages, {"role": "assistant", "content": answer}]


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag instead of raising: a step that is cut in the middle would leave the engine torn."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _talk(conversation: Conversation) -> None:
    from hotplug.cli.chat_input import reader
    from hotplug.core.weights.source import cache_folder

    typer.echo(f"{HELP}.\n{KEYS}.")
    read = reader(cache_folder())
    while True:
        try:
            message = read()
        except KeyboardInterrupt:
            continue  # drops the message that was being written
        except EOFError:
            return
        if not conversation.turn(message):
            return
