"""Models with load hooks: what the caller says of parts, shapes and dtypes holds there as everywhere else."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import ckptsurgery as cs


class Renaming(nn.Module):
    """A whole model under a hook, as published models have it: what was called trunk is the body by now."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, classes)
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for key in [k for k in state if k.startswith(prefix + "trunk.")]:
            state[prefix + "body." + key[len(prefix) + 6 :]] = state.pop(key)


def old(classes: int = 2, **more: Tensor) -> dict[str, Tensor]:
    shapes = {"trunk.weight": (2, 2), "trunk.bias": (2,), "head.weight": (classes, 2), "head.bias": (classes,)}
    return {k: torch.full(s, 7.0) for k, s in shapes.items()} | more


def codes(error: pytest.ExceptionInfo[cs.CkptSurgeryError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


HEAD = ("head.weight", "head.bias")
BODY = ("body.weight", "body.bias")


def test_hooks_rename_and_the_report_says_from_what() -> None:
    model = Renaming()
    report = cs.load_into(model, {"module." + k: v for k, v in old().items()})
    assert all((p == 7).all() for p in model.parameters()) and report.coverage == 1
    assert {e.key: e.sources for e in report.ledger}["body.weight"] == ("module.trunk.weight",)


@pytest.mark.parametrize("way", ["init", "keep", "mismatch"])
def test_another_number_of_classes_is_settled_under_a_hook_too(way: str) -> None:
    model = Renaming(5)
    head = model.head.weight.detach().clone()
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, old())
    assert codes(error) == {"shape-mismatch"} and 'init=["head"]' in str(error.value)
    report = cs.load_into(model, old(), **({way: "head"} if way != "mismatch" else {"mismatch": "keep"}))
    assert report.loaded == BODY and report.dropped == HEAD and (model.body.weight == 7).all()
    assert (report.initialised if way == "init" else report.kept) == HEAD
    assert torch.equal(model.head.weight, head) is (way != "init")


def test_what_is_missing_or_left_over_is_told_as_anywhere() -> None:
    source = old(x=torch.ones(1))
    del source["head.bias"], source["head.weight"]
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(Renaming(), source)
    assert codes(error) == {"missing-keys", "unexpected-keys"}
    report = cs.load_into(Renaming(), source, partial=True)
    assert report.missing_keys == HEAD and report.unexpected_keys == ("x",) and report.loaded == BODY
    report = cs.load_into(Renaming(), source, init="head", drop="x")
    assert report.initialised == HEAD and report.dropped == ("x",)


@pytest.mark.parametrize("path", ["", "m"])
def test_what_a_hook_makes_up_and_has_no_place_for_is_told(path: str) -> None:
    model: nn.Module = nn.Linear(2, 2)
    model._register_load_state_dict_pre_hook(
        lambda state, prefix, *rest: state.update({"one": state["bias"], "two": 1})
    )
    source = {k: torch.full_like(v, 3.0) for k, v in model.state_dict().items()}
    if path:
        model, source = nn.ModuleDict({path: model}), {f"{path}.{k}": v for k, v in source.items()}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, source)
    (problem,) = error.value.diagnostics
    assert problem.headline == f"2 tensors have no place in {repr(path) if path else 'the model'}, say its hooks"
    assert problem.notes == tuple(f"{path}.{n}".strip(".") for n in ("one", "two"))
    cs.load_into(model, source, partial=True)
    assert all((p == 3).all() for p in model.parameters())


def test_what_a_hook_would_fill_can_be_kept_by_the_name_it_has_in_the_model() -> None:
    model = Renaming()
    body = model.body.weight.detach().clone()
    report = cs.load_into(model, old(), keep="body")
    assert torch.equal(model.body.weight, body) and report.kept == BODY
    assert report.dropped == ("trunk.weight", "trunk.bias") and report.loaded == HEAD


@pytest.mark.parametrize("assign", [False, True])
def test_dtypes_are_judged_behind_the_hook(assign: bool) -> None:
    model = Renaming()
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(model, {k: v.double() for k, v in old().items()}, assign=assign)
    assert codes(error) == {"dtype-mismatch"}
    report = cs.load_into(model, {k: v.bfloat16() for k, v in old().items()}, assign=assign)
    assert report.cast == (*BODY, *HEAD) and all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(cs.CkptSurgeryError):
        cs.load_into(model, {k: v.long() for k, v in old().items()}, assign=assign)


@pytest.mark.parametrize("path", ["", "inner.model"])
def test_a_cast_behind_a_hook_is_told_wherever_the_module_stands(path: str) -> None:
    model: nn.Module = Renaming().bfloat16()
    for name in reversed(path.split(".") if path else []):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    before = f"{path}." if path else ""
    report = cs.load_into(model, {before + key: tensor for key, tensor in old().items()}, dtype="model")
    assert {e.key: e.cast for e in report.ledger} == {before + key: ("F32", "BF16") for key in (*BODY, *HEAD)}


def test_values_are_scanned_behind_the_hook() -> None:
    source = old()
    source["trunk.bias"][0] = float("inf")
    with pytest.raises(cs.LoadError, match=r"body\.bias"):
        cs.load_into(Renaming(), source, check_values=True)


