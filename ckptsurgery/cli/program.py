"""The program: its commands, and what becomes of an error."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from ..errors import CkptSurgeryError
from . import adapters_command, converting, demo_command, inferring, looking, operations, recipes_command
from .output import complain
from .parameters import Version
from .words import Command, CommandGroup

__all__ = ["app"]

_INTERRUPTED = 130  # 128 + SIGINT and 128 + SIGPIPE, as a shell reports them
_PIPE_CLOSED = 141


class _ErrorReporting(CommandGroup):
    """Turns what a command raises into a message and an exit code; only a defect of the library leaves a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        as_json = "--json" in (*ctx._protected_args, *ctx.args)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except CkptSurgeryError as error:
            complain(error, as_json, _options(self.get_command(ctx, ctx.invoked_subcommand or "")))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever reads us has gone; without this the interpreter would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_PIPE_CLOSED) from None
        return result


def _options(command: Any) -> set[str]:
    """The options of a command, or of all commands of a group, such as `"--drop"`."""
    inside = getattr(command, "commands", {}).values()
    return {option for parameter in getattr(command, "params", ()) for option in parameter.opts}.union(
        *map(_options, inside)
    )


app = typer.Typer(
    cls=_ErrorReporting,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback()
def program(version: Version = False) -> None:
    """Checkpoint surgery for PyTorch, by rules of one line: inspect, plan, convert, prove.

    \b
    ckptsurgery inspect model.safetensors
    ckptsurgery convert old.bin new.safetensors --rule 'module.{k...} -> {k...}'
    """


for command in (
    looking.inspect,
    converting.plan,
    converting.convert,
    converting.restore_header,
    looking.diff,
    looking.ties,
    looking.doctor,
    looking.explain,
    inferring.suggest,
    inferring.verify,
    inferring.check_loaded,
    demo_command.demo,
):
    app.command(cls=Command)(command)
app.add_typer(recipes_command.app, name="recipes")
app.add_typer(operations.app, name="ops")
app.add_typer(adapters_command.app, name="adapters")
