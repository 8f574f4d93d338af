"""Inputs that no report listed: models, modes and names at the edge of what torch allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def codes(error: pytest.ExceptionInfo[cs.CkptSurgeryError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


NAMES = [
    "weight with space", "gewicht_ü", "重み", "emoji😀", "a{b}c", "{k}", "x->y", "p|q", "[1]", "w,q", "z?", "a\\b",
    "x" * 3000, "new\nline", "tab\t", "#", "'quoted'", '"', "-", "a/b",
]  # fmt: skip


def named(names: list[str]) -> nn.Module:
    model = nn.Module()
    for number, name in enumerate(names):
        model.register_parameter(name, nn.Parameter(torch.full((2,), float(number))))
    return model


@pytest.mark.parametrize("form", ["memory", "x.safetensors", "x.pt", "folder"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_name_that_torch_takes_is_loaded_from_anywhere(form: str, prefix: str, tmp_path: Path) -> None:
    source: Any = {prefix + k: v + 1 for k, v in named(NAMES).state_dict().items()}
    if form != "memory":
        cs.save(source, tmp_path / form)
    model = named(NAMES)
    report = cs.load_into(model, source if form == "memory" else tmp_path / form)
    assert report.coverage == 1 and same({prefix + k: v for k, v in model.state_dict().items()}, source)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_kept_and_is_told_when_it_is_missing(name: str) -> None:
    source = {k: v + 1 for k, v in named(NAMES).state_dict().items()}
    model = named(NAMES)
    assert cs.load_into(model, source, keep=name).kept == (name,)
    del source[name]
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(named(NAMES), source)
    assert codes(error) == {"missing-keys"}


def test_empty_sources_and_models_without_tensors_are_told_apart() -> None:
    for model, source in ((nn.Linear(2, 2), {}), (nn.ReLU(), {"a": torch.ones(1)}), (nn.ReLU(), {})):
        with pytest.raises(cs.LoadError) as error:
            cs.load_into(model, source, partial=True)
        assert codes(error) == {"nothing-fits"} and "no tensors" in str(error.value)


@pytest.mark.parametrize("assign", [False, True])
def test_modes_gradients_and_attributes_stay_as_they_are(assign: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[0].weight.requires_grad_(False)
    model[0].weight.tag = "mine"
    model[1].eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model[0].bias.grad = torch.ones(2)
    parameters = list(model.parameters())
    addresses = [p.data_ptr() for p in parameters]
    source = {k: v + 1 for k, v in model.state_dict().items()}
    cs.load_into(model, source, assign=assign)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[0].weight.tag == "mine" and model.training and not model[1].training and model[2].training
    if not assign:
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert [p.data_ptr() for p in model.parameters()] == addresses and torch.equal(
            model[0].bias.grad, torch.ones(2)
        )
        optimizer.step()
        assert not torch.equal(model[0].bias, source["0.bias"])


def test_loading_twice_is_loading_once() -> None:
    model, source = nn.Linear(3, 3), nn.Linear(3, 3)
    first = cs.load_into(model, source)
    assert str(first) == str(cs.load_into(model, source)) and same(model.state_dict(), source.state_dict())


def test_a_model_is_a_source_for_itself() -> None:
    model = nn.Linear(3, 3, bias=False)
    weight = model.weight.detach().clone()
    cs.load_into(model, model, assign=True)
    assert torch.equal(model.weight, weight)
    cs.load_into(model, model.state_dict(), ["weight [x y] -> weight [y x]"])
    assert torch.equal(model.weight, weight.T)


def shared() -> nn.ModuleDict:
    layer = nn.Linear(2, 2)
    return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer, nn.Linear(2, 2))})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("names", ["all", "one"])
def test_modules_that_are_one_object_stay_one(assign: bool, names: str) -> None:
    source = {k: v + 1 for k, v in shared().state_dict().items()}
    source |= {k: source[f"a.{k.rpartition('.')[2]}"].clone() for k in source if k.startswith(("b.", "c.0."))}
    given = source if names == "all" else {k: v for k, v in source.items() if not k.startswith(("a.", "c.0."))}
    model = shared()
    report = cs.load_into(model, given, assign=assign)
    assert same(model.state_dict(), source) and model["a"].weight is model["c"][0].weight
    assert len(report.loaded) == 4 and len(report.tied) == 4


@pytest.mark.parametrize("way", ["init", "keep"])
def test_one_name_of_a_tie_cannot_be_set_apart_from_the_others(way: str) -> None:
    model, source = shared(), shared().state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, source, **{way: "b"})
    assert codes(error) == {f"{way}-of-tied"} and same(model.state_dict(), before)
    report = cs.load_into(model, source, **{way: ["a", "b", "c.0"]})
    assert set(report.loaded) == {"c.1.weight", "c.1.bias"}


def test_a_tie_of_the_file_is_no_tie_of_a_model_that_has_none(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    for name in ("memory", "x.pt", "x.safetensors"):
        source: Any = {"0.weight": weight, "1.weight": weight}
        if name != "memory":
            cs.save(source, tmp_path / name)
            source = tmp_path / name
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        cs.load_into(model, source, assign=True)
        with torch.no_grad():
            model[0].weight.add_(1)
        assert (model[1].weight == 1).all() and (weight == 1).all()


def test_what_is_assigned_from_a_file_is_ones_own_to_change(tmp_path: Path) -> None:
    big = torch.arange(8.0)
    torch.save({"weight": big[:4], "bias": big[4:]}, tmp_path / "x.pt")
    cs.save({"weight": big[:4], "bias": big[4:]}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        before = (tmp_path / name).read_bytes()
        model = nn.LayerNorm(4)
        cs.load_into(model, tmp_path / name, assign=True)
        with torch.no_grad():
            model.weight.fill_(9)
        assert model.bias.tolist() == [4, 5, 6, 7] and model.weight.untyped_storage().nbytes() == 16
        assert (tmp_path / name).read_bytes() == before


def test_memory_format_of_the_model_stays() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides, source = model.weight.stride(), nn.Conv2d(3, 4, 3).state_dict()
    cs.load_into(model, source)
    assert model.weight.stride() == strides and torch.equal(model.weight, source["weight"])


def test_under_a_default_device_or_dtype_the_files_own_count(tmp_path: Path) -> None:
    source = nn.Linear(2, 2)
    cs.save(source, tmp_path / "x.safetensors")
    model = nn.Linear(2, 2)
    with torch.device("meta"):
        cs.load_into(model, tmp_path / "x.safetensors", assign=True)
    assert same(model.state_dict(), source.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        cs.load_into(model, tmp_path / "x.safetensors", init={"bias": "normal(std=0.1)"})
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_inference_mode_on_either_side(tmp_path: Path) -> None:
    source = nn.Linear(2, 2)
    cs.save(source, tmp_path / "x.safetensors")
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    cs.load_into(frozen, source.state_dict())
    assert same(frozen.state_dict(), source.state_dict())
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        cs.load_into(model, tmp_path / "x.safetensors", assign=True)
    assert not model.weight.is_inference()
    model(torch.ones(1, 2)).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_models_on_either_side(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    cs.load_into(scripted, source.state_dict())
    x = torch.ones(1, 2)
    assert torch.equal(scripted(x), source(x))
    scripted.save(str(tmp_path / "x.pt"))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    cs.load_into(model, tmp_path / "x.pt")
    assert same(model.state_dict(), source.state_dict())


def test_a_parameter_of_a_class_of_its_own_keeps_it() -> None:
    class Marked(nn.Parameter):
        def __new__(cls, data: Tensor, requires_grad: bool = True, mark: str = "") -> Any:
            return torch.Tensor._make_subclass(cls, data, requires_grad)

    model = nn.Module()
    model.w = Marked(torch.zeros(2))
    model.w.mark = "kept"
    cs.load_into(model, {"w": torch.ones(2)}, assign=True)
    assert type(model.w) is Marked and model.w.mark == "kept" and model.w.tolist() == [1, 1]


def test_a_source_without_values_changes_nothing() -> None:
    model = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(model, nn.Linear(2, 2, device="meta"))
    assert codes(error) == {"meta-tensor"} and same(model.state_dict(), before)


def test_a_narrower_model_is_asked_about_and_told() -> None:
    source = nn.Linear(3, 3).state_dict()
    model = nn.Linear(3, 3).bfloat16()
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(model, source)
    assert codes(error) == {"dtype-mismatch"} and "can lose bits" in str(error.value)
    assert cs.load_into(model, source, dtype="model").cast == ("weight", "bias")
    assert torch.equal(model.weight, source["weight"].bfloat16())
    cs.load_into(model, source, dtype="source", assign=True)
    assert model.weight.dtype == torch.float32


WRONG: list[Callable[[nn.Module], Any]] = [
    lambda m: cs.load_into(m, m, init=True),
    lambda m: cs.load_into(m, m, keep=3),
    lambda m: cs.load_into(m, m, drop=[4]),
    lambda m: cs.load_into(m, m, drop=""),
    lambda m: cs.load_into(m, m, mismatch="ignore"),
    lambda m: cs.load_into(m, m, dtype=torch.float16),
    lambda m: cs.load_into(m, m, recipe="no/such"),
    lambda m: cs.load_into(m, m, recipe=[]),
    lambda m: cs.load_into(m, [torch.ones(2)]),
    lambda m: cs.load_into(m, None),
    lambda m: cs.load_into("model", m),
    lambda m: cs.load_into(m, torch.optim.Adam(m.parameters()).state_dict()),
    lambda m: cs.load_into(m, {0: torch.ones(2)}),
]


@pytest.mark.parametrize("call", WRONG)
def test_wrong_arguments_are_told_in_words(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(cs.CkptSurgeryError):
        call(nn.Linear(2, 2))


def test_none_means_nothing() -> None:
    model = nn.Linear(2, 2)
    assert cs.load_into(model, model, init=None, keep=None, drop=None).coverage == 1


def test_a_report_shows_itself_in_one_line() -> None:
    model = nn.Linear(2, 2)
    report = cs.load_into(model, {"weight": torch.ones(2, 2)}, init="bias")
    assert repr(report) == "<Report state_dict -> Linear: 1 loaded, 1 initialised>"
