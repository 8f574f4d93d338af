"""Plan recipes made up at random of the language's words, and compare what they make with torch.

    python scripts/fuzz/words.py --seeds 3000             # a few minutes
    python scripts/fuzz/words.py --seeds 1 --start 1234   # one of them again

Each recipe draws copies (`+`), joins (`&`), rearrangements, index lists, `[init]`, `[config]` and arguments of ops by
name: numbers, expressions, tables by index, lists in files. Its text must give the recipe again, memory and file the
same tensors, the ways back the source, and a recipe with a part left out an error of the library or a result.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckptsurgery as cs
from ckptsurgery.language.toml import loads

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """A source, a recipe, and what it must make.

    Args:
        exact: whether recipe.inverse() must bring back the source.
    """

    draw: random.Random
    state: Tensors = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    init: dict[str, str] = field(default_factory=dict)
    dims: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)
    wanted: Tensors = field(default_factory=dict)
    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    wanted_config: dict[str, Any] = field(default_factory=dict)
    rest: str = "error"
    exact: bool = True

    def named(self, value: Any) -> str:
        """An argument as it is, or its name in dims, in data or as an expression over the config."""
        name = f"n{len(self.dims) + len(self.data)}"
        way = self.draw.choice(["plain", "dims", "data", "config"])
        if way == "data" and isinstance(value, list):
            self.data[name] = value
        elif way == "config" and isinstance(value, int):
            self.config[name] = value
            self.dims[name] = f"config.{name} * 2 - config.{name}"
        elif way == "plain":
            return str(value)
        else:
            self.dims[name] = value
        return name

    def tensor(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        return torch.randn(shape, generator=generator).to(self.draw.choice([torch.float32, torch.bfloat16]))


def stack(case: Case, front: str) -> None:
    """Layers that are renamed, transposed, or picked from, and copied once or more."""
    draw = case.draw
    count, x, y = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4)
    layers = [case.tensor(x, y) for _ in range(count)]
    case.state |= {f"{front}.{i}.w": w for i, w in enumerate(layers)}
    way = draw.choice(["plain", "turned", "rows"])
    target = f"{front}.{{i}}.w" if draw.random() < 0.5 else f"{front}new.{{i}}.v"
    axes = {"plain": ("", ""), "turned": (" [x y]", " [y x]"), "rows": (" [x y]", " [x y]")}[way]
    ops = ""
    tables = {i: draw.sample(range(x), x) for i in range(count)}
    if way == "rows":
        same = draw.random() < 0.5
        order = tables[0] if same else None
        if same:
            ops = f" | take(x, {case.named(order)})"
            tables = dict.fromkeys(range(count), tables[0])
        else:
            name = f"t{front}"
            where = case.data if draw.random() < 0.5 else case.dims
            where[name] = {str(i): ids for i, ids in tables.items()}
            ops = f" | take(x, {name}:i)"

    def made(i: int) -> Tensor:
        if way == "turned":
            return layers[i].T.contiguous()
        return layers[i][tables[i]] if way == "rows" else layers[i]

    times = draw.choice([0, 0, 1, 2, 3])
    rule = f"{front}.{{i}}.w{axes[0]} -> "
    lines = [rule + target + axes[1] + ops]
    lines += [f"+ {rule}{target.replace('{i}', f'{{i+{count * n}}}')}{axes[1]}{ops}" for n in range(1, times + 1)]
    draw.shuffle(lines)
    case.rules += lines
    for n in range(times + 1):
        case.wanted |= {target.replace("{i}", str(i + n * count)): made(i) for i in range(count)}
    if way == "rows" and not same:
        case.exact = case.exact and times == 0  # the table by index is for the originals' numbers


def join(case: Case, front: str) -> None:
    """Weights of which some have a partner."""
    draw = case.draw
    count, x = draw.randint(1, 4), draw.randint(1, 4)
    scale = draw.choice([2, 0.5, -1])
    optional = "? " if draw.random() < 0.5 else ""
    pairs = [draw.random() < 0.6 for _ in range(count)]
    if not any(pairs):
        optional = "? "
    for i, has in enumerate(pairs):
        w = case.state[f"{front}.{i}.w"] = torch.randn(x)
        case.wanted[f"{front}.{i}.w"] = w
        if has:
            s = case.state[f"{front}.{i}.s"] = torch.randn(x)
            case.wanted[f"{front}.{i}.w"] = w + scale * s
    left, right = draw.choice([("{i}", "{i}"), ("{r...}", "{r...}")])
    case.rules.append(
        f"{optional}{front}.{left}.w & {front}.{right}.s -> {front}.{left}.w | apply({case.named(scale)})"
    )
    if not all(pairs) and case.rest == "error":
        case.rest = "keep"
    case.exact = False  # which keys had partners is known to the plan alone


def experts(case: Case, front: str) -> None:
    """Experts of two kinds that are stacked, fused or interleaved."""
    draw = case.draw
    e, f, d = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3)
    parts = [[torch.randn(f, d) for _ in range(e)] for _ in range(2)]
    case.state |= {f"{front}.{n}.{m}": parts[k][n] for k, m in enumerate(("a", "b")) for n in range(e)}
    axes = draw.choice(["[e (p f) d]", "[e (f p) d]", "[p e f d]", "[(p e f) d]"])
    case.rules.append(f"{front}.{{e{front}}}.{{p:a,b}} [f d] -> {front}.all {axes.replace('e ', f'e{front} ')}")
    whole = torch.stack([torch.stack(side) for side in parts])
    case.wanted[f"{front}.all"] = {
        "[e (p f) d]": whole.permute(1, 0, 2, 3).reshape(e, 2 * f, d),
        "[e (f p) d]": whole.permute(1, 2, 0, 3).reshape(e, 2 * f, d),
        "[p e f d]": whole,
        "[(p e f) d]": whole.reshape(-1, d),
    }[axes].contiguous()
    case.dims[f"e{front}"] = e


def fresh(case: Case, front: str) -> None:
    """Tensors that are initialised."""
    draw = case.draw
    x, y = draw.randint(1, 4), draw.randint(1, 4)
    dtype = draw.choice(["F32", "BF16", ""])
    case.dims |= {f"x{front}": x, f"y{front}": y}
    key = f"{front}.new [x{front} y{front}] {dtype or 'F32'}"
    value = draw.choice(["zeros", "ones", "constant(0.5)", "normal(std=0.02)", "xavier_uniform", "orthogonal"])
    case.init[key] = value
    case.drawn[f"{front}.new"] = (x, y)
    fixed = {"zeros": 0.0, "ones": 1.0, "constant(0.5)": 0.5}
    if value in fixed:
        case.wanted[f"{front}.new"] = torch.full(
            (x, y), fixed[value], dtype=torch.bfloat16 if dtype == "BF16" else torch.float32
        )


def configured(case: Case) -> None:
    """Edits of the config."""
    draw = case.draw
    case.config |= {"old": 3, "gone": {"a": 1}, "text": "x", "heads": 4}
    plain = dict(case.config)
    if draw.random() < 0.5:
        case.edits["drop"] = ["gone"]
        del plain["gone"]
    if draw.random() < 0.5:
        case.edits["rename"] = {"old": "fresh"}
        plain["fresh"] = plain.pop("old")
    if draw.random() < 0.7:
        case.edits["set"] = {"layers": "config.heads * 2 + 1", "part.kind": "'text'", "flag": True}
        plain |= {"layers": 9, "part": {"kind": "text"}, "flag": True}
    case.wanted_config = plain


def case_of(seed: int) -> Case:
    """The case of a seed."""
    case = Case(random.Random(seed))
    kinds = [stack, join, experts, fresh]
    for n in range(case.draw.randint(1, 4)):
        case.draw.choice(kinds)(case, f"k{n}")
    if not case.state:
        stack(case, "k9")
    if case.draw.random() < 0.4:
        configured(case)
    if case.draw.random() < 0.3:
        case.state["spare.one"] = torch.randn(2)
        rests = ["keep", "drop", "spare.{r...} -> kept.{r...}"] if case.rest == "error" else ["keep"]
        case.rest = case.draw.choice(rests)
        if case.rest != "drop":
            case.wanted["spare.one" if case.rest == "keep" else "kept.one"] = case.state["spare.one"]
        case.exact = case.exact and case.rest != "drop"
    return case


def recipe_of(case: Case) -> cs.Recipe:
    """The recipe of a case."""
    return cs.Recipe(
        case.rules, init=case.init, dims=case.dims, data=case.data, rest=case.rest, config=case.edits or None
    )


def check(case: Case, folder: Path) -> None:
    """Hold a case to its laws."""
    recipe = recipe_of(case)
    if not case.data:
        assert loads(recipe.dumps()) == recipe, "its text gives another recipe"
    plan = cs.plan(case.state, recipe, config=case.config, seed=1)
    made = plan.state_dict()
    equal(made, case.wanted, case.drawn)
    again = cs.plan(dict(reversed(case.state.items())), recipe, config=case.config, seed=1).state_dict()
    equal(again, made, {})
    source = folder / "in"
    cs.save(case.state, f"{source}/")
    (source / "config.json").write_text(json.dumps(case.config))
    cs.plan(source, recipe, seed=1).save(folder / "out", companions=True, check=True, max_memory="1MB")
    equal(cs.open(folder / "out").state_dict(), made, {})
    if case.edits:
        assert json.loads((folder / "out" / "config.json").read_text()) == case.wanted_config, "another config"
    try:
        back = plan.inverse(made)
    except cs.PlanError:
        assert not case.exact, "no way back"
    else:
        equal(back.state_dict(), case.state, {})
    if case.exact:
        equal(cs.plan(made, recipe.inverse(), config=case.config).state_dict(), case.state, {})


def equal(made: Tensors, wanted: Tensors, drawn: dict[str, tuple[int, ...]]) -> None:
    """Compare tensors bit for bit; of drawn ones the shapes."""
    assert made.keys() == wanted.keys() | drawn.keys(), f"keys {sorted(made.keys() ^ (wanted.keys() | drawn.keys()))}"
    for key, tensor in wanted.items():
        alike = made[key].dtype == tensor.dtype and torch.equal(made[key], tensor)
        assert alike, f"{key}: {made[key]} instead of {tensor}"
    assert all(tuple(made[key].shape) == shape for key, shape in drawn.items())


def broken(case: Case) -> None:
    """Leave something out, or repeat it: an error of the library, or a result."""
    draw = case.draw
    spoilt = draw.choice([case.rules, case.init, case.dims, case.data, case.state, case.config])
    if not spoilt:
        return
    if isinstance(spoilt, list):
        line = draw.randrange(len(spoilt))
        text = spoilt[line]
        at = draw.randrange(len(text))
        cut = text[:at] + text[at + 1 :]
        spoilt[line] = draw.choice([cut, text.replace("+", "", 1), text.replace("{i}", "{j}", 1)])
    elif draw.random() < 0.5:
        del spoilt[draw.choice(list(spoilt))]
    elif spoilt is not case.state:
        spoilt[draw.choice(list(spoilt))] = draw.choice([0, -1, "x", [], 1.5, None])
    try:
        recipe = recipe_of(case)
        cs.plan(case.state, recipe, config=case.config).state_dict()
        cs.plan(case.state, recipe.inverse(), config=case.config)
    except cs.CkptSurgeryError as error:
        str(error)


def main() -> int:
    """Run the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for seed in range(options.start, options.start + options.seeds):
        case, folder = case_of(seed), Path(tempfile.mkdtemp())
        try:
            check(case, folder)
            broken(case)
        except Exception:
            failed += 1
            print(f"seed {seed}: {case.rules}, init {case.init}, dims {case.dims}, data {case.data}, rest {case.rest}")
            print(traceback.format_exc(limit=-3))
        finally:
            shutil.rmtree(folder)
    print(f"{options.seeds} recipes, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
