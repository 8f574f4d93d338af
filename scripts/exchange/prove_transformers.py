"""Prove the recipes that are read from the conversion tables of transformers, type by type, and keep the results.

    python scripts/exchange/prove_transformers.py results.jsonl               # goes on where it was interrupted
    python scripts/exchange/prove_transformers.py results.jsonl --only mixtral vit
    python scripts/exchange/prove_transformers.py results.jsonl --table docs/transformers-types.md

A recipe is made from the type's own defaults. Then a tiny random model of the type is saved by `save_pretrained` and
loaded by `from_pretrained`. The recipe must make of the files, bit for bit, what the loaded model holds; its inverse
must make of the model, bit for bit, what the files hold; and `check_loaded` must find nothing wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from tiny_models import DEFAULTS, FIELDS, build

import ckptsurgery as cs
from ckptsurgery.exchange.transformers_models import from_transformers, transformers_types


class TooLong(Exception):
    """A type took longer than it may."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLong` after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny(name: str) -> Any:
    """A tiny random model of a type or of a class."""
    if name in transformers.CONFIG_MAPPING:
        return build(name)
    from ckptsurgery.exchange.transformers_models import _hidden

    kind = getattr(transformers, name, None) or _hidden(name)
    return build(kind.config_class.model_type, kind)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str | None:
    """What differs between two state dicts, NaN equal to itself; None where nothing does."""
    if a.keys() != b.keys():
        lost, new = sorted(b.keys() - a.keys()), sorted(a.keys() - b.keys())
        return f"keys: {len(lost)} lost {lost[:3]}, {len(new)} new {new[:3]}"
    for key, one in a.items():
        other = b[key]
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{key}: {one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)}"
        if one.contiguous().flatten().view(torch.uint8).ne(other.contiguous().flatten().view(torch.uint8)).any():
            return f"{key}: other bits"
    return None


def made(name: str) -> tuple[cs.Recipe, bool]:
    """The recipe of a type from its own defaults; where these build no model, from a small config, and True."""
    try:
        return from_transformers(name), False
    except cs.RecipeError as error:
        if error.diagnostics[0].code != "cannot-build" or name not in FIELDS:
            raise
        try:
            model = tiny(name)
        except Exception:  # the library's code may raise anything
            raise error from None
        return from_transformers(model), True


def proof(name: str) -> dict[str, Any]:
    """What was proved of one type."""
    found: dict[str, Any] = {"name": name, "recipe": None, "model": None, "forth": None, "back": None, "check": None}
    try:
        with limited(180):
            recipe, found["own_config"] = made(name)
        found["recipe"] = "ok"
        found["rules"] = len(recipe.rules) + sum(len(s.rules) for s in recipe.stages)
        found["toml"] = recipe.dumps()
    except (cs.CkptSurgeryError, TooLong) as error:
        found["recipe"] = str(error)[:600]
        return found
    try:
        with limited(300), tempfile.TemporaryDirectory() as folder:
            model = tiny(name)
            if name in DEFAULTS:  # these tie only what they load
                model.save_pretrained(f"{folder}/first")
                model = type(model).from_pretrained(f"{folder}/first", dtype=torch.float32)
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder, dtype=torch.float32)
            found["model"] = type(model).__name__
            try:
                _prove(recipe, again, folder, found)
            except cs.PlanError:  # the defaults have other kinds of layers, or rules for single layers
                if found["forth"] is not None:
                    raise
                recipe = from_transformers(again)
                found["rules"] = len(recipe.rules) + sum(len(s.rules) for s in recipe.stages)
                _prove(recipe, again, folder, found)
                found["own_config"] = True
    except Exception as error:  # whatever the library's code raises is written down, and the next type is tried
        step = next((k for k in ("model", "forth", "back", "check") if found[k] is None), "check")
        found[step] = f"{type(error).__name__}: {error}"[:600]
    return found