def test_a_refused_load_leaves_the_model_as_it_was() -> None:
    model = Renaming()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong in ({"x": torch.ones(1)}, {"head.bias": torch.ones(9)}):
        with pytest.raises(cs.LoadError):
            cs.load_into(model, old() | wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TiedToInside(nn.Module):
    """The hooked part holds one name of a tie, the outside holds the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"embed": nn.Embedding(4, 2)})
        self.inner._register_load_state_dict_pre_hook(self.rename)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.inner["embed"].weight

    @staticmethod
    def rename(state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if prefix + "embeddings.weight" in state:
            state[prefix + "embed.weight"] = state.pop(prefix + "embeddings.weight")


@pytest.mark.parametrize("assign", [False, True])
def test_a_tie_into_a_hooked_module_holds_and_one_name_is_enough(assign: bool) -> None:
    with torch.device("meta" if assign else "cpu"):
        model = TiedToInside()
        model.head.weight = model.inner["embed"].weight
    value = torch.arange(8.0).view(4, 2)
    report = cs.load_into(model, {"inner.embeddings.weight": value}, assign=assign)
    assert model.head.weight is model.inner["embed"].weight and torch.equal(model.head.weight, value)
    assert report.loaded == ("inner.embed.weight",) and report.tied == ("head.weight",)
    cs.load_into(model, {"inner.embeddings.weight": value, "head.weight": value.clone()}, assign=assign)
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, {"inner.embeddings.weight": value, "head.weight": value + 1}, assign=assign)
    assert codes(error) == {"tied-values-differ"}
    assert model.head.weight.data_ptr() != value.data_ptr()


def test_a_meta_model_under_a_hook_is_assigned() -> None:
    with torch.device("meta"):
        model = Renaming()
    with pytest.raises(cs.LoadError, match="assign=True"):
        cs.load_into(model, old(), assign=False)
    cs.load_into(model, old())
    assert all((p == 7).all() for p in model.parameters())


def test_a_hook_that_resizes_is_asked_before_a_shape_is_called_wrong() -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(4))
            self._register_load_state_dict_pre_hook(self.resize)

        def resize(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            state[prefix + "positions"] = state[prefix + "positions"].repeat(2)

    model = Resizing()
    report = cs.load_into(model, {"positions": torch.tensor([1.0, 2.0])})
    assert model.positions.tolist() == [1, 2, 1, 2] and report.coverage == 1


def test_a_loader_that_needs_values_is_tried_on_a_real_copy() -> None:
    class Counting(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
            assert self.weight.sum().item() == self.weight.sum().item()
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model, source = Counting(2, 2), nn.Linear(2, 2)
    cs.load_into(model, source.state_dict())
    assert torch.equal(model.weight, source.weight)


def test_versions_of_a_file_reach_the_loaders(tmp_path: Any) -> None:
    class Versioned(nn.Linear):
        _version = 3
        seen: list[object] = []

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):  # type: ignore[no-untyped-def]
            self.seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    model = nn.ModuleDict({"fc": Versioned(2, 2)})
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "x.pt")
    cs.load_into(model, tmp_path / "x.pt")
    assert Versioned.seen and set(Versioned.seen) == {3}


def test_a_parametrised_module_loads_itself_only_where_a_hook_follows() -> None:
    model = nn.ModuleDict({"a": weight_norm(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    source = {k: torch.full_like(v, 2.0) for k, v in model.state_dict().items()}
    assert "loads in its own way" not in str(cs.load_into(model, source))
    seen: list[nn.Module] = []
    model["a"].register_load_state_dict_post_hook(lambda module, missing: seen.append(module))
    assert "'a' loads in its own way" in str(cs.load_into(model, source))
    assert model["a"] in seen and all((p == 2).all() for p in model.parameters())


def test_a_module_that_cannot_be_copied_to_try_is_refused_by_name() -> None:
    model = nn.ModuleDict({"part": Renaming()})
    model["part"].lock = threading.Lock()
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, {"part." + k: v for k, v in old().items()})
    assert codes(error) == {"own-loading-failed"} and "'part'" in str(error.value)


def test_a_step_that_feeds_a_hooked_module_and_another_is_shared_out() -> None:
    model = nn.ModuleDict({"a": Renaming().body, "b": nn.Linear(2, 2, bias=False)})
    model["a"].bias = None
    model["a"].register_load_state_dict_pre_hook(lambda *rest: None)
    fused = torch.arange(8.0).view(4, 2)
    cs.load_into(model, {"ab.weight": fused}, ["ab.weight [(p o) i] -> {p:a,b}.weight [o i]"])
    assert torch.equal(torch.cat([model["a"].weight, model["b"].weight]), fused)


def test_what_a_hook_copies_came_from_the_tensor_of_its_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].register_load_state_dict_pre_hook(
        lambda module, state, prefix, *rest: state.update({k: v.clone() for k, v in state.items()})
    )
    source = {k: torch.full_like(v, 3.0) for k, v in model.state_dict().items()}
    report = cs.load_into(model, source)
    assert {e.key: e.sources for e in report.ledger} == {k: (k,) for k in source}
    bias = model["a"].bias.detach().clone()
    report = cs.load_into(model, {k: v + 1 for k, v in source.items()}, keep="a.bias")
    assert report.kept == ("a.bias",) and torch.equal(model["a"].bias, bias) and (model["a"].weight == 4).all()
