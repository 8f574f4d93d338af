"""`reshard`: every rank ends up with its part of what one process would have made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import resharding_cases as cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_group import Group
from test_sharded_loading import WAYS

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

from test_random_rules import DTYPES, Case
from test_random_rules import cases as rules

SHARED = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("ranks", ["two", "four"])
@SHARED
@given(rules(), DTYPES, st.integers(0, 1 << 30), st.sampled_from([1, 16, 100, 1 << 20]))
def test_random_rules_between_random_placements(
    ranks: str, request: Any, case: Case, dtype: torch.dtype, seed: int, bucket: int
) -> None:
    group: Group = request.getfixturevalue(ranks)
    source, target = case.states(dtype)
    assert group(cases.anywhere, source, target, case.recipe, seed, bucket, {}) == [""] * group.ranks


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_fills_an_engine(way: str, two: Group, four: Group) -> None:
    assert two(cases.trainer_to_engine, way) == [""] * 2
    assert four(cases.trainer_to_engine, way) == [""] * 4


@pytest.mark.parametrize("way", ["fsdp", "both"])
def test_a_stream_gives_whole_tensors_to_ranks_that_name_specs(way: str, four: Group) -> None:
    assert four(cases.whole_stream, way) == [""] * 4


def test_models_on_different_ranks(two: Group, four: Group) -> None:
    assert two(cases.apart) == [""] * 2
    assert four(cases.apart) == [""] * 4


def test_stages_of_a_pipeline_together_are_a_source(four: Group) -> None:
    assert four(cases.stages) == [""] * 4


def test_ops_on_whole_tensors_run_on_one_rank_each(two: Group, four: Group) -> None:
    assert two(cases.quantised) == [""] * 2
    assert four(cases.quantised) == [""] * 4


def test_a_later_call_plans_nothing(two: Group) -> None:
    assert two(cases.calls, 20) == [(0, 0)] * 2


@pytest.mark.parametrize(
    ("what", "codes"),
    [
        ("missing", ["missing-keys"]),
        ("new", ["unexpected-keys"]),
        ("dtype", ["dtype-mismatch"]),
        ("one rank", ["unexpected-keys"]),
        ("bad on one rank", ["bad-source"]),
        ("tied", ["tied-apart"]),
        ("shapes", ["ranks-differ"]),
        ("first values", ["first-values"]),
        ("nobody", ["empty-side"]),
        ("value", ["op-failed", "half-loaded"]),
        ("replaced", ["layout-changed"]),
    ],
)
def test_an_error_is_the_same_on_all_ranks(what: str, codes: list[str], two: Group) -> None:
    first, second = two(cases.refusal, what)
    assert first == second
    assert first[0] == codes


def test_one_process_needs_no_group() -> None:
    trainer, engine = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4, dtype=torch.float64)
    sync = cs.reshard(trainer, engine)
    for _ in range(2):
        cases.step(trainer)
        sync()
        assert torch.equal(engine.weight, trainer.weight.double())
    assert sync.wire_bytes == 0
    assert [(name, tensor.dtype) for name, tensor in sync.stream()] == [
        ("weight", torch.float64),
        ("bias", torch.float64),
    ]


def test_memory_need_not_be_dense() -> None:
    held = torch.arange(24.0).view(4, 6)
    engine = {"w": torch.zeros(6, 8)[:, ::2]}
    cs.reshard({"w": held[:, ::2].t()}, {"w": engine["w"][:3]})()
    assert torch.equal(engine["w"][:3], held[:, ::2].t()) and not engine["w"][3:].any()
