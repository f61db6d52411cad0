"""The `hotplug` command: its groups, and how errors reach the user.

Command modules import only what their flags need; torch, the server and the rest load when a command runs,
so that `--help` and `devices` answer at once (bar: 1 s cold, tests/test_cli.py).
"""

from __future__ import annotations

import errno
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hotplug.cli import bench, bisect, chat, conform, devices, doctor, explain, plugin, pull, run, serve, tune, version
from hotplug.cli.options import SectionedCommand
from hotplug.core.errors import ConfigError, HotplugError, RequestError

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 128 + signal.SIGINT


class Commands(TyperGroup):
    """The top group: takes `--debug` anywhere, and turns deliberate errors into a message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(a for a in args[:end] if a != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HotplugError as error:
            if ctx.params.get("debug"):
                raise
            fail(error)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            fail(HotplugError("what the command prints cannot be written", why=str(error.strerror)))


def fail(error: HotplugError) -> None:
    """Print the error on stderr and leave: 2 for what the user asked for, 1 for what could not be done."""
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(USAGE_ERROR if isinstance(error, ConfigError | RequestError) else FAILURE)


app = typer.Typer(
    cls=Commands,
    help="One LLM inference and serving engine for every accelerator.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long flags off in a terminal of 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command; `Commands` reads them from the context."""


app.command("serve", cls=SectionedCommand)(serve.serve)
app.command("chat", cls=SectionedCommand)(chat.chat)
app.command("run", cls=SectionedCommand)(run.run)
app.add_typer(bench.app, name="bench")
app.command("explain", cls=SectionedCommand)(explain.explain)
app.command("bisect", cls=SectionedCommand)(bisect.bisect)
app.command("conform")(conform.conform)
app.command("tune", cls=SectionedCommand)(tune.tune)
app.command("devices")(devices.devices)
app.add_typer(plugin.app, name="plugin")
app.command("pull")(pull.pull)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)
