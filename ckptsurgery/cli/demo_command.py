"""`demo`: the whole story on data that ships with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import show
from .parameters import Json

__all__ = ["demo"]


def demo(
    folder: Annotated[str | None, typer.Option(metavar="DIR", help="Keep the files that the demo writes here.")] = None,
    seed: Annotated[int, typer.Option(help="What the training starts from.")] = 0,
    json: Json = False,
) -> None:
    """Show a real transfer, in about half a minute.

    Train a small model, save it, move it into another architecture, and compare with a start from scratch.

    \b
    ckptsurgery demo
    ckptsurgery demo --seed 7 --folder demo-files
    """
    from ..demo.story import tell

    outcome = tell(folder, seed, quiet=json)
    if json:
        show(outcome, as_json=True)
