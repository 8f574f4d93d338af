"""Help texts fit a terminal of 80 columns, examples included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from typer.main import get_command

from ckptsurgery.cli.program import app


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        yield f"{name} {key}".strip(), command
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {key}".strip())


@pytest.mark.parametrize(("name", "command"), list(commands(get_command(app))), ids=lambda part: str(part)[:20])
def test_help_fits_80_columns_and_has_an_example(name: str, command: Any) -> None:
    context = click.Context(command, info_name=f"ckptsurgery {name}", terminal_width=80)
    lines = command.get_help(context).splitlines()
    assert not [line for line in lines if len(line) > 80]
    assert any(line.strip().startswith(f"ckptsurgery {name}") for line in lines[1:])
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name
