"""`hotplug run`: one prompt, its answer streamed to standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hotplug.cli.display import fetch_model
from hotplug.cli.options import takes
from hotplug.cli.sampling import MaxTokens, Temperature, TopK, TopP, sampling_params
from hotplug.cli.trace_view import trace_lines
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError


@takes(engine=EngineConfig)
def run(
    engine: EngineConfig,
    *,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, standard input is read.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")] = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_tokens: MaxTokens = None,
    trace_json: Annotated[
        Path | None, typer.Option("--trace-json", metavar="FILE", help="Write what --trace-ops timed, by site.")
    ] = None,
) -> None:
    """Answer one prompt, from the argument or standard input."""
    text = _prompt(prompt)
    if trace_json is not None and not engine.trace_ops:
        raise ConfigError("there is nothing to write", where="--trace-json", hint="Add --trace-ops.")
    params = sampling_params(temperature, top_p, top_k, max_tokens)
    fetch_model(engine)
    from hotplug.core.client.llm import LLM

    llm = LLM.from_config(engine)
    chats = not raw and llm.tokenizer.chat_template is not None
    if not chats and not raw:
        typer.secho("(the model has no chat template: the text is completed as it is, as with --raw)", fg="yellow",
                    err=True)  # fmt: skip
    chunks = llm.chat_stream([{"role": "user", "content": text}], params) if chats else llm.stream(text, params)
    for chunk in chunks:
        typer.echo(chunk.text, nl=False)
        sys.stdout.flush()
    typer.echo()
    if engine.trace_ops:
        trace = llm.core.trace()
        for line in trace_lines(trace):
            typer.echo(line, err=True)
        if trace_json is not None:
            trace_json.write_text(json.dumps(trace, indent=1))


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise ConfigError("no prompt", hint='Write `hotplug run MODEL "PROMPT"`, or pipe the prompt in.')
    text = sys.stdin.read() if given is None else given
    if not text.strip():
        raise ConfigError("the prompt is empty", where="stdin" if given is None else "PROMPT")
    return text