def _prove(recipe: cs.Recipe, model: Any, folder: str, found: dict[str, Any]) -> None:
    state = dict(model.state_dict())
    with cs.open(folder) as files:
        held = {k: files[k].load() for k in files}
    plan = cs.plan(folder, recipe, target=model, dtype="model", config=model.config.to_dict())
    found["forth"] = same(plan.state_dict(), state) or "ok"
    found["back"] = _back(recipe, model, state, held, set(plan.specs)) or "ok"
    cs.check_loaded(model, folder, dtype="model")
    found["check"] = "ok"


def _back(recipe: cs.Recipe, model: Any, state: Any, held: Any, made: set[str]) -> str | None:
    """What the way back does not make as the files have it; a tied tensor is in the files once, or under each name."""
    groups = [group.names for group in cs.ties(model)]
    first, last = ({n for names in groups for n in one(names)} for one in (lambda n: n[1:], lambda n: n[:-1]))
    problem: str | None = None
    for left_out in (first - made, first, last, _not_stored(recipe, model, state, held, groups)):
        untied = {k: v for k, v in state.items() if k not in left_out}
        back = cs.plan(untied, recipe.inverse(), config=model.config.to_dict()).state_dict()
        one = same(back, held)
        if one is None:
            return None
        problem = problem or one
    return problem


def _not_stored(recipe: cs.Recipe, model: Any, state: Any, held: Any, groups: Any) -> set[str]:
    """Names of tied tensors that the files do not have, each where they have another name of it."""
    found: set[str] = set()
    for names in groups:
        alone = {}
        for name in names:
            rest = {k: v for k, v in state.items() if k == name}
            alone[name] = set(cs.plan(rest, recipe.inverse(), config=model.config.to_dict()).specs)
        stored = [name for name in names if alone[name] <= held.keys()]
        found |= set(names) - set(stored) if stored else set()
    return found


def table(results: Path, shipped: Collection[str] = ()) -> str:
    """The results as a page for the docs.

    Args:
        shipped: names of the recipes that ship.
    """
    last = {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}  # a later run counts
    rows = [last[name] for name in sorted(last)]
    proved = [r for r in rows if r["forth"] == r["back"] == "ok"]
    lines = [
        "# Recipes from the conversion table of transformers",
        "",
        f"Made by `scripts/exchange/prove_transformers.py` with transformers {transformers.__version__}. Of the",
        f"{len(rows)} names in its table {sum(r['recipe'] == 'ok' for r in rows)} become recipes; {len(proved)} of",
        "these were proved against `from_pretrained` and `save_pretrained` on a tiny random model: every bit is equal,",
        "from the files to the model and back. The last column names those that `ckptsurgery recipes` lists; the",
        "others are read by `cs.recipes.from_transformers(name)`.",
        "",
        "| name | rules | model | files to model | model to files | `check_loaded` | ships as |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["recipe"] != "ok":
            lines.append(f"| {r['name']} | refused: {_cell(r['recipe'])} | | | | | |")
            continue
        given = ", from a config of its own" if r.get("own_config") else ""
        name = f"{r['name'].replace('-', '_')}/hf_to_hf5"
        cells = [_cell(r[k] or "not run") for k in ("model", "forth", "back", "check")]
        lines.append(
            f"| {r['name']} | {r['rules']}{given} | {' | '.join(cells)} | {f'`{name}`' if name in shipped else ''} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """The first line of a text, as a cell of a table."""
    return re.sub(r"([|<>{}*_`\[\]])", r"\\\1", text.splitlines()[0][:120])


def main() -> None:
    """Prove types, or make the table of what was proved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--most", type=int, default=10**6, help="how many types this run may try")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.table is not None:
        options.table.write_text(table(options.results))
        return
    text = options.results.read_text() if options.results.exists() else ""
    done = {json.loads(line)["name"] for line in text.splitlines()}
    names = options.only or [name for name in transformers_types() if name not in done]
    for name in names[: options.most]:
        start = time.monotonic()
        found = proof(name)
        found["seconds"] = round(time.monotonic() - start, 1)
        with options.results.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(name, *(f"{k}={str(found[k])[:90]!r}" for k in ("recipe", "model", "forth", "back", "check")), flush=True)


if __name__ == "__main__":
    main()
