"""`hotplug serve`: the OpenAI-compatible server, with what a person wants to read while it starts."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from hotplug.cli.chat_template import has_chat_template
from hotplug.cli.display import device_line, fetch_model, selected
from hotplug.cli.options import takes
from hotplug.core.config import EngineConfig
from hotplug.server.config import ServerConfig


@takes(engine=EngineConfig, server=ServerConfig)
def serve(engine: EngineConfig, server: ServerConfig) -> None:
    """Serve a model over the OpenAI-compatible HTTP API."""
    from hotplug.server.serve import check, listen, run

    check(server)
    with listen(server):
        pass  # a port in use is known before a model is fetched; `run` takes it again
    typer.echo(f"model    {engine.model_name}")
    selection = selected(engine.device)
    typer.echo(f"device   {device_line(selection)}")
    path = fetch_model(engine)
    typer.echo(f"files    {path}")
    if server.port:
        typer.echo(f"address  {_url(server.host, server.port)}")
    chats = has_chat_template(path, engine.chat_template)
    run(engine, server,
        on_ready=lambda url: typer.echo(ready_text(url, engine.model_name, bool(server.api_key), chats)))  # fmt: skip


def ready_text(url: str, model: str, needs_key: bool, chats: bool = True) -> str:
    """What to print when requests are served: a line for curl, and one for Python, that work as they stand.

    A model without a chat template (`chats` false) is asked for a completion; without the openai package in this
    environment there is no line for it.
    """
    base = url.replace("://0.0.0.0", "://127.0.0.1").replace("://[::]", "://[::1]")
    # greedy: a small model rambles at the API's default temperature of 1
    if chats:
        # a question whose answer is the same in every format of the weights: others are near ties to a small model
        message = {"role": "user", "content": "What is the capital of Japan?"}
        path, asked, answer = "chat/completions", {"messages": [message], "temperature": 0}, "message.content"
    else:
        asked = {"prompt": "The capital of Japan is", "max_tokens": 16, "temperature": 0}
        path, answer = "completions", "text"
    body = shlex.quote(json.dumps({"model": model, **asked}))
    header = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    lines = [
        f"ready    {url}",
        "",
        "Try it with curl:",
        f"  curl {base}/v1/{path}{header} -H 'Content-Type: application/json' -d {body}",
    ]
    if find_spec("openai") is not None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in {"model": model, **asked}.items())
        python = (
            f"from openai import OpenAI; client = OpenAI(base_url='{base}/v1', "
            f"api_key='{'YOUR_KEY' if needs_key else 'none'}'); "
            f"print(client.{path.replace('/', '.')}.create({arguments}).choices[0].{answer})"
        )
        lines += ["or with the openai package:", f"  {shlex.quote(_python())} -c {_double_quoted(python)}"]
    return "\n".join([*lines, "", "Ctrl-C stops the server."])


def _double_quoted(text: str) -> str:
    """`text` as one word for a shell, readable where it holds single quotes only."""
    return f'"{text}"' if not re.search(r'["$`\\!]', text) else shlex.quote(text)


def _python() -> str:
    """How to call the Python that has hotplug's packages, short where the working folder allows it."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
