"""`adapters`: low-rank adapters, merged into a base model and extracted from two models."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import ckptsurgery as cs

from . import parameters as o
from .output import show
from .sources import SourceOptions, open_source, open_two
from .words import Command, CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)

_Base = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a file, a folder, or hf://org/repo[@rev].")]


@app.callback()
def adapters() -> None:
    """Merge LoRA adapters into a base model, or extract one.

    \b
    ckptsurgery adapters merge model/ merged/ --adapter lora/
    ckptsurgery adapters extract model/ tuned/ lora/ --rank 16
    """


@app.command("merge", cls=Command)
def merge(
    base: _Base,
    destination: o.Destination,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", metavar="SRC", help="PEFT folder, or diffusers or kohya file. Repeatable."),
    ],
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", metavar="W", help="Of each adapter, in order; 1 if not given. Repeatable."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="R", help="From the adapter's layout of weights to the base's."),
    ] = None,
    max_shard_size: o.MaxShardSize = None,
    max_memory: o.MaxMemory = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    no_sync: o.NoSync = False,
    check: o.Check = False,
    companions: o.Companions = False,
    subtree: o.Subtree = None,
    component: o.Component = None,
    file: o.File = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """Merge adapters into a base model.

    Alpha, ranks and variants are those of adapter_config.json. All other tensors
    are copied. A tensor of an adapter without a place is an error.

    \b
    ckptsurgery adapters merge model/ merged/ -a lora/ --companions
    ckptsurgery adapters merge model/ out.safetensors -a style.safetensors -w 0.8
    ckptsurgery adapters merge model/ both/ -a one/ -w 0.5 -a two/ -w 0.5
    ckptsurgery adapters merge fused/ merged/ -a lora/ -r to_fused.toml
    ckptsurgery adapters merge model/ merged/ -a lora/ --dry-run
    ckptsurgery adapters merge pipeline/ out/ -a x.safetensors --component vae
    """
    weights = [_number(text, "--weight") for text in weight] if weight else None
    with open_source(base, subtree=subtree, component=component, file=file, download=download) as checkpoint:
        made = cs.adapters.merge(checkpoint, *adapter, weights=weights, recipe=recipe)
        report = made.save(
            destination,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            overwrite=overwrite,
            sync=not no_sync,
            check=check,
            companions=companions,
            dry_run=dry_run,
        )
    show(made if dry_run else report, json, wrap=True)


class AdapterSpelling(StrEnum):
    """The spellings in which an adapter is written."""

    peft = "peft"
    kohya = "kohya"
    diffusers = "diffusers"


@app.command("convert", cls=Command)
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or a diffusers or kohya file.")],
    destination: o.Destination,
    base: Annotated[str, typer.Option("--base", metavar="SRC", help="The base model, whose names are followed.")],
    to: Annotated[AdapterSpelling, typer.Option("--to", help="The spelling to write.")],
    prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Before module names, such as lora_te1 for kohya.")
    ] = None,
    subtree: o.Subtree = None,
    component: o.Component = None,
    file: o.File = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """Convert an adapter to another spelling.

    Alpha of each module goes along.

    \b
    ckptsurgery adapters convert x.safetensors lora/ --base model/ --to peft
    ckptsurgery adapters convert lora/ x.safetensors --base model/ --to kohya
    """
    with open_source(base, subtree=subtree, component=component, file=file, download=download) as checkpoint:
        made = cs.adapters.convert(adapter, checkpoint, destination, to.value, prefix=prefix)
    show({"path": made, "spelling": to.value} if json else f"wrote {made}", json)


class OtherTensors(StrEnum):
    """The fate of tensors that differ and are not matrices."""

    error = "error"
    whole = "whole"
    drop = "drop"


@app.command("extract", cls=Command)
def extract(
    base: _Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model, of the same layout.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The new folder to write, in PEFT's form.")],
    rank: Annotated[
        str | None, typer.Option(metavar="N", help="Of every update, or less where the difference has less.")
    ] = None,
    energy: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Instead of --rank: the share of each difference to keep, such as 0.95."),
    ] = None,
    others: Annotated[
        OtherTensors, typer.Option("--others", help="Tensors that differ and are not matrices, such as norms.")
    ] = OtherTensors.error,
    embedding: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A module that is an embedding; by default those that are called so."),
    ] = None,
    subtree: o.Subtree = None,
    component: o.Component = None,
    file: o.File = None,
    download: o.Download = False,
    subtree_other: o.SubtreeOther = None,
    component_other: o.ComponentOther = None,
    file_other: o.FileOther = None,
    json: o.Json = False,
) -> None:
    """Extract the difference of two models as an adapter.

    Each difference of matrices is cut to its largest singular values.

    \b
    ckptsurgery adapters extract model/ tuned/ lora/ --rank 16
    ckptsurgery adapters extract model/ tuned/ lora/ --energy 0.95 --others whole
    """
    given = SourceOptions(None, subtree, False, component, file, download)
    other = SourceOptions(None, subtree_other, False, component_other, file_other)
    with open_two(base, tuned, given, other) as (first, second):
        made = cs.adapters.extract(
            first,
            second,
            destination,
            rank=None if rank is None else int(_number(rank, "--rank", whole=True)),
            energy=None if energy is None else _number(energy, "--energy"),
            others=others.value,
            embeddings=embedding or None,
        )
    show(made, json)


def _number(text: str, option: str, whole: bool = False) -> float:
    """The number of an option; anything else is wrong usage."""
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not {'an integer' if whole else 'a number'}", param_hint=option
        ) from None
