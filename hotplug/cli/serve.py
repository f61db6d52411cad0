"""`hotplug serve`: the OpenAI-compatible server, with what a person wants to read while it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from hotplug.cli.display import device_line, fetch, selected
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
    path = fetch(engine.model)
    typer.echo(f"files    {path}")
    if server.port:
        typer.echo(f"address  {_url(server.host, server.port)}")
    run(engine, server, on_ready=lambda url: typer.echo(ready_text(url, engine.model_name, bool(server.api_key))))


def ready_text(url: str, model: str, needs_key: bool) -> str:
    """What to print when requests are served: one curl line and one Python line that work as they stand."""
    base = url.replace("://0.0.0.0", "://127.0.0.1").replace("://[::]", "://[::1]")
    # a question whose answer is the same in every format of the weights: others are near ties to a small model
    message = {"role": "user", "content": "What is the capital of Japan?"}
    # greedy: a small model rambles at the API's default temperature of 1
    body = json.dumps({"model": model, "messages": [message], "temperature": 0})
    header = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    key = "YOUR_KEY" if needs_key else "none"
    python = (
        f"from openai import OpenAI; print(OpenAI(base_url='{base}/v1', api_key='{key}').chat.completions.create("
        f"model='{model}', messages=[{message}], temperature=0).choices[0].message.content)"
    )
    return "\n".join(
        [
            f"ready    {url}",
            "",
            "Try it with curl:",
            f"  curl {base}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'",
            "or with the openai package:",
            f'  {_python()} -c "{python}"',
            "",
            "Ctrl-C stops the server.",
        ]
    )


def _python() -> str:
    """How to call the Python that has hotplug's packages, short where the working folder allows it."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
