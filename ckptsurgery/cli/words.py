"""Commands that take text as it is. typer would import pydantic, for 0.1 s, to find out that a string is a string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "Group"]


class Command(TyperCommand):
    """A command without pydantic, unless an argument has to be more than text."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the words behind the command's name."""
        _spare_text(self.get_params(ctx))
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """Commands under a common name, whose own options are text too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the words behind the group's name."""
        _spare_text(self.get_params(ctx))
        return super().parse_args(ctx, args)


def _spare_text(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        described = getattr(parameter, "type_descriptor", None)  # none where typer leaves it all to click, as it did
        if described is not None:
            text = described.annotation in (str, list[str])
            process = partial(_processed, parameter.process_value, text, parameter.required)
            parameter.process_value = process


def _processed(
    process: Callable[[typer.Context, Any], Any], text: bool, required: bool, ctx: typer.Context, value: Any
) -> Any:
    """What was not given stays None, text stays text; `process` makes everything else what it has to be."""
    as_it_is = not required if value is None else text
    return value if as_it_is else process(ctx, value)
