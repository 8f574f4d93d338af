"""Prints how well recipes are read off values, on random layouts of random networks of which the truth is known.

    python scripts/score_values.py [--from N] [--count N] [--wrong]
    python scripts/score_values.py --every [--wrong]    # every layout of attention and of feed-forwards to every other

Each seed draws a network, two layouts of it and what was tuned. A recipe is run on tensors whose elements are numbered:
a tensor is right if each element comes from where the layouts say. Tuned tensors must keep that rule and be listed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, product
from math import prod
from typing import Any

import torch
from pairs.layouts import SCHEMES, Layout, Network, drawn_layout, drawn_network
from torch import Tensor

import ckptsurgery as cs

Tensors = dict[str, Tensor]
_TUNED = 0.1


@dataclass
class Case:
    """A source and a target with the truth, in numbered elements."""

    seed: int
    net: Network
    layouts: tuple[Layout, Layout]
    source: Tensors
    target: Tensors
    numbered: tuple[Tensors, Tensors]
    tuned: set[str]
    impossible: set[str]

    @property
    def label(self) -> str:
        """What was drawn."""
        n, (a, b) = self.net, self.layouts
        sides = " -> ".join(map(self._said, (a, b)))
        kind = str(b.dtype).removeprefix("torch.")
        return (
            f"{sides} L{n.layers} E{n.experts} H{n.heads}/{n.groups}"
            f"{' bias' * n.biases}{' tied' * n.tied}{' const' * n.constant} {kind}{' tuned' * bool(self.tuned)}"
        )

    def _said(self, layout: Layout) -> str:
        words = [layout.attention, layout.order, layout.feed]
        flags = {
            "rotary": layout.rotary,
            "turned": layout.turned,
            "scan": layout.scanned,
            "stacked": layout.stacked and bool(self.net.experts),
            "nameless": layout.nameless,
        }
        return ",".join([*words, *(k for k, on in flags.items() if on)])


def drawn(seed: int, tune: bool = True) -> Case:
    """The case of a seed; without what was tuned if it is not asked for."""
    draw = random.Random(seed)
    net = drawn_network(draw)
    layouts = drawn_layout(draw, net, 0), drawn_layout(draw, net, 1)
    tuning = draw.choice([False, True])
    generator = torch.Generator().manual_seed(seed)
    at = 1

    def number(name: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal at
        at += prod(shape)
        return torch.arange(at - prod(shape), at).reshape(shape)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(shape, generator=generator) * 0.1
        if net.constant and len(shape) == 1:
            return torch.ones(shape) if name[-4:-2] in ("n1", "n2", "nf") and name[-1] == "w" else torch.zeros(shape)
        return tensor

    numbers, values = net.tensors(number), net.tensors(fill)
    picked = [k for k in values if draw.random() < _TUNED] if tuning and tune else []
    changed = values | {k: values[k] + 0.01 * torch.randn(values[k].shape, generator=generator) for k in picked}
    source, target = layouts[0].of(net, values), layouts[1].of(net, changed)
    before = layouts[1].of(net, values)
    tuned = {k for k in target if not torch.equal(target[k], before[k])}
    numbered = layouts[0].of(net, numbers), layouts[1].of(net, numbers)
    shuffled = layouts[0].order != layouts[1].order and "shuffled" in (layouts[0].order, layouts[1].order)
    lost = {k for i in range(net.layers) for k in (f"{i}.q.w", f"{i}.q.b", f"{i}.o.w")} if shuffled else set()
    gone = torch.cat([numbers[k].reshape(-1) for k in lost if k in numbers]) if lost else torch.empty(0)
    impossible = {k for k, t in numbered[1].items() if lost and torch.isin(t, gone).any()}
    return Case(seed, net, layouts, source, target, numbered, tuned, impossible)


_ATTENTION = ("separate", "fused", "heads", "grouped", "kernels", "ragged kernels")
_FEED = ("separate", "gate up", "up gate", "interleaved", "leading")


def every_pair() -> Iterator[Case]:
    """Each layout of attention with each other, in plain and rotary rows, and each of feed-forwards, stacked or not."""
    number = count()
    for (heads, groups), a, b, turned in product(((4, 4), (4, 2)), _ATTENTION, _ATTENTION, (False, True)):
        if "heads" in (a, b) and heads != groups:
            continue
        for rotary in ((False, False), (False, True), (True, False)):
            yield _paired(next(number), (heads, groups, 0), (a, b), ("separate", "separate"), rotary, turned)
    kinds = (0, False, False), (3, False, False), (4, True, True), (4, False, True), (4, True, False)
    for a, b, turned, (experts, *stacked) in product(_FEED, _FEED, (False, True), kinds):
        plain = ("separate", "separate"), (a, b), (False, False)
        yield _paired(next(number), (4, 2, experts), *plain, turned, stacked)


def _paired(
    number: int, sizes: tuple[int, int, int], attention: Sequence[str], feed: Sequence[str], rotary: Sequence[bool],
    turned: bool, stacked: Sequence[bool] = (False, False),
) -> Case:  # fmt: skip
    """A network of heads, groups and experts in two layouts, of which the second may be turned."""
    net = Network(3, 20, sizes[0], sizes[1], 4, 24, sizes[2], biases=True, tied=False, constant=False)
    sides = zip(SCHEMES, attention, feed, rotary, (False, turned), stacked)
    one, two = (Layout(n, a, r, "plain", f, t, s, False, True, torch.float32) for n, a, f, r, t, s in sides)
    generator, at = torch.Generator().manual_seed(number), count(0)
    values = net.tensors(lambda name, shape: torch.randn(shape, generator=generator) * 0.1)
    numbers = net.tensors(lambda name, shape: torch.tensor(list(islice(at, prod(shape)))).reshape(shape))
    numbered = one.of(net, numbers), two.of(net, numbers)
    return Case(number, net, (one, two), one.of(net, values), two.of(net, values), numbered, set(), set())


@dataclass
class Outcome:
    """What one case gave, in target keys."""

    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    rules: int = 0
    base: int = 0
    seconds: float = 0.0
    fails: str = ""


def rules_of(recipe: cs.Recipe) -> int:
    """The rules of a recipe, in all of its stages."""
    return len(recipe.rules) + sum(map(rules_of, getattr(recipe, "stages", ())))


def score(case: Case) -> Outcome:
    """Infer, run on numbered tensors, compare."""
    result = Outcome()
    start = time.process_time()
    try:
        found = cs.suggest(case.source, case.target, by="values")
    except Exception:  # a crash of any kind is an outcome
        result.fails = traceback.format_exc().strip().splitlines()[-1]
        result.open = list(case.target)
        return result
    result.seconds, result.rules = time.process_time() - start, rules_of(found.recipe)
    named = {k for a in found.assumptions if a.kind == "values" for k in a.keys}
    try:
        made: Any = cs.plan(case.numbered[0], found.recipe).state_dict()
    except cs.CkptSurgeryError as error:
        made, result.fails = {}, error.diagnostics[0].headline
    for key, wanted in case.numbered[1].items():
        if key not in made:
            result.open += [] if key in case.impossible else [key]
        elif made[key].shape == wanted.shape and torch.equal(made[key], wanted):
            result.right.append(key)
            result.unlisted += [key] if key in case.tuned and key not in named else []
        else:
            result.wrong.append(key)
    return result


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--wrong", action="store_true", help="list what is wrong or open, and the recipes")
    parser.add_argument("--every", action="store_true", help="every pair of layouts instead of drawn ones")
    options = parser.parse_args()
    totals = Outcome()
    worst = 0.0
    whole = crashes = cases = 0
    seeds = range(options.first, options.first + options.count)
    for case in every_pair() if options.every else map(drawn, seeds):
        seed = case.seed
        cases += 1
        one = score(case)
        one.base = score(drawn(seed, tune=False)).rules if case.tuned else one.rules
        for name in ("right", "wrong", "open", "unlisted"):
            getattr(totals, name).extend(getattr(one, name))
        worst = max(worst, one.rules / max(1, one.base))
        whole += not (one.wrong or one.open or one.unlisted)
        crashes += bool(one.fails)
        counts = " ".join(f"{n} {len(getattr(one, n)):3}" for n in ("right", "wrong", "open", "unlisted"))
        print(f"{seed:4} {counts} rules {one.rules:3} ({one.base:3}) {one.seconds:5.2f} s  {case.label}", flush=True)
        if one.fails:
            print(f"     fails: {one.fails}")
        for label in ("wrong", "open", "unlisted") if options.wrong else ():
            for key in getattr(one, label):
                print(f"     {label:8} {key}{' (tuned)' * (key in case.tuned)}")
    known = sum(len(getattr(totals, n)) for n in ("right", "wrong", "open"))
    print(
        f"{cases} cases, {known} tensors: right {len(totals.right) / known:.1%}, wrong {len(totals.wrong)},"
        f" open {len(totals.open)}, tuned but not listed {len(totals.unlisted)}; whole {whole}; failures {crashes};"
        f" rules at most {worst:.1f} times those without tuning"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
