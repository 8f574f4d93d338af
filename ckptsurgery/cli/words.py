"""Commands that take text as it is. typer would import pydantic, for 0.1 s, to find out that a string is a string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "CommandGroup"]


class _Words:
    """Reads words without pydantic, unless an argument has to be more than text."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Read the words behind the name."""
        _spare_text(self.get_params(ctx))  # type: ignore[attr-defined]
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return rest


class Command(_Words, TyperCommand):  # type: ignore[misc]
    """A command."""


class CommandGroup(_Words, TyperGroup):  # type: ignore[misc]
    """Commands under a common name, whose own options are text too."""


def _spare_text(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        described = getattr(parameter, "type_descriptor", None)  # none where typer leaves it all to click, as it did
        if described is not None and "process_value" not in vars(parameter):  # else a command called again has it
            text = described.annotation in (str, list[str])
            parameter.process_value = partial(_processed, parameter.process_value, text, parameter.required)


def _processed(
    process: Callable[[typer.Context, Any], Any], text: bool, required: bool, ctx: typer.Context, value: Any
) -> Any:
    """What was not given stays None, text stays text; `process` makes everything else what it has to be."""
    as_it_is = not required if value is None else text
    return value if as_it_is else process(ctx, value)
