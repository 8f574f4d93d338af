"""A plan as text: each rule with what its steps do, kind by kind."""

from __future__ import annotations

import re
from collections import Counter

import pytest

import ckptsurgery as cs


def counts(plan: cs.Plan) -> list[tuple[int, int, str]]:
    found = re.findall(r"^    (\d+) -> (\d+) (\w+)  ", str(plan), re.MULTILINE)
    return [(int(sources), int(targets), kind) for sources, targets, kind in found]


def specs(shapes: dict[str, list[int]], layers: int = 16) -> dict[str, cs.TensorSpec]:
    return {f"h.{i}.{k}": cs.TensorSpec(s, "F32") for i in range(layers) for k, s in shapes.items()}


def test_a_rule_that_turns_weights_and_copies_biases_shows_both() -> None:
    plan = cs.plan(specs({"fc.bias": [3], "fc.weight": [2, 3]}), "h.{i}.fc.{l} [x y?] -> l.{i}.fc.{l} [y? x]")
    assert counts(plan) == [(16, 16, "copy"), (16, 16, "move")]
    assert "plan: 32 source keys -> 32 target keys (16 copy, 16 move)" in str(plan)
    assert "    16 -> 16 move  h.0.fc.weight -> l.0.fc.weight F32 [3, 2]" in str(plan)


def test_a_rule_that_casts_some_of_its_tensors_shows_how_many() -> None:
    shapes = {"a": [4, 4], "b": [4, 1]}
    source = specs(shapes, 3) | {"h.3.a": cs.TensorSpec([4, 4], "BF16"), "h.3.b": cs.TensorSpec([4, 1], "BF16")}
    plan = cs.plan(source, "h.{i}.{l} [x y] -> l.{i}.{l} [y x]", dtype="bf16")
    # a column turned is the same bytes; what is bf16 already is not computed
    assert counts(plan) == [(1, 1, "copy"), (1, 1, "move"), (6, 6, "compute")]


def test_the_lines_add_up_to_the_steps() -> None:
    rules = [
        "h.{i}.{p:q,k,v} [o d] -> h.{i}.qkv [(p o) d]",
        "h.{i}.n [x y] -> h.{i}.n [y x]",
        "h.{i}.{m:e,f} -> {m}.{i}",
    ]
    plan = cs.plan(specs({"q": [2, 2], "k": [2, 2], "v": [2, 2], "n": [3, 2], "e": [2], "f": [2]}, 5), rules)
    steps: Counter[str] = Counter()
    for step in plan.steps:
        steps[step.kind] += len(step.targets)
    shown: Counter[str] = Counter()
    for _, targets, kind in counts(plan):
        shown[kind] += targets
    assert shown == steps
    assert counts(plan) == [(15, 5, "move"), (5, 5, "move"), (10, 10, "copy")]


def test_a_rule_of_thousands_of_choices_is_shown_in_part() -> None:
    names = [f"c{i}" for i in range(3000)]
    plan = cs.plan({name: cs.TensorSpec([2], "F32") for name in names}, f"{{p:{','.join(names)}}} -> z.{{p}}")
    assert len(str(plan)) < 2000 and "3,000 -> 3,000 copy" in str(plan).replace("3000", "3,000")


def test_a_plan_of_any_size_is_a_page() -> None:
    shapes = {f"k{n}": [n + 1] for n in range(300)}
    drops = [f"h.{{i}}.k{n}" for n in range(200, 300)]
    recipe = cs.Recipe([f"h.{{i}}.k{n} -> l.{{i}}.k{n}" for n in range(200)], drop=drops)
    plan = cs.plan(specs(shapes, 4), recipe)
    assert "… and 160 more rules" in str(plan) and "… and 80 more" in str(plan)
    assert len(str(plan)) < 20_000 and len(plan._repr_html_()) < 40_000 and len(repr(plan)) < 1000


def test_a_notebook_shows_the_rules_and_what_is_settled_otherwise() -> None:
    recipe = cs.Recipe(["<{i}> [x y] -> w.{i} [y x]"], drop=["b"], tie={"again": "w.0"})
    plan = cs.plan({"<0>": cs.TensorSpec([2, 3], "F32"), "b": cs.TensorSpec([2], "F32")}, recipe)
    page = plan._repr_html_()
    assert "&lt;{i}&gt; [x y]" in page and "1 step, move" in page and "<{i}>" not in page
    assert "1 key tied" in page and "1 key dropped" in page and str(plan.cost) in page
    assert repr(plan) == "<Plan 2 source keys -> 2 target keys: 1 move, 1 key dropped, 1 key tied>"


def test_a_plan_of_headers_alone_says_so_when_it_is_run() -> None:
    from ckptsurgery.planning.planner import make_plan

    plan = make_plan(specs({"a": [2]}), cs.Recipe(rest="keep"), lambda name: cs.Recipe())
    assert plan.cost.bytes_read
    for run in (plan.state_dict, lambda: plan.save("x.safetensors"), lambda: plan.inverse({}), lambda: plan.checkpoint):
        with pytest.raises(cs.PlanError, match="planned from headers alone"):
            run()
