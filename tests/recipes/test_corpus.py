"""Every conversion of the corpus: planned from headers against its target, run and hashed, turned back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversions import PAIRS, SERVES, hashes, pair, recipe_for, same

import ckptsurgery as cs


def test_every_pair_has_a_recipe_and_every_recipe_a_pair(repository: Path) -> None:
    assert len(PAIRS) == 48
    assert sorted(SERVES) == PAIRS
    shelf = repository / "recipes"
    by_hand = {n for n in cs.list_recipes() if not (shelf / f"{n}.toml").read_text().startswith("# Read from")}
    by_hand -= {n for n in by_hand if n.startswith("surgery/")}  # test_surgery.py computes with these
    by_hand -= {n for n in by_hand if n.startswith("quantised/")}  # proved in test_quantised_recipes.py
    assert {e["recipe"] for e in SERVES.values()} == by_hand  # the others are proved in tests/exchange


@pytest.mark.parametrize("name", PAIRS)
def test_headers_are_planned_against_the_target_without_a_cast(name: str) -> None:
    case = pair(name)
    plan = cs.plan(case.headers(), recipe_for(name), target=case.target, config=case.config, dtype="error")
    assert set(plan.inits) == case.unmatched_target
    assert {*plan.specs, *plan.ties, *plan.inits} == set(case.target)
    assert all(
        {alias, base} <= set(next(g for g in case.tied_target if alias in g)) for alias, base in plan.ties.items()
    )


@pytest.mark.parametrize("name", PAIRS)
def test_every_target_tensor_holds_its_numbers_and_only_unmatched_keys_are_dropped(name: str) -> None:
    case = pair(name)
    plan = cs.plan(case.numbered(), recipe_for(name), config=case.config)
    assert set(plan.dropped) == case.unmatched_source
    assert hashes(plan.state_dict()) == case.expected


@pytest.mark.parametrize("name", [n for n in PAIRS if not pair(n).unmatched_source])
def test_a_plan_is_turned_back_exactly(name: str) -> None:
    case = pair(name)
    source = case.numbered()
    plan = cs.plan(source, recipe_for(name), config=case.config)
    converted = plan.state_dict()
    assert same(plan.inverse(converted).state_dict(), source)


@pytest.mark.parametrize("name", [n for n in PAIRS if pair(n).unmatched_source])
def test_a_plan_that_drops_is_not_turned_back(name: str) -> None:
    case = pair(name)
    plan = cs.plan(case.numbered(), recipe_for(name), config=case.config)
    with pytest.raises(cs.PlanError, match="cannot come back"):
        plan.inverse(plan.state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_the_inverted_recipe_leads_back_by_the_config_alone(name: str) -> None:
    case = pair(name)
    source, recipe = case.numbered(), recipe_for(name)
    converted = cs.plan(source, recipe, config=case.config).state_dict()
    back = cs.plan(converted, recipe.inverse(), config=case.config).state_dict()
    # what stood in the source under two names may come back under one, never the other way round
    assert back.keys() <= source.keys()
    aliases = {k for first, *others in case.tied_source for k in (first, *others)}
    assert source.keys() - back.keys() - aliases == case.unmatched_source
    assert all(any(name in back for name in names) for names in case.tied_source)
    assert all(torch.equal(back[k], source[k]) for k in source.keys() & back.keys())
