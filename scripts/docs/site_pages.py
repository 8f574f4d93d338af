"""Hooks of the documentation site: the navigation, and the pages that are made from the source.

The navigation lists the sections in the order of `SECTIONS`. Pages named there come first, in that order; any other
page of the section's folder follows by its title, so that a new page needs no entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Start": ("", ("index.md",)),
    "Tutorials": (
        "tutorials",
        (
            "first-load.md",
            "first-recipe.md",
            "training-checkpoint.md",
            "sharded.md",
            "parameters.md",
            "parameters.zh.md",
        ),
    ),
    "Cookbook": ("cookbook", ("index.md",)),
    "Language": ("language", ("index.md", "recipes.md", "ops.md", "shelf.md")),
    "Errors": ("errors", ("index.md",)),
    "Reference": ("reference", ("api.md", "cli.md", "formats.md", "performance.md", "migration.md")),
    "Contribute": ("contribute", ("architecture.md", "testing.md", "formats.md")),
}
_HEADING = re.compile(r"^## (?P<code>[a-z0-9-]+)$\n+(?P<first>[^\n]+)", re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the source."""
    for path, text in made_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_config(config: Any) -> Any:
    """Set the navigation from the folders."""
    docs = Path(config.docs_dir)
    made = made_pages()
    config.nav = [{title: list(_entries(docs, made, folder, first))} for title, (folder, first) in SECTIONS.items()]
    return config


def _entries(docs: Path, made: dict[str, str], folder: str, first: tuple[str, ...]) -> Iterator[Any]:
    prefix = f"{folder}/" if folder else ""
    there = {p.relative_to(docs).as_posix() for p in (docs / folder).glob("*.md")}
    there |= {path for path in made if path.rpartition("/")[0] == folder}
    named = [prefix + name for name in first if prefix + name in there]
    texts = {path: made.get(path) or (docs / path).read_text(encoding="utf-8") for path in there}
    titles = {path: text.split("\n", 1)[0].lstrip("# ") for path, text in texts.items()}
    rest = sorted(there - set(named), key=lambda path: titles[path].lower())
    yield from ({titles[path]: path} if not path.endswith("index.md") else path for path in [*named, *rest])


def made_pages() -> dict[str, str]:
    """Return the pages that are made from the source, by path."""
    return {
        "cookbook/index.md": cookbook_page(),
        "errors/index.md": errors_page(),
        "language/ops.md": ops_page(),
        "language/shelf.md": shelf_page(),
        "reference/cli.md": cli_page(),
        **{f"tutorials/parameters{way}.md": guide_page(way) for way in ("", ".zh")},
    }


def cookbook_page() -> str:
    """Return the list of the cookbook's pages, by the group in their front line."""
    groups: dict[str, list[str]] = {}
    for path in sorted((ROOT / "docs" / "cookbook").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.split("\n", 1)[0].lstrip("# ")
        group = re.search(r"^<!-- group: (.+) -->$", text, re.M)
        groups.setdefault(group[1] if group else "More", []).append(f"- [{title}]({path.name})")
    parts = [
        "# Cookbook",
        "One task a page. Each page runs as it stands, from top to bottom; two of them import the safetensors package.",
    ]
    for group, lines in sorted(groups.items()):
        parts += [f"## {group}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def errors_page() -> str:
    """Return the index of all diagnostic codes."""
    rows = []
    for path in sorted((ROOT / "docs" / "errors").glob("*.md")):
        for found in _HEADING.finditer(path.read_text(encoding="utf-8")):
            rows.append((found["code"], f"| [`{found['code']}`]({path.name}#{found['code']}) | {found['first']} |"))
    head = """# Error codes

Each problem that the library reports has a code, in brackets: `error[missing-keys]: …`. This is the list of
all {count} codes. `ckptsurgery explain CODE` prints the same text in the shell, and `error.diagnostics` contains the
problems as data.

| code | meaning |
|---|---|
"""
    return head.replace("{count}", str(len(rows))) + "\n".join(row for _, row in sorted(rows)) + "\n"


def ops_page() -> str:
    """Return the reference of the ops, from their docstrings."""
    import ckptsurgery.ops  # noqa: F401  # fills the registry
    from ckptsurgery.ops.reference import reference

    parts = [
        "# Ops",
        "An op changes values. It follows a `|` in a rule: `SOURCE | op -> TARGET | op`. Left of the arrow it runs"
        " before the rearrangement, right of the arrow after it.",
        "An op is applied to one tensor, unless it joins several sources. [Write your own](../cookbook/custom-op.md)"
        " where none fits.",
    ]
    for op in reference():
        facts = f"Takes: {op.takes}. Runs: {op.runs}."
        parts += [f"## {op.name}", f"```text\n{op.signature}\n```", op.summary, _markdown(op.text), facts]
        parts += [f"```text\n{op.example}\n```"] if op.example else []
    return "\n\n".join(parts) + "\n"


def guide_page(way: str = "") -> str:
    """Return the parameter guide, whose source lies beside the recipes; `way` is the suffix of a translation."""
    text = (ROOT / "recipes" / f"GUIDE{way}.md").read_text(encoding="utf-8")
    return text.replace("](README.md)", "](../language/shelf.md)").replace("](GUIDE", "](parameters")


def shelf_page() -> str:
    """Return the recipes that ship, with their rules."""
    import ckptsurgery as cs

    parts = [
        "# Recipes that ship",
        "`ckptsurgery recipes` lists them, `ckptsurgery recipes match CHECKPOINT` names those that fit a checkpoint,"
        " and `--recipe NAME` runs one. Each runs backwards with `--inverse`, unless it changes values.",
        "`hf` is the layout of checkpoints on the hub, `hf5` the layout of transformers 5 in memory where the two"
        " differ, `tv` torchvision.",
    ]
    for name in cs.list_recipes():
        recipe = cs.load_recipe(name)
        text = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        parts += [f"## {name}", recipe.summary, f'??? note "Rules"\n\n    ```toml\n{_indented(text)}\n    ```']
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """Return the reference of the command line, from the commands themselves."""
    from typer.main import get_command

    from ckptsurgery.cli.program import app

    parts = [
        "# Command line",
        "Results go to standard output, progress and problems to standard error. The exit code is 0 for done, 1 for a"
        " problem with the checkpoint or the recipe, 2 for wrong usage. Every command but `restore-header` takes"
        " `--json`.",
    ]
    program: Any = get_command(app)
    for name, command in program.commands.items():
        nested = getattr(command, "commands", {})
        parts += _command(name, command)
        for inner, each in nested.items():
            parts += _command(f"{name} {inner}", each)
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    import click

    context = click.Context(command, info_name=f"ckptsurgery {name}", max_content_width=100, terminal_width=100)
    yield f"## {name}"
    yield f"```text\n{command.get_help(context).rstrip()}\n```"


def _markdown(doc: str) -> str:
    """A docstring as Markdown: doctests fenced, a section's lines as a list."""
    import inspect

    lines = inspect.cleandoc(doc).splitlines()
    out: list[str] = []
    fenced = False
    for line in lines:
        if line.startswith(">>>") and not fenced:
            out += ["", "```python"]
            fenced = True
        elif fenced and not line.strip():
            out += ["```"]
            fenced = False
        if re.fullmatch(r"(Args|Raises|Returns|Yields):", line):
            out += ["", f"**{line}**", ""]
        elif not fenced and re.match(r"    \S", line):
            out.append("- " + line.strip().replace("<", "&lt;"))
        else:
            out.append(line)
    return "\n".join([*out, "```"] if fenced else out)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.rstrip().splitlines())
