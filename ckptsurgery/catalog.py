"""Recipes by name: the files that ship with the package, and any path."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from .errors import Diagnostic, RecipeError, Remedy
from .language.recipe import Recipe
from .language.rules import with_arrow
from .language.toml import loads

__all__ = ["RecipeLike", "RequiredRules", "as_recipe", "file_of", "list_recipes", "load_recipe", "route"]

RecipeLike = Recipe | str | os.PathLike[str] | Sequence[str]
_SUFFIX = ".toml"
_RULES_ALONE = {"schema", "summary", "rest", "rules", "dims", "then", "drop", "config"}


def shelf() -> Path:
    """Return the folder of the built-in recipes: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the built-in recipes, `family/name`, sorted.

    >>> all("/" in name for name in list_recipes())
    True
    """
    root = shelf()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.glob(f"*/*{_SUFFIX}"))


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe: a path that ends in `.toml`, or the name of one that ships.

    >>> load_recipe("no/such")
    Traceback (most recent call last):
        ...
    ckptsurgery.errors.RecipeError: error[unknown-recipe]: no recipe is called 'no/such'
    ...

    Raises:
        RecipeError: no such file or name, or a text that is no recipe; all its problems at once.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if not text.endswith(_SUFFIX):
        shipped = shelf() / f"{text}{_SUFFIX}"
        if text not in list_recipes():
            raise RecipeError(_unknown(text))
        return loads(_read(shipped), f"recipes/{text}{_SUFFIX}")
    return loads(_read(path), str(path))


def _unknown(text: str) -> Diagnostic:
    """The problem of a text that names no recipe; it may be a rule with another arrow, or with none."""
    rule = with_arrow(text)
    near = [] if "{" in text else difflib.get_close_matches(text, list_recipes(), 3, 0.4)
    near = near if rule is None else [rule]
    meant = (Remedy("recipe", {text: near}, kind="instead"),) if near else ()
    advice = None if near else "`ckptsurgery recipes` lists them; a file ends in .toml, a rule is SOURCE -> TARGET"
    return Diagnostic("unknown-recipe", f"no recipe is called {text!r}", remedies=meant, advice=advice)


@dataclass(frozen=True)
class RequiredRules:
    """The rules of a recipe that ships, as far as they show which checkpoints it is for.

    Args:
        texts: the rules of its first stage that must match.
        fits_all: whether the recipe is nothing but rules that may match nothing, so that it plans for any checkpoint.
            It is for the files of one model type, its family, and only a config shows the type.
        every: all rules of its first stage, those that may match nothing too.
    """

    texts: tuple[str, ...]
    fits_all: bool
    every: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str) -> RequiredRules:
        """Read them without parsing a rule.

        >>> {RequiredRules.of(name).fits_all for name in list_recipes()} == {True, False}
        True
        """
        data = tomllib.loads(_read(shelf() / f"{name}{_SUFFIX}"))
        rules = data.get("rules", ())
        texts = tuple(text for text in rules if not text.lstrip().startswith("?"))
        general = name.startswith("surgery/")  # an operation on any model with such layers, never the one that fits
        return cls(texts, general or (bool(rules) and not texts and data.keys() <= _RULES_ALONE), tuple(rules))


def file_of(recipe: Recipe) -> str | None:
    """The file that a recipe was read from, where it is the reader's own to edit: none for a recipe that ships."""
    place = recipe.place
    shipped = place is not None and place.startswith("recipes/") and place[len("recipes/") : -5] in list_recipes()
    return None if shipped else place


def route(start: str, end: str) -> Recipe:
    """Chain built-in recipes from one codebase of a family to another.

    >>> route("nobody/here", "nobody/there")
    Traceback (most recent call last):
        ...
    ckptsurgery.errors.RecipeError: error[no-route]: no recipes lead from 'nobody/here' to 'nobody/there'
    ...

    Args:
        start, end: `family/codebase`, as the names of recipes spell them: `family/<from>_to_<to>`.

    Raises:
        RecipeError: another family, a codebase that no recipe knows, or no way between the two.
    """
    family, _, here = start.partition("/")
    other, _, there = end.partition("/")
    edges: dict[str, list[tuple[str, str, bool]]] = {}
    for name in list_recipes():
        shelf_family, _, stem = name.partition("/")
        a, to, b = stem.partition("_to_")
        if shelf_family == family and to:
            edges.setdefault(a, []).append((b, name, False))
            edges.setdefault(b, []).append((a, name, True))
    for codebase in (here, there):
        if family != other or codebase not in edges:
            asked, known = f"{family}/{codebase}", [f"{family}/{c}" for c in sorted(edges)]
            near = difflib.get_close_matches(asked, known, 1) if family == other else []
            meant = (Remedy("route", {asked: near}, kind="instead"),) if near else ()
            advice = f"known: {', '.join(known) or '`ckptsurgery recipes` lists them'}"
            text = f"no recipes lead from {start!r} to {end!r}"
            raise RecipeError(Diagnostic("no-route", text, remedies=meant, advice=advice))
    ways: dict[str, list[tuple[str, bool]]] = {here: []}
    queue = [here]
    for codebase in queue:
        for following, name, backwards in edges[codebase]:
            if following not in ways:
                ways[following] = [*ways[codebase], (name, backwards)]
                queue.append(following)
    if there not in ways or not ways[there]:
        raise RecipeError(Diagnostic("no-route", f"no recipes lead from {start!r} to {end!r}"))
    parts = [load_recipe(name).inverse() if backwards else load_recipe(name) for name, backwards in ways[there]]
    return reduce(lambda done, part: done.then(part), parts)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob(f"*{_SUFFIX}"))
        near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, beside, 1, 0.8)]
        help = f"did you mean {near[0]!r}?" if near else "check the path"
        raise RecipeError(Diagnostic("missing-recipe", f"no such file: {str(path)!r}", help=help)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Diagnostic("unreadable-recipe", f"{str(path)!r} cannot be read: {error}")) from None


def as_recipe(what: RecipeLike) -> Recipe:
    """A recipe from itself, from its path or name, from one rule, or from several.

    >>> as_recipe("a -> b") == as_recipe(["a -> b"]) == Recipe(["a -> b"])
    True
    """
    if isinstance(what, Recipe):
        return what
    if isinstance(what, str) and "->" in what:
        return Recipe([what])
    if isinstance(what, str | os.PathLike):
        return load_recipe(what)
    if isinstance(what, Sequence):
        return Recipe(list(what))
    raise _not_a_recipe(what)


def _not_a_recipe(what: object) -> RecipeError:
    help = "a Recipe, a name, a path or rules"
    if isinstance(what, Mapping):
        help = 'a rule for each entry: [f"{old} -> {new}" for old, new in table.items()]'
    return RecipeError(Diagnostic("bad-recipe", f"{type(what).__name__!r} object is not a recipe", help=help))
