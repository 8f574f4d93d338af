"""The sources of a command: one place, or several that are mounted under prefixes; and two of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import typer

import ckptsurgery as cs

__all__ = ["SourceOptions", "open_source", "open_two"]


class SourceOptions(NamedTuple):
    """The options of a source besides its place; each as in `cs.open`."""

    mount: Sequence[str] | None = None
    subtree: str | None = None
    by_file: bool = False
    component: str | None = None
    file: str | None = None
    download: bool = False


@contextmanager
def open_two(
    first: str | None, second: str | None, options: SourceOptions, other: SourceOptions
) -> Iterator[tuple[cs.Checkpoint, cs.Checkpoint]]:
    """Open the two checkpoints that a command compares.

    Args:
        first, second: their places. With mounts for one of them its place may be left out; a place alone is then
            that of the other.
        options: of the first; but for mounts, of the second too where `other` has none. A file has neither components
            nor files.
        other: of the second.

    Raises:
        typer.BadParameter: fewer than two checkpoints, or a mount without a prefix.
        CheckpointError: as `cs.open` does.
    """
    if second is None and options.mount and not other.mount:
        first, second = None, first
    if (first is None and not options.mount) or (second is None and not other.mount):
        raise typer.BadParameter("name two checkpoints, or mount them with --mount and --mount-other")
    inside = second is not None and not Path(second).is_file()
    both = SourceOptions(
        other.mount,
        other.subtree or options.subtree,
        options.by_file,
        other.component or (options.component if inside else None),
        other.file or (options.file if inside else None),
        options.download,
    )
    with open_source(first, *options) as one, open_source(second, *both, option="--mount-other") as two:
        yield one, two


def open_source(
    source: str | None,
    mount: Sequence[str] | None = None,
    subtree: str | None = None,
    by_file: bool = False,
    component: str | None = None,
    file: str | None = None,
    download: bool = False,
    option: str = "--mount",
) -> cs.Checkpoint:
    """Open what a command reads.

    Args:
        source: the place; None where there are mounts alone.
        mount: more places, each as `PREFIX=PLACE`; the source is mounted without a prefix beside them, or one of these.
        subtree, by_file, component, file, download: as `cs.open` has them.
        option: by which the mounts were given.

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
        if not (equals and place) or prefix in places:
            raise typer.BadParameter(
                f"{text!r} is not PREFIX=SRC, or its prefix is given twice", param_hint=f"'{option}'"
            )
        places[prefix] = place if not download else cs.open(place, download=True)
    return cs.open(places, subtree)
