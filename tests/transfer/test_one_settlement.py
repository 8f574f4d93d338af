"""Whoever plans, `cs.plan(target=)` or `cs.load_into`, the same mistake is the same diagnostic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


class Tied(nn.Module):
    """Two names of one tensor, a head of its own, and a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(3, 2)
        self.out.weight = self.embed.weight
        self.register_buffer("index", torch.zeros(2, 2, dtype=torch.int64))


def whole() -> dict[str, Tensor]:
    return {k: v.clone() + 1 for k, v in Tied().state_dict().items() if k != "out.weight"}


def but(*left_out: str, **changed: Tensor) -> dict[str, Tensor]:
    held = {k: v for k, v in whole().items() if k not in left_out}
    return held | {k.replace("__", "."): v for k, v in changed.items()}


KEEP = {"rest": "keep"}
RULES = {"rules": ["old.{l} -> head.{l}"], "rest": "keep"}
RENAMED = {("old." + k[5:] if k.startswith("head.") else k): v for k, v in whole().items()}
F8 = torch.ones(2, 3).to(torch.float8_e4m3fn)
ONE = "lossless"
Mistake = tuple[str, Callable[[], dict[str, Tensor]], dict[str, Any], str, set[str]]
MISTAKES: list[Mistake] = [
    ("nothing", whole, KEEP, ONE, set()),
    ("nothing, by rules", lambda: RENAMED, RULES, ONE, set()),
    ("in the source alone", lambda: but(aux=torch.ones(2)), KEEP, ONE, {"unexpected-keys"}),
    ("made by a rule in vain", lambda: RENAMED | {"old.scale": torch.ones(2)}, RULES, ONE, {"unexpected-targets"}),
    ("in the model alone", lambda: but("head.bias"), KEEP, ONE, {"missing-keys"}),
    ("made by no rule", lambda: but("head.weight", "head.bias", old__weight=F8.half()), RULES, ONE, {"missing-keys"}),
    ("another shape", lambda: but(head__weight=torch.ones(5, 3)), KEEP, ONE, {"shape-mismatch"}),
    ("transposed", lambda: but(head__weight=torch.ones(3, 2)), KEEP, ONE, {"shape-mismatch"}),
    ("another shape by a rule", lambda: RENAMED | {"old.weight": torch.ones(5, 3)}, RULES, ONE, {"shape-mismatch"}),
    ("another shape of indices", lambda: but(index=torch.zeros(3, 3).long()), KEEP, ONE, {"shape-mismatch"}),
    ("both kinds", lambda: but(index=torch.zeros(3).long(), head__bias=F8), KEEP, ONE, {"shape-mismatch"}),
    ("a lossy cast", lambda: but(head__bias=torch.ones(2).double()), KEEP, ONE, {"dtype-mismatch"}),
    ("a cast at all", lambda: but(head__bias=torch.ones(2).half()), KEEP, "error", {"dtype-mismatch"}),
    ("a cast that is asked for", lambda: but(head__bias=torch.ones(2).double()), KEEP, "model", set()),
    ("codes", lambda: but(head__weight=F8), KEEP, ONE, {"unscaled-codes"}),
    (
        "codes and their scales",
        lambda: but(head__weight=F8, head__weight_scale=torch.ones(1)),
        KEEP,
        "model",
        {"unscaled-codes", "unexpected-keys"},
    ),
    ("a tie to nothing", whole, {**KEEP, "tie": {"head.bias": "gone"}}, ONE, {"unused-tie"}),
    ("a tie of what is made", whole, {**KEEP, "tie": {"head.bias": "index"}}, ONE, {"tied-and-made"}),
    ("a tie that the model lacks", whole, {**KEEP, "tie": {"else": "index"}}, ONE, {"unexpected-targets"}),
    ("an init of what is made", whole, {**KEEP, "init": {"head.bias": "zeros"}}, ONE, {"init-and-made"}),
    ("an init of nothing", whole, {**KEEP, "init": {"heads.bias": "zeros"}}, ONE, {"unused-init"}),
    (
        "an init in two ways",
        lambda: but("head.bias"),
        {**KEEP, "init": {"head.bias": "zeros", "head.{l:bias}": "ones"}},
        ONE,
        {"init-twice"},
    ),
    ("an unknown init", lambda: but("head.bias"), {**KEEP, "init": {"head.bias": "zeross"}}, ONE, {"bad-init"}),
    ("an init of a tied name", whole, {**KEEP, "init": {"out.weight": "zeros"}}, ONE, {"init-of-tied"}),
    ("a kept tied name", whole, {**KEEP, "init": {"out.weight": "own"}}, ONE, {"keep-of-tied"}),
    ("values of a tie", lambda: but(out__weight=torch.ones(4, 3)), KEEP, ONE, {"tied-values-differ"}),
    (
        "all at once",
        lambda: but("head.bias", index=torch.zeros(3).long(), aux=F8, head__weight=torch.ones(2, 3).double()),
        {**KEEP, "init": {"heads.bias": "zeros"}},
        ONE,
        {"missing-keys", "unexpected-keys", "shape-mismatch", "dtype-mismatch", "unused-init"},
    ),
]  # fmt: skip


def told(call: Callable[[], object]) -> list[tuple[object, ...]]:
    """All that a person reads of the problems, but for how to settle them in this call."""
    try:
        call()
    except cs.CkptSurgeryError as error:
        return [(d.code, d.severity, d.headline, d.place, d.notes, d.facts) for d in error.diagnostics]
    return []


@pytest.mark.parametrize(
    ("source", "recipe", "dtype", "codes"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_reads_the_same_whoever_plans(
    source: Callable[[], dict[str, Tensor]], recipe: dict[str, Any], dtype: str, codes: set[str]
) -> None:
    def planned() -> object:
        model = Tied()
        return cs.plan(source(), cs.Recipe(**recipe), model, dtype=dtype).load_into(model)

    mine = told(planned)
    theirs = told(lambda: cs.load_into(Tied(), source(), cs.Recipe(**recipe), dtype=dtype))
    assert mine == theirs and {code for code, *_ in mine} == codes
    if recipe == KEEP:
        assert told(lambda: cs.load_into(Tied(), source(), dtype=dtype)) == mine


@pytest.mark.parametrize("rules", [KEEP, RULES], ids=["by name", "by rules"])
def test_what_fits_is_settled_alike(rules: dict[str, Any]) -> None:
    source = whole() if rules == KEEP else RENAMED
    source = {k: v for k, v in source.items() if not k.endswith("bias")}
    recipe = cs.Recipe(**rules, init={"head.bias": "zeros"})
    one, other = Tied(), Tied()
    reports = [cs.plan(source, recipe, one).load_into(one), cs.load_into(other, source, recipe)]
    assert len({r.ledger for r in reports}) == 1
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert one.out.weight is one.embed.weight and other.out.weight is other.embed.weight
