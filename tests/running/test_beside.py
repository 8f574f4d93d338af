"""What lies beside the model keeps its place and names; what belongs to tensors that change never goes along unsaid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptsurgery as cs

RULES = {
    "renamed": (["a.{l} -> b.{l}"], {}),
    "fused": (["{p:a,c}.{l} [d ...] -> ac.{l} [(p d) ...]"], {}),
    "transposed": (["a.weight [x y] -> a.weight [y x]"], {}),
    "computed": (["a.weight -> a.weight | add(1)"], {}),
    "dropped": ([], {"drop": ["a.{l}"]}),
    "tied anew": ([], {"tie": {"again.weight": "a.weight"}}),
    "copied": (["a.weight -> a.weight, again.weight"], {}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def stepped(made: nn.Module, kind: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, **more: Any) -> Any:
    optimizer = kind(made.parameters(), lr=0.1, **more)
    sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def flat_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".", ""): tensor for key, tensor in state.items()}


MODEL = model()
STATE = MODEL.state_dict()
SCALARS = {
    "epoch": 3, "args": {"lr": 0.1, "betas": (0.9, 0.99)}, "rng": torch.get_rng_state(), "loss": torch.tensor(2.0),
    "lr_schedulers": [{"last_epoch": 3, "base_lrs": [0.1]}], "class_weights": torch.ones(2), "best": {"acc": 0.5},
    "v1.0": True, "optimizer_name": "adam",
}  # fmt: skip
TREES: dict[str, tuple[Any, list[str]]] = {
    "adam": (stepped(model()), ["beside"]),
    "sgd without a state": (stepped(model(), torch.optim.SGD), ["beside"]),
    "two optimizers": ({"gen": stepped(model()), "disc": stepped(model())}, ["beside"]),
    "optimizers in a list": ([stepped(model(), torch.optim.SGD)], ["beside"]),
    "state by number": (stepped(model())["state"], ["beside"]),
    "state by name": ({"exp_avg": dict(STATE), "exp_avg_sq": dict(STATE)}, ["beside"]),
    "moments by name": ({key: {"exp_avg": value} for key, value in STATE.items()}, ["beside"]),
    "ema": ({"decay": 0.9, "shadow": {f"module.{k}": v for k, v in STATE.items()}}, ["beside.shadow"]),
    "shadow list": ({"decay": 0.9, "shadow_params": list(STATE.values())}, ["beside.shadow_params"]),
    "masks": ({key: value > 0 for key, value in STATE.items()}, ["beside"]),
    "one flat copy": ([torch.cat([value.flatten() for value in STATE.values()])], ["beside"]),
    "flat names": (flat_names(STATE), ["beside"]),
    "deep": ({"callbacks": {"ema": {"n": 1, "w": dict(STATE)}, "timer": {"s": 1}}}, ["beside.callbacks.ema.w"]),
}


def plan(tree: Any, how: str) -> Any:
    rules, more = RULES[how]
    return cs.plan(tree, cs.Recipe(rules, rest="keep", **more), subtree="model")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(params=["file", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    def given(tree: Any) -> Any:
        if request.param == "memory":
            return tree
        torch.save(tree, tmp_path / "source.pt")
        return tmp_path / "source.pt"

    return given


@pytest.mark.parametrize("name", TREES)
def test_a_change_of_container_takes_all_of_it_along(name: str, source: Any, tmp_path: Path) -> None:
    tree = {"epoch": 1, "model": STATE, "beside": TREES[name][0], **SCALARS}
    report = cs.plan(source(tree), cs.Recipe(rest="keep"), subtree="model").save(tmp_path / "x.pt", check=True)
    assert same(torch.load(tmp_path / "x.pt"), tree)
    told = next(note for note in report.notes if note.startswith("went along beside the model: "))
    assert set(told.partition(": ")[2].split(", ")) == {"beside", *SCALARS}


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("name", TREES)
def test_a_change_of_tensors_names_the_trees_that_no_longer_fit(
    how: str, name: str, source: Any, tmp_path: Path
) -> None:
    beside, paths = TREES[name]
    tree = {"model": STATE, "beside": beside, **SCALARS}
    made = plan(source(tree), how)
    with pytest.raises(cs.PlanError) as caught:
        made.save(tmp_path / "x.pt")
    (problem,) = caught.value.diagnostics
    assert problem.code == "left-behind" and [note.split("  ")[0] for note in problem.notes] == paths
    assert not (tmp_path / "x.pt").exists()
    for help in (dict.fromkeys(paths, "drop"), "drop"):
        report = made.save(tmp_path / "x.pt", beside=help, overwrite=True, check=True)
        found = torch.load(tmp_path / "x.pt")
        assert same({k: v for k, v in found.items() if k not in ("model", "beside")}, SCALARS)
        assert "exp_avg" not in repr(found.get("beside", "")) and "tensor" not in repr(found.get("beside", ""))
        assert same(found["model"], made.state_dict())
        assert f"left out, as asked: {', '.join(paths)}" in report.notes
    report = made.save(tmp_path / "x.pt", beside="keep", overwrite=True)
    assert same(torch.load(tmp_path / "x.pt")["beside"], beside)
    assert any(note.startswith("kept as it was") and note.endswith(", ".join(paths)) for note in report.notes)


def test_scalars_alone_go_along_whatever_the_plan_does(source: Any, tmp_path: Path) -> None:
    for how in RULES:
        made = plan(source({"model": STATE, **SCALARS}), how)
        made.save(tmp_path / "x.pt", overwrite=True)
        found = torch.load(tmp_path / "x.pt")
        assert list(found) == ["model", *SCALARS] and same(found["args"], SCALARS["args"])


def test_a_cast_keeps_an_optimizer_and_tells_the_dtype(source: Any, tmp_path: Path) -> None:
    tree = {"model": STATE, "optimizer": stepped(model())}
    report = cs.plan(source(tree), cs.Recipe(rest="keep"), dtype="bf16").save(tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["model"]["a.weight"].dtype == torch.bfloat16
    assert "kept in its dtype, though the model is cast: optimizer" in report.notes


def test_a_part_that_does_not_change_keeps_its_copy(source: Any, tmp_path: Path) -> None:
    heads = {"model": STATE, "ema_head": {"head.weight": torch.zeros(2, 4), "head.bias": torch.ones(2)}}
    plan(source(heads), "renamed").save(tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt")["ema_head"], heads["ema_head"])


@pytest.mark.parametrize(
    ("tree", "subtree"),
    [
        ({"model": STATE}, None),
        ({"step": 1, "net": STATE, 7: "x"}, None),
        ({"checkpoint": {"args": 1, "model_state_dict": STATE, "a.b": 2}, "v": 3}, None),
        ({"model": {"module": STATE, "n": 1}, "ema": {"module": dict(STATE), "n": 2}}, "ema.module"),
        ([3, STATE, "x"], None),
        ({"a.b": {"c": STATE}, "a": 1}, None),
        ({**STATE, "epoch": 3}, None),
        (STATE, None),
    ],
    ids=["model", "odd keys", "deep", "the other of two", "a list", "dotted", "flat", "bare"],
)
def test_the_tree_keeps_its_names_and_their_order(tree: Any, subtree: str | None, source: Any, tmp_path: Path) -> None:
    if isinstance(tree, list):
        torch.save(tree, tmp_path / "list.pt")
        given: Any = tmp_path / "list.pt"
    else:
        given = source(deepcopy(tree))
    with cs.open(given, subtree=subtree) as checkpoint:
        cs.save(checkpoint, tmp_path / "x.pt", check=True)
    assert same(torch.load(tmp_path / "x.pt"), tree)
    with cs.open(tmp_path / "x.pt", subtree=subtree) as again:
        assert list(again) == list(STATE)


def test_an_optimizer_among_the_tensors_is_not_the_model(source: Any, tmp_path: Path) -> None:
    tree = {**STATE, "optimizer": stepped(model())}
    with cs.open(source(tree)) as checkpoint:
        assert list(checkpoint) == list(STATE)
        cs.save(checkpoint, tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt"), tree)


def test_what_safetensors_cannot_hold_is_listed_and_nothing_is_refused(source: Any, tmp_path: Path) -> None:
    made = plan(source({"model": STATE, "optimizer": stepped(model()), "epoch": 1}), "renamed")
    report = made.save(tmp_path / "x.safetensors")
    assert any("cannot hold it" in note and "optimizer" in note and "epoch" in note for note in report.notes)
    for beside in ("keep", {"optimizer": "keep"}):
        with pytest.raises(cs.PlanError, match="to be kept"):
            made.save(tmp_path / "y.safetensors", beside=beside)


@pytest.mark.parametrize("beside", ["away", {"optimizer": "away"}])
def test_a_word_that_is_not_known_is_refused(beside: Any, tmp_path: Path) -> None:
    made = plan({"model": STATE, "optimizer": stepped(model())}, "renamed")
    with pytest.raises(cs.PlanError, match="not one of error, drop, keep"):
        made.save(tmp_path / "x.pt", beside=beside)


def test_a_tree_that_is_not_there_is_refused_and_the_others_are_named(tmp_path: Path) -> None:
    made = plan({"model": STATE, "optimizer": stepped(model())}, "renamed")
    with pytest.raises(cs.PlanError, match=r"'optimiser'[^$]*there are: optimizer"):
        made.save(tmp_path / "x.pt", beside={"optimiser": "drop"})


def test_a_part_may_be_dropped_that_would_fit(source: Any, tmp_path: Path) -> None:
    tree = {"model": STATE, "run": {"args": {"lr": 1}, "seed": 2}}
    given = deepcopy(tree)
    cs.plan(source(given), cs.Recipe(rest="keep")).save(tmp_path / "x.pt", beside={"run.args": "drop"})
    assert same(torch.load(tmp_path / "x.pt"), {"model": STATE, "run": {"seed": 2}})
    assert same(given, tree)


def test_one_word_for_one_tree_and_one_for_the_others(tmp_path: Path) -> None:
    tree = {"model": STATE, "ema": dict(STATE), "optimizer": stepped(model())}
    plan(tree, "renamed").save(tmp_path / "x.pt", beside={"ema": "keep", "": "drop"})
    assert list(torch.load(tmp_path / "x.pt")) == ["model", "ema"]


class Counting(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 7}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"seen": 7}


def test_a_modules_state_and_version_go_where_its_tensors_go(tmp_path: Path) -> None:
    state = nn.ModuleDict({"a": Counting(2, 2), "n": nn.BatchNorm1d(2)}).state_dict()
    torch.save(state, tmp_path / "x.pt")
    cs.plan(tmp_path / "x.pt", cs.Recipe(["{m:a,n}.{l} -> {m:b,o}.{l}"])).save(tmp_path / "y.pt")
    found = torch.load(tmp_path / "y.pt")
    assert found["b._extra_state"] == {"seen": 7} and "a._extra_state" not in found
    assert found._metadata["o"] == {"version": 2}
    nn.ModuleDict({"b": Counting(2, 2), "o": nn.BatchNorm1d(2)}).load_state_dict(found)


def test_the_help_of_the_command_line_is_one_to_paste(tmp_path: Path) -> None:
    torch.save({"model": STATE, "optimizer": stepped(model()), "ema": list(STATE.values())}, tmp_path / "x.pt")
    command = [sys.executable, "-m", "ckptsurgery", "convert", "x.pt", "y.pt", "--rule", "a.{l} -> b.{l}",
               "--rest", "keep"]  # fmt: skip
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith("error[left-behind]")
    options = refused.stderr.partition("follow the plan,")[2].partition(" leaves them out")[0].split()
    assert subprocess.run([*command, *options], cwd=tmp_path, check=False).returncode == 0
    assert list(torch.load(tmp_path / "y.pt")) == ["model"]
