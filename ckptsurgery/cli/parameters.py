"""The options that commands share, each defined once: `looking`, `converting` and `catalog` use them as `o.Name`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ckptsurgery {version('ckptsurgery')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]

Source = Annotated[str, typer.Argument(metavar="SRC", help="A file, a folder, or hf://org/repo[@rev][/file].")]
MaybeSource = Annotated[
    str | None,
    typer.Argument(metavar="[SRC]", show_default=False, help="A file, a folder, or hf://org/repo[@rev][/file]."),
]
MaybeFirst = Annotated[str | None, typer.Argument(metavar="[A]", show_default=False, help="A checkpoint.")]
MaybeSecond = Annotated[str | None, typer.Argument(metavar="[B]", show_default=False, help="Another.")]
MaybeDestination = Annotated[
    str | None, typer.Argument(metavar="DST", show_default=False, help="The file or folder to write.")
]
Destination = Annotated[str, typer.Argument(metavar="DST", help="The file or folder to write.")]
Subtree = Annotated[
    str | None, typer.Option(metavar="PATH", help="Where the tensors lie inside a training checkpoint: 'state_dict'.")
]
ByFile = Annotated[bool, typer.Option("--by-file", help="Put each file's name before its keys: 'rank0/layers.0.w'.")]
Component = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a folder of several models, such as a diffusers root: this one, 'vae'."),
]
File = Annotated[str | None, typer.Option("--file", metavar="NAME", help="Of a folder: this file.")]
Mount = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PREFIX=SRC",
        help="Another source, with PREFIX before its keys: vision.=clip/. With it SRC may be left out. Repeatable.",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Of hf://: fetch whole files into the hub's cache instead of ranges.")
]

_SECOND = "Second checkpoint"
SubtreeOther = Annotated[
    str | None,
    typer.Option(
        "--subtree-other", metavar="PATH", rich_help_panel=_SECOND, help="Its --subtree, where it has another."
    ),
]
ComponentOther = Annotated[
    str | None,
    typer.Option(
        "--component-other", metavar="NAME", rich_help_panel=_SECOND, help="Its --component, where it has another."
    ),
]
FileOther = Annotated[
    str | None,
    typer.Option("--file-other", metavar="NAME", rich_help_panel=_SECOND, help="Its --file, where it has another."),
]
MountOther = Annotated[
    list[str] | None,
    typer.Option(
        "--mount-other",
        metavar="PREFIX=SRC",
        rich_help_panel=_SECOND,
        help="As --mount, which is for the first one. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write a page to look at.")]
Filter = Annotated[
    str | None, typer.Option("--filter", metavar="PATTERN", help="Only these keys: a key pattern, or a module's path.")
]

_RECIPE = "Recipe"
RecipeNames = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="R",
        rich_help_panel=_RECIPE,
        help="A TOML file, or the name of a built-in recipe. Repeat to chain: each recipe runs on the previous output.",
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="FAMILY/CODEBASE", rich_help_panel=_RECIPE, help="The layout of SRC, as recipes name it."
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to", metavar="FAMILY/CODEBASE", rich_help_panel=_RECIPE, help="The layout wanted; goes with --from."
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="RULE", rich_help_panel=_RECIPE, help="One rule: 'SOURCE -> TARGET'. Repeatable."),
]
Inverse = Annotated[bool, typer.Option("--inverse", rich_help_panel=_RECIPE, help="Run the recipe backwards.")]
Drop = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", rich_help_panel=_RECIPE, help="Source keys to leave out. Repeatable."),
]
Rest = Annotated[
    str | None,
    typer.Option(
        metavar="error|keep|drop|RULE",
        rich_help_panel=_RECIPE,
        help="What to do with keys that nothing names. Default: error; keep if no recipe and no rule is given.",
    ),
]
Tie = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=OF", rich_help_panel=_RECIPE, help="Target key NAME shares OF's tensor. Repeatable."),
]
Seed = Annotated[  # text, since typer imports pydantic to read a number
    str,
    typer.Option(
        metavar="N", rich_help_panel=_RECIPE, help="Seed of tensors that [init] draws and of ops that draw numbers."
    ),
]
Dim = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SIZE",
        rich_help_panel=_RECIPE,
        help="A size: 12, a list 2,2,6,2, one of a table rows.q=8, or 'config.heads * 2'. Repeatable.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=_RECIPE, help="The config.json that sizes are taken from."),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        rich_help_panel=_RECIPE,
        help="The layout to reach: a checkpoint, module:callable that builds a model, or specs in JSON.",
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", rich_help_panel=_RECIPE, help="Cast all floating-point tensors: bf16, f16, f32."
    ),
]

_OUTPUT = "Output"
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", rich_help_panel=_OUTPUT, help="Start a new file at this size: 5GB, 4GiB.")
]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", rich_help_panel=_OUTPUT, help="Refuse a plan that needs more at once.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", rich_help_panel=_OUTPUT, help="Print the plan, write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Replace an existing output.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel=_OUTPUT,
        help="Continue an interrupted run. Pass it on the first run as well.",
    ),
]
InPlace = Annotated[
    bool,
    typer.Option(
        "--in-place",
        rich_help_panel=_OUTPUT,
        help="DST is SRC: write a new header over the old one, which is saved. `restore-header` undoes it.",
    ),
]
NoSync = Annotated[
    bool,
    typer.Option(
        "--no-sync",
        rich_help_panel=_OUTPUT,
        help="Do not wait for the disk: after a power failure the output may be missing or damaged. A killed process "
        "leaves all of it or nothing, as ever.",
    ),
]
Check = Annotated[
    bool, typer.Option("--check", rich_help_panel=_OUTPUT, help="Read the output back and compare it with the plan.")
]
Provenance = Annotated[
    bool,
    typer.Option(
        "--provenance",
        rich_help_panel=_OUTPUT,
        help="Record in the output how it was made, so that --inverse needs no recipe.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_OUTPUT,
        help="For DST.gguf: a GGUF file whose key-value pairs (architecture, sizes, tokenizer) DST gets.",
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        metavar="drop|keep|TREE=drop|TREE=keep",
        rich_help_panel=_OUTPUT,
        help="Leave out, or copy as it is, what lies beside the model and belongs to tensors that change, such as an "
        "optimizer's state: an error unless given. Repeatable.",
    ),
]
Carry = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TREE",
        rich_help_panel=_OUTPUT,
        help="A tree beside the model that follows the rules: an optimizer's state, an EMA copy. Repeatable.",
    ),
]
CarryLost = Annotated[
    str | None,
    typer.Option(
        metavar="error|drop",
        rich_help_panel=_OUTPUT,
        help="For optimizer state that cannot follow its parameter: drop starts it anew.",
    ),
]
Companions = Annotated[
    bool, typer.Option("--companions", rich_help_panel=_OUTPUT, help="Copy config and tokenizer files along.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result there instead of the terminal.")
]
