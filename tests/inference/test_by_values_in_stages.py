"""By values: blocks of rows that go their own ways, unequal parts along any axis, tensors that were tuned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs

Tensors = dict[str, Tensor]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotary(x: Tensor, heads: int) -> Tensor:
    """Rows of each head: both halves beside each other, element by element."""
    return x.view(heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape).contiguous()


def grouped(parts: Tensors, groups: int) -> Tensor:
    rows = [t.view(groups, -1, *t.shape[1:]) for t in parts.values()]
    return torch.cat(rows, 1).flatten(0, 1)


Q, K, V = drawn(0, 16, 5), drawn(1, 8, 5), drawn(2, 8, 5)
WIDE = drawn(3, 9, 4, 5)
CASES: dict[str, tuple[Tensors, Tensors]] = {
    "unequal parts of three axes": ({"a": WIDE}, dict(zip(("q", "k", "v"), WIDE.split([4, 2, 3])))),
    "unequal parts of a middle axis": (
        {"a": WIDE.transpose(0, 1).contiguous()},
        {k: t.transpose(0, 1).contiguous() for k, t in zip(("q", "k", "v"), WIDE.split([4, 2, 3]))},
    ),
    "unequal groups": ({"qkv": grouped({"q": Q, "k": K, "v": V}, 4)}, {"q": Q, "k": K, "v": V}),
    "rotary rows with a split": (
        {"h.qkv": torch.cat([Q, K, V])}, {"h.q": rotary(Q, 4), "h.k": rotary(K, 2), "h.v": V},
    ),
    "rotary rows with a join": (
        {"h.q": Q, "h.k": K, "h.v": V}, {"h.qkv": torch.cat([rotary(Q, 4), rotary(K, 2), V])},
    ),
    "swapped chunks": ({"h.w": Q}, {"h.u": torch.cat([Q[8:], Q[:8]])}),
    "swapped unequal chunks": ({"h.w": Q}, {"h.u": torch.cat([Q[10:], Q[:4], Q[4:10]])}),
    "a leading split with a transpose": (
        {"h.w": WIDE[:2].contiguous()}, {f"h.{n}": WIDE[i].T.contiguous() for i, n in enumerate(("gate", "up"))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_moved_is_found_and_proved(name: str) -> None:
    source, target = ({k: t.contiguous() for k, t in side.items()} for side in CASES[name])
    found = cs.suggest(source, target, by="values")
    assert found.coverage == 1.0
    made = cs.plan(source, found.recipe).state_dict()
    assert made.keys() == target.keys()
    assert all(torch.equal(made[k], t) for k, t in target.items())


@pytest.mark.parametrize("name", CASES)
def test_the_same_in_several_layers_is_one_rule_each(name: str) -> None:
    one, two = CASES[name]
    source = {f"l.{i}.{k}": t + i for i in range(3) for k, t in one.items()}
    target = {f"m.{i}.{k}": t + i for i in range(3) for k, t in two.items()}
    found = cs.suggest(source, target, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(made[k], t) for k, t in target.items())


def test_tuned_tensors_keep_the_rule_of_their_siblings_and_are_listed() -> None:
    kinds = ("q", "k", "v", "o", "up", "down")
    source = {f"l.{i}.{n}.weight": drawn(10 * i + m, 12, 12) for i in range(12) for m, n in enumerate(kinds)}
    tuned = {"h.3.q.weight", "h.7.up.weight", "h.7.down.weight", "h.11.o.weight"}
    target = {k.replace("l.", "h."): t.T.contiguous() for k, t in source.items()}
    target = {k: t + 0.01 * (k in tuned) for k, t in target.items()}
    found = cs.suggest(source, target, by="values")
    assert found.coverage == 1.0
    assert len(found.recipe.rules) == 1
    (said,) = [a for a in found.assumptions if a.kind == "values"]
    assert set(said.keys) == tuned
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(made[k], t) for k, t in target.items() if k not in tuned)
    assert all(torch.allclose(made[k], target[k], atol=0.02) for k in tuned)


def test_where_nothing_is_equal_nothing_is_taken_for_tuned() -> None:
    source = {f"l.{i}.w": drawn(i, 6, 6) for i in range(4)}
    target = {f"h.{i}.w": drawn(9 + i, 6, 6) for i in range(4)}
    assert cs.suggest(source, target, by="values").coverage == 0.0
