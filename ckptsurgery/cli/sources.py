"""The source of a command: one place, or several that are mounted under prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

import ckptsurgery as cs

__all__ = ["open_source"]


def open_source(
    source: str | None,
    mount: Sequence[str] | None = None,
    subtree: str | None = None,
    by_file: bool = False,
    component: str | None = None,
    file: str | None = None,
    download: bool = False,
) -> cs.Checkpoint:
    """Open what a command reads.

    Args:
        source: the place; None where there are mounts alone.
        mount: more places, each as `PREFIX=PLACE`; the source is mounted without a prefix beside them.
        subtree, by_file, component, file, download: as `cs.open` has them.

    Raises:
        typer.BadParameter: no source at all, or a mount without a prefix.
        CheckpointError: as `cs.open` does.
    """
    if not mount:
        if source is None:
            raise typer.BadParameter("name a source, or mount some with --mount PREFIX=SRC", param_hint="'SRC'")
        return cs.open(source, subtree, by_file, component=component, file=file, download=download)
    places: dict[str, Any] = {}
    if source is not None:
        places[""] = cs.open(source, by_file=by_file, component=component, file=file, download=download)
    for text in mount:
        prefix, equals, place = text.partition("=")
        if not (prefix and equals and place) or prefix in places:
            raise typer.BadParameter(
                f"{text!r} is not PREFIX=SRC, or its prefix is given twice", param_hint="'--mount'"
            )
        places[prefix] = place if not download else cs.open(place, download=True)
    return cs.open(places, subtree)
