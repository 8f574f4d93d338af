"""From options to one recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import ckptsurgery as cs

if TYPE_CHECKING:
    from ..language.recipe import Recipe

__all__ = ["beside_from", "config_from", "dims_from", "pairs_from", "recipe_from", "seed_from"]


def recipe_from(
    names: Sequence[str] | None,
    rules: Sequence[str] | None,
    *,
    route: tuple[str | None, str | None] = (None, None),
    inverse: bool = False,
    drop: Sequence[str] | None = None,
    rest: str | None = None,
    tie: Sequence[str] | None = None,
) -> Recipe:
    """The recipe that the options of `plan` and `convert` spell.

    `route` leads from one codebase to another; each of `names` goes on from there; `rules` join the first.
    `inverse` turns all of these around. The other options speak of this run: drops of its source's keys, ties of its
    target's, `rest` of every stage.
    """
    start, end = route
    if (start is None) != (end is None):
        raise typer.BadParameter("--from and --to go together", param_hint="--from")
    parts = [cs.route(start, end)] if start and end else []
    parts += [cs.load_recipe(name) for name in names or ()]
    given = cs.Recipe(rules=list(rules or ()))
    parts = [parts[0] + given, *parts[1:]] if parts and rules else parts or [given]
    if inverse:
        parts = [part.inverse() for part in reversed(parts)]
    whole: Recipe = reduce(lambda done, part: done.then(part), parts)
    stages = [whole.replace(stages=()), *whole.stages]
    stages[0] = stages[0].replace(drop=(*stages[0].drop, *(drop or ())))
    stages[-1] = stages[-1].replace(tie={**stages[-1].tie, **pairs_from(tie, "--tie", "lm_head.weight=embed.weight")})
    if rest is None and not (start or names or rules):
        rest = "keep"
    if rest is not None:
        stages = [stage.replace(rest=rest) for stage in stages]
    return stages[0].replace(stages=tuple(stages[1:]))


def pairs_from(texts: Sequence[str] | None, option: str, example: str) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping; what is no pair is wrong usage."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals or not value or name in pairs:
            raise typer.BadParameter(f"{text!r} should read like {example!r}, each name once", param_hint=option)
        pairs[name] = value
    return pairs


def beside_from(texts: Sequence[str] | None) -> str | dict[str, str]:
    """`--beside` options: a word for all trees, or one for each by its path.

    >>> beside_from(["drop"]), beside_from(["ema=keep", "drop"]), beside_from(None)
    ('drop', {'ema': 'keep', '': 'drop'}, 'error')
    """
    words = [text for text in texts or () if "=" not in text]
    named = pairs_from([text for text in texts or () if "=" in text], "--beside", "optimizer=drop")
    if len(words) > 1:
        raise typer.BadParameter(f"{words[0]!r} and {words[1]!r} both speak of all trees", param_hint="--beside")
    if not named:
        return words[0] if words else "error"
    return named | ({"": words[0]} if words else {})


def dims_from(texts: Sequence[str] | None) -> dict[str, Any]:
    """`--dim` options: numbers, lists, tables by choice; everything else is an expression over the config.

    >>> dims_from(["heads=12", "depths=2,2,6,2", "rows.q=8", "rows.k=4", "g=config.hidden // 2"])
    {'heads': 12, 'depths': [2, 2, 6, 2], 'rows': {'q': 8, 'k': 4}, 'g': 'config.hidden // 2'}
    """
    found: dict[str, Any] = {}
    for path, text in pairs_from(texts, "--dim", "heads=12").items():
        name, dot, choice = path.partition(".")
        if not dot:
            found[name] = _size(text)
            continue
        table = found.setdefault(name, {})
        if not isinstance(table, dict):
            raise typer.BadParameter(f"{name!r} is a size and a table: {path}={text}", param_hint="--dim")
        table[choice] = _size(text)
    return found


def _size(text: str) -> Any:
    try:
        return json.loads(f"[{text}]" if "," in text and text[0] not in "[{" else text)
    except ValueError:
        return text


def seed_from(text: str) -> int:
    """The number of `--seed`.

    >>> seed_from("7")
    7
    """
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an integer", param_hint="--seed") from None


def config_from(path: str | None) -> dict[str, Any] | None:
    """The config in a JSON file; a file that holds none is wrong usage."""
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--config") from None
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{path} holds no JSON object", param_hint="--config")
    return config
