"""Commands that plan: `plan` shows what would be done, `convert` does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, NamedTuple

import typer

import ckptsurgery as cs

from . import parameters as o
from .output import save_page, show
from .ranks import among_ranks
from .recipe_from_options import beside_from, config_from, dims_from, recipe_from, seed_from
from .remedies import in_options
from .sources import open_source
from .targets import target_from

__all__ = ["convert", "plan", "restore_header"]


class _ConversionOptions(NamedTuple):
    """Options that only a conversion by a recipe can follow, by their names."""

    target: str | None
    config: str | None
    dim: list[str] | None
    drop: list[str] | None
    rest: str | None
    tie: list[str] | None
    dtype: str | None
    seed: str


def _planned(checkpoint: cs.Checkpoint, recipe: cs.Recipe | None, options: _ConversionOptions) -> cs.Plan:
    """Plan a conversion; without a recipe, the one that undoes what the file's provenance records."""
    if recipe is not None:
        return cs.plan(
            checkpoint,
            recipe,
            target=target_from(options.target),
            config=config_from(options.config),
            dims=dims_from(options.dim),
            dtype=options.dtype or "lossless",
            seed=seed_from(options.seed),
        )
    given = [f"--{name}" for name, value in options._asdict().items() if value and (name, value) != ("seed", "0")]
    if given:
        text = f"{', '.join(given)}: without a recipe, --inverse undoes what the file's provenance records, and no more"
        raise typer.BadParameter(f"{text}; convert its output in a second run", param_hint="--inverse")
    return cs.inverse(checkpoint)


def plan(
    source: o.MaybeSource = None,
    recipe: o.RecipeNames = None,
    start: o.From = None,
    end: o.To = None,
    rule: o.Rules = None,
    inverse: o.Inverse = False,
    target: o.Target = None,
    config: o.Config = None,
    dim: o.Dim = None,
    seed: o.Seed = "0",
    drop: o.Drop = None,
    rest: o.Rest = None,
    tie: o.Tie = None,
    dtype: o.DType = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="Explain how this key is made.")] = None,
    html: o.Html = None,
    json: o.Json = False,
) -> None:
    """Show what a conversion would do.

    Only headers are read. All problems are reported at once.

    \b
    ckptsurgery plan old.bin --rule 'module.{rest...} -> {rest...}'
    ckptsurgery plan old.bin --recipe mine.toml --target new.safetensors
    ckptsurgery plan old.bin --recipe mine.toml --html plan.html
    ckptsurgery plan old.bin --recipe mine.toml --explain layers.0.weight
    ckptsurgery plan new.safetensors --inverse
    """
    said = recipe_from(recipe, rule, route=(start, end), inverse=inverse, drop=drop, rest=rest, tie=tie)
    by_provenance = inverse and not (recipe or rule or start)
    with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
        made = _planned(
            checkpoint,
            None if by_provenance else said,
            _ConversionOptions(target, config, dim, drop, rest, tie, dtype, seed),
        )
        if html:
            save_page(made, html, f"{source} -> {', '.join(recipe or rule or ['the same names'])}")
        show(_in_options(made) if explain is None else made.explain(explain), json, wrap=True)


def convert(
    source: o.MaybeSource = None,
    destination: o.MaybeDestination = None,
    recipe: o.RecipeNames = None,
    start: o.From = None,
    end: o.To = None,
    rule: o.Rules = None,
    inverse: o.Inverse = False,
    target: o.Target = None,
    config: o.Config = None,
    dim: o.Dim = None,
    seed: o.Seed = "0",
    drop: o.Drop = None,
    rest: o.Rest = None,
    tie: o.Tie = None,
    dtype: o.DType = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    max_shard_size: o.MaxShardSize = None,
    max_memory: o.MaxMemory = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    in_place: o.InPlace = False,
    no_sync: o.NoSync = False,
    check: o.Check = False,
    provenance: o.Provenance = False,
    companions: o.Companions = False,
    beside: o.Beside = None,
    carry: o.Carry = None,
    carry_lost: o.CarryLost = None,
    template: o.Template = None,
    json: o.Json = False,
) -> None:
    """Convert a checkpoint.

    Other names, other shapes, another format, other shards: in one pass, streamed.

    \b
    ckptsurgery convert old.bin new.safetensors
    ckptsurgery convert old.bin out/ -r mine.toml --max-shard-size 5GB --check
    ckptsurgery convert new.safetensors back.safetensors -r mine.toml --inverse
    ckptsurgery convert here.pth there.pt --from family/here --to family/there
    ckptsurgery convert old.bin new.safetensors --recipe mine.toml --provenance
    ckptsurgery convert new.safetensors back.safetensors --inverse
    ckptsurgery convert x.safetensors x.safetensors --recipe mine.toml --in-place
    ckptsurgery convert run.pt new.pt --subtree model -r r.toml --carry optimizer
    ckptsurgery convert model/ new.gguf -r names.toml --template old.gguf
    ckptsurgery convert --mount vision.=tower/ --mount llm.=model/ joined/
    torchrun --nproc-per-node 4 -m ckptsurgery convert old/ new/ -r mine.toml
    """
    if mount and destination is None:
        source, destination = None, source
    if destination is None:
        raise typer.BadParameter("name the file or folder to write", param_hint="'DST'")
    with among_ranks() as ranks:
        said = recipe_from(recipe, rule, route=(start, end), inverse=inverse, drop=drop, rest=rest, tie=tie)
        by_provenance = inverse and not (recipe or rule or start)
        with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
            made = _planned(
                checkpoint,
                None if by_provenance else said,
                _ConversionOptions(target, config, dim, drop, rest, tie, dtype, seed),
            )
            report = made.save(
                destination,
                max_shard_size=max_shard_size,
                max_memory=max_memory,
                overwrite=overwrite,
                resume=resume,
                in_place=in_place,
                sync=not no_sync,
                check=check,
                provenance=provenance,
                companions=companions,
                beside=beside_from(beside),
                carry=carry,
                carry_lost=carry_lost,
                dry_run=dry_run,
                together=ranks is not None,
                template=template,
            )
    if ranks is None or not ranks.rank:
        show(_in_options(replace(made, warnings=report.warnings) if dry_run else report), json, wrap=True)


def _in_options(shown: cs.Plan | cs.Report) -> cs.Plan | cs.Report:
    """A plan or a report whose warnings name options in place of arguments."""
    return replace(shown, warnings=in_options(shown.warnings, {"--recipe", "--template", "--drop", "--rule", "--dim"}))


def restore_header(file: o.Source) -> None:
    """Undo an in-place conversion.

    The old header is kept in a hidden file beside the checkpoint.

    \b
    ckptsurgery restore-header big.safetensors
    """
    from ..storage.output import header_swap  # nothing for a program: it puts back what the command changed

    header_swap.restore_header(file)
