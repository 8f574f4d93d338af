"""State beside the model follows the plan exactly, or the plan is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

import ckptsurgery as cs

FUSE = ["{p:q,k}.{l} [d ...] -> qk.{l} [(p d) ...]"]
STACK = ["experts.{e}.w [f d] -> experts [e f d]"]
NAMED = ["rename.{l} -> named.{l}"]


def linears(*names: str, bias: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(6, 4, bias=bias) for name in names})


def stepped(optimizer: torch.optim.Optimizer, times: int = 2) -> torch.optim.Optimizer:
    for step in range(times):
        for group in optimizer.param_groups:
            for n, p in enumerate(group["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(31 * step + n))
        optimizer.step()
    return optimizer


def run(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": stepped(optimizer).state_dict(), **more}


def carried(source: Any, recipe: Any, target: Any = None, **more: Any) -> Any:
    return cs.plan(source, recipe, target, subtree="model").carried(["optimizer"], **more)["optimizer"]


def refusal(source: Any, recipe: Any, **more: Any) -> str:
    with pytest.raises(cs.PlanError) as caught:
        carried(source, recipe, **more)
    return str(caught.value)


def test_parts_keep_counters_of_their_own(tmp_path: Path) -> None:
    model = linears("qk")
    source = run(model, torch.optim.AdamW(model.parameters()))
    plan = cs.plan(source, ["qk.{l} [(p d) ...] -> {p:q,k}.{l} [d ...]"], subtree="model")
    plan.save(tmp_path / "x.pt", carry="optimizer")
    for tree in (torch.load(tmp_path / "x.pt")["optimizer"], plan.carried("optimizer")["optimizer"]):
        steps = [state["step"] for state in tree["state"].values()]
        assert [float(step) for step in steps] == [2.0] * 4
        assert len({step.data_ptr() for step in steps}) == 4


def test_what_the_plan_leaves_alone_is_passed_on() -> None:
    model = linears("a")
    source = run(model, torch.optim.AdamW(model.parameters()))
    tree = carried(source, cs.Recipe(rest="keep"))
    assert torch.equal(tree["state"][0]["exp_avg"], source["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("kind", ["torch", "transformers"])
@pytest.mark.parametrize("job", ["stack", "transpose", "rename"])
def test_factored_moments_follow_whole_matrices(job: str, kind: str) -> None:
    experts = [torch.randn(4, 6) for _ in range(3)]
    whole = torch.stack(experts)
    before = {f"experts.{e}.w": w.clone() for e, w in enumerate(experts)}
    rules, after = STACK, [whole]
    if job == "transpose":
        rules, after = ["experts.{e}.w [f d] -> t.{e} [d f]"], [w.T.contiguous() for w in experts]
    elif job == "rename":
        rules, after = ["experts.{e}.w -> t.{e}"], [w.clone() for w in experts]
    make = torch.optim.Adafactor if kind == "torch" else Adafactor

    def trained(tensors: list[torch.Tensor]) -> Any:
        params = [nn.Parameter(t.clone()) for t in tensors]
        optimizer = make(params)
        for step in range(2):
            grads = [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + e)) for e in range(3)]
            moved = grads
            if params[0].dim() == 3:
                moved = [torch.stack(grads)]
            elif params[0].shape == (6, 4):
                moved = [g.T for g in grads]
            for p, g in zip(params, moved):
                p.grad = g.contiguous()
            optimizer.step()
        return optimizer.state_dict()

    source = {"model": before, "optimizer": trained(list(before.values()))}
    tree = carried(source, rules)
    # the factors are means of gradients alone, so an optimizer that began in the new layout has the same ones
    wanted = trained(after)["state"]
    factors = ("row_var", "col_var") if kind == "torch" else ("exp_avg_sq_row", "exp_avg_sq_col")
    for number, state in wanted.items():
        for name in factors:
            assert tree["state"][number][name].shape == state[name].shape
            torch.testing.assert_close(tree["state"][number][name], state[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, Adafactor])
def test_factored_moments_are_refused_where_a_rule_breaks_the_factoring(make: Any) -> None:
    model = linears("q", "k", bias=False)
    text = refusal(run(model, make(model.parameters())), FUSE)
    assert "error[carry-lost]" in text and "cuts or joins matrices" in text and 'carry_lost="drop"' in text


def test_a_vector_that_becomes_a_matrix_is_refused_where_moments_are_factored() -> None:
    model = linears("q", "k")
    source = run(model, Adafactor(model.parameters()))
    text = refusal(source, cs.Recipe(["{p:q,k}.bias [d] -> bias [p d]"], rest="keep"))
    assert "factored on one side" in text


def test_quantised_state_is_refused_by_name_and_renamed_as_it_is() -> None:
    model = {"rename.w": torch.randn(4, 6), "a.w": torch.randn(4, 6)}
    codes = {"state1": torch.zeros(4, 6, dtype=torch.uint8), "absmax1": torch.ones(1), "qmap1": torch.ones(256)}
    source = {
        "model": model,
        "optimizer": {"state": {0: codes | {"step": 3}, 1: codes | {"step": 3}}, "param_groups": [{"params": [0, 1]}]},
    }
    text = refusal(source, cs.Recipe(["a.w [x y] -> a.w [y x]", *NAMED]))
    assert "quantised to 8 bits" in text and "named.w" not in text
    tree = carried(source, cs.Recipe(NAMED, rest="keep"))
    assert tree["state"][0]["state1"] is not None and tree["state"][0]["step"] == 3


def test_growth_pads_moments_with_zeros_and_notes_it(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    source = run(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    recipe = ["{m:embed,head}.weight [v d] -> {m}.weight [v d] | resize_rows(8, mean, axis=v)"]
    plan = cs.plan(source, recipe, subtree="model")
    report = plan.save(tmp_path / "x.pt", carry=["optimizer"])
    old, new = source["optimizer"]["state"], torch.load(tmp_path / "x.pt")["optimizer"]["state"]
    for number in old:
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(new[number][name][:5], old[number][name])
            assert not new[number][name][5:].any() and new[number][name].shape[0] == 8
    assert any(note.startswith("padded with zeros") and "embed.weight" in note for note in report.notes)


def test_state_that_is_not_known_to_start_at_zero_is_not_padded() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3)})
    source = run(model, torch.optim.ASGD(model.parameters()))
    assert "'ax' is not known to start at zero" in refusal(source, ["embed.weight -> embed.weight | resize_rows(8)"])


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (["q.weight -> q.weight | mul(2)", "q.bias -> q.bias"], "computes new values"),
        (["q.weight -> q.weight, again.weight", "q.bias -> q.bias"], "a gradient of its own"),
        (["q.weight [x y] -> q.weight [x y] | take(x, [0, 0, 1])", "q.bias -> q.bias"], "computes new values"),
    ],
)
def test_values_that_are_computed_or_copied_are_refused_or_reset(rules: list[str], reason: str) -> None:
    model = linears("q")
    source = run(model, torch.optim.AdamW(model.parameters()))
    text = refusal(source, rules)
    assert "error[carry-lost]" in text and reason in text
    tree = carried(source, rules, carry_lost="drop")
    names = list(cs.plan(source, rules, subtree="model").keys)
    weights = [n for n, name in enumerate(names) if name.endswith("weight")]
    assert not set(weights) & tree["state"].keys() and len(tree["state"]) == 1
    assert tree["param_groups"][0]["params"] == list(range(len(names)))


def test_a_number_that_is_added_leaves_the_gradient() -> None:
    model = linears("q")
    source = run(model, torch.optim.AdamW(model.parameters()))
    tree = carried(source, cs.Recipe(["q.weight -> q.weight | add(1)"], rest="keep"))
    assert torch.equal(tree["state"][0]["exp_avg"], source["optimizer"]["state"][0]["exp_avg"])


def test_layers_that_are_read_twice_are_copies() -> None:
    model = linears("0", "1")
    source = run(model, torch.optim.AdamW(model.parameters()))
    rules = ["{i}.{l} -> {i}.{l}", "+ 1.{l} -> 2.{l}"]
    assert "{1,2}.weight" in refusal(source, rules)
    tree = carried(source, rules, carry_lost="drop")
    assert list(tree["state"]) == [0, 1] and tree["param_groups"][0]["params"] == [0, 1, 2, 3, 4, 5]


def test_parts_that_were_stepped_differently_are_refused() -> None:
    model = linears("q", "k")
    source = run(model, torch.optim.AdamW(model.parameters()))
    source["optimizer"]["state"][2]["step"] = torch.tensor(7.0)
    assert "its parts have different values of 'step': 2.0, 7.0" in refusal(source, FUSE)
    del source["optimizer"]["state"][2]
    assert "'k.weight' has no state in the optimizer, and 'q.weight' has" in refusal(source, FUSE)


def test_groups_are_remade_and_those_that_differ_are_named() -> None:
    model = linears("q", "k")

    def grouped(decays: list[float]) -> dict[str, Any]:
        parts = [[p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]]
        groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, decays)]
        return run(model, torch.optim.AdamW(groups))

    tree = carried(grouped([0.1, 0.0]), FUSE)
    assert [(g["params"], g["weight_decay"]) for g in tree["param_groups"]] == [([0], 0.1), ([1], 0.0)]
    apart = torch.optim.AdamW([{"params": model[name].parameters(), "lr": lr} for name, lr in (("q", 0.1), ("k", 0.2))])
    source = run(model, apart)
    source["optimizer"] = named(source["optimizer"], [["q.weight", "q.bias"], ["k.weight", "k.bias"]])
    text = refusal(source, FUSE)
    assert "error[groups-differ]" in text and "q.weight, k.weight are in groups 0 and 1, which differ in lr" in text


def named(tree: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state dict by names, as FSDP and distributed checkpoints have it."""
    flat = [name for group in names for name in group]
    groups = [{**group, "params": own} for group, own in zip(tree["param_groups"], names)]
    return {"state": {flat[n]: state for n, state in tree["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("front", ["", "module."])
def test_names_are_followed_with_their_prefix(front: str) -> None:
    model = linears("q", "k")
    source = run(model, torch.optim.AdamW(model.parameters()))
    numbered = carried(source, FUSE)
    source["optimizer"] = named(source["optimizer"], [[front + key for key in model.state_dict()]])
    tree = carried(source, FUSE)
    assert tree["param_groups"][0]["params"] == [f"{front}qk.weight", f"{front}qk.bias"]
    for n, name in enumerate(tree["param_groups"][0]["params"]):
        assert torch.equal(tree["state"][name]["exp_avg_sq"], numbered["state"][n]["exp_avg_sq"])


def test_the_flattened_form_is_followed() -> None:
    model = linears("q", "k")
    source = run(model, torch.optim.AdamW(model.parameters()))
    numbered, names = carried(source, FUSE), list(model.state_dict())
    flat = {
        f"state.{names[n]}.{name}": value
        for n, state in source["optimizer"]["state"].items()
        for name, value in state.items()
    }
    flat |= {f"param_groups.{name}.{field}": value for name in names for field, value in (("lr", 0.1), ("eps", 1e-8))}
    tree = carried({"model": source["model"], "optimizer": flat}, FUSE)
    assert torch.equal(tree["state.qk.weight.exp_avg"], numbered["state"][0]["exp_avg"])
    assert tree["param_groups.qk.bias.lr"] == 0.1 and len(tree) == 2 * 3 + 2 * 2


def test_moments_by_name_follow_as_moments() -> None:
    weight = torch.randn(4, 6)
    model = {"q.weight": weight, "k.weight": weight * 2}
    by_moment = {"exp_avg": {key: value * 3 for key, value in model.items()}}
    by_name = {key: {"exp_avg": value * 3} for key, value in model.items()}
    fused = torch.cat([*model.values()]) * 3
    assert torch.equal(carried({"model": model, "optimizer": by_moment}, FUSE)["exp_avg"]["qk.weight"], fused)
    assert torch.equal(carried({"model": model, "optimizer": by_name}, FUSE)["qk.weight"]["exp_avg"], fused)


def test_names_of_groups_go_before_numbers() -> None:
    model = linears("q", "k")
    backwards = list(model.named_parameters())[::-1]
    source = run(model, torch.optim.AdamW(backwards))
    tree = carried(source, FUSE)
    assert tree["param_groups"][0]["param_names"] == ["qk.weight", "qk.bias"]
    state = source["optimizer"]["state"]
    assert torch.equal(tree["state"][0]["exp_avg"], torch.cat([state[3]["exp_avg"], state[1]["exp_avg"]]))


def test_numbers_that_nothing_settles_need_a_table() -> None:
    model = linears("q", "k")
    source = run(model, torch.optim.AdamW(model["k"].parameters()))
    text = refusal(source, cs.Recipe(["k.{l} -> x.{l}"], rest="keep"))
    assert "error[carry-unknown]" in text and "neither names, order nor shapes" in text
    plan = cs.plan(source, cs.Recipe(["k.{l} -> x.{l}"], rest="keep"), subtree="model")
    tree = plan.carried({"optimizer": ["k.weight", "k.bias"]})["optimizer"]
    assert torch.equal(tree["state"][0]["exp_avg"], source["optimizer"]["state"][0]["exp_avg"])
    with pytest.raises(cs.PlanError, match="1 keys were given"):
        plan.carried({"optimizer": ["k.weight"]})
    with pytest.raises(cs.PlanError, match="which is not a key of the model"):
        plan.carried({"optimizer": ["k.weight", "k.bais"]})


@pytest.mark.parametrize("order", [["embed", "head", "mid"], ["embed", "mid", "head"]])
def test_tied_parameters_have_one_state(order: list[str], tmp_path: Path) -> None:
    parts = {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "mid": nn.Linear(3, 3)}
    model = nn.ModuleDict({name: parts[name] for name in order})
    model["head"].weight = model["embed"].weight
    source = run(model, torch.optim.AdamW(model.parameters()))
    torch.save(source, tmp_path / "run.pt")
    recipe = cs.Recipe(["{m}.weight [a b] -> x.{m}.weight [a b]", "mid.bias -> x.mid.bias"])
    tree = carried(tmp_path / "run.pt", recipe)
    assert len(tree["state"]) == 3
    assert torch.equal(tree["state"][1]["exp_avg"], source["optimizer"]["state"][1]["exp_avg"])


def test_running_statistics_are_no_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    source = run(model, torch.optim.AdamW(model.parameters()))
    tree = carried(source, ["{i}.{l} -> m.{i}.{l}"])
    assert list(tree["state"]) == [0, 1, 2, 3]


def test_new_parameters_come_into_the_group_of_their_kind() -> None:
    model = linears("a")
    groups = [{"params": [model["a"].weight], "weight_decay": 0.1}, {"params": [model["a"].bias], "weight_decay": 0}]
    source = run(model, torch.optim.AdamW(groups))
    recipe = cs.Recipe(rest="keep", init={"gate.weight [x y]": "zeros", "norm [x]": "ones"}, dims={"x": 2, "y": 3})
    tree = carried(source, recipe)
    assert [group["params"] for group in tree["param_groups"]] == [[0, 1], [2, 3]] and list(tree["state"]) == [0, 2]


def test_averages_undergo_what_the_model_undergoes(tmp_path: Path) -> None:
    model = linears("q", "k")
    state = model.state_dict()
    ema = {"decay": 0.9, "shadow": {f"module.{key}": value.double() * 0.5 for key, value in state.items()}}
    lists = {"decay": 0.9, "shadow_params": [value * 0.5 for value in state.values()]}
    torch.save({"model": state, "ema": ema, "lists": lists, "lr_schedulers": [{"last_epoch": 3}]}, tmp_path / "run.pt")
    recipe = cs.Recipe(
        ["{p:q,k}.weight [d x] -> qk.weight [(p d) x] | mul(2)", "q.bias -> b", "k.bias -> c"],
        carry=["ema", "lists"],
    )
    report = cs.plan(tmp_path / "run.pt", recipe, subtree="model", dtype="bf16").save(tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt")
    wanted = torch.cat([state["q.weight"], state["k.weight"]])
    assert new["model"]["qk.weight"].dtype == torch.bfloat16
    assert torch.equal(new["ema"]["shadow"]["module.qk.weight"], wanted.double())
    assert list(new["ema"]["shadow"]) == ["module.qk.weight", "module.b", "module.c"] and new["ema"]["decay"] == 0.9
    assert torch.equal(new["lists"]["shadow_params"][0], wanted) and len(new["lists"]["shadow_params"]) == 3
    assert new["lr_schedulers"] == [{"last_epoch": 3}]
    assert sum(note.startswith("carried along") for note in report.notes) == 2


def test_a_tree_without_some_of_the_model_is_refused() -> None:
    model = linears("q", "k").state_dict()
    source = {"model": model, "ema": {key: value for key, value in model.items() if key != "k.bias"}}
    with pytest.raises(cs.PlanError, match=r"the tree has no 'k\.bias'"):
        cs.plan(source, FUSE, subtree="model").carried("ema")
    source["ema"] = {**model, "extra.weight": torch.ones(2, 2)}
    with pytest.raises(cs.PlanError, match=r"'extra\.weight', which is not a key of the model"):
        cs.plan(source, FUSE, subtree="model").carried("ema")


def test_a_distributed_checkpoint_is_followed(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = linears("q", "k")
    optimizer = stepped(torch.optim.AdamW(model.parameters()))
    state, optim = get_state_dict(model, optimizer)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": state, "optimizer": optim}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    plan = cs.plan(tmp_path / "dcp", FUSE, subtree="model")
    plan.save(tmp_path / "new.pt", carry=["optimizer"])
    tree = torch.load(tmp_path / "new.pt")["optimizer"]
    old = optimizer.state_dict()["state"]
    assert torch.equal(tree["state"]["qk.weight"]["exp_avg"], torch.cat([old[0]["exp_avg"], old[2]["exp_avg"]]))
    assert tree["param_groups"][0]["params"] == ["qk.weight", "qk.bias"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_optimizers_in_a_list_are_followed(kind: type) -> None:
    model = linears("q", "k")
    source = run(model, torch.optim.AdamW(model.parameters()))
    tree = carried({"model": source["model"], "optimizer": kind([source["optimizer"]])}, FUSE)
    assert type(tree) is kind and tree[0]["state"][0]["exp_avg"].shape == (8, 6)


def test_a_recipe_names_its_trees_and_keeps_them_in_its_text_and_its_inverse() -> None:
    recipe = cs.Recipe(FUSE, carry=["optimizer", "ema"], carry_lost="drop")
    assert 'carry = ["optimizer", "ema"]\ncarry_lost = "drop"' in recipe.dumps()
    for one in (recipe, cs.Recipe(FUSE, carry={"optimizer": ["q.weight"]})):
        from ckptsurgery.language.toml import loads

        assert loads(one.dumps()) == one
    assert list(recipe.inverse().carry) == ["optimizer", "ema"] and (recipe + cs.Recipe()).carry == recipe.carry
    for wrong in ({"carry": [3]}, {"carry": {"optimizer": "x"}}, {"carry_lost": "dorp"}):
        with pytest.raises(cs.RecipeError):
            cs.Recipe(FUSE, **wrong)


def test_a_recipe_may_name_trees_that_a_checkpoint_lacks(tmp_path: Path) -> None:
    source = {"model": linears("q", "k").state_dict(), "step": 1}
    cs.plan(source, cs.Recipe(FUSE, carry=["optimizer"]), subtree="model").save(tmp_path / "x.pt")
    with pytest.raises(cs.PlanError, match="nothing called 'optimiser'"):
        cs.plan(source, FUSE, subtree="model").save(tmp_path / "y.pt", carry=["optimiser"])


def test_a_format_that_holds_no_trees_refuses_to_carry(tmp_path: Path) -> None:
    model = linears("q", "k")
    plan = cs.plan(run(model, torch.optim.AdamW(model.parameters())), FUSE, subtree="model")
    with pytest.raises(cs.PlanError, match="carry: optimizer is to be carried"):
        plan.save(tmp_path / "x.safetensors", carry=["optimizer"])


def test_the_command_line_carries(tmp_path: Path) -> None:
    model = linears("q", "k")
    torch.save(run(model, torch.optim.AdamW(model.parameters())), tmp_path / "run.pt")
    words = ["convert", "run.pt", "new.pt", "--subtree", "model", "--rule", FUSE[0]]

    def called(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptsurgery", *words, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = called("--carry", "optimizer")
    assert done.returncode == 0, done.stderr
    assert "carried along: optimizer, the state of 4 parameters" in done.stdout
    assert torch.load(tmp_path / "new.pt")["optimizer"]["state"][0]["exp_avg"].shape == (8, 6)
