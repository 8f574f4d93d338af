"""Wrappers at any depth, on either side: names agree once unwrapped, where the other side shows it, and it is said."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckptsurgery as cs

WRAPPERS = ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "inner_of_ours"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.norm = nn.LayerNorm(width)


class Net(nn.Module):
    """Two stages of blocks, each of its own width, so that a mistaken name is a mistaken shape too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.stages = nn.ModuleList([nn.ModuleList([Block(w) for _ in range(3)]) for w in (4, 6)])
        self.head = nn.Linear(6, 2)


def numbered() -> Net:
    model = Net()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 1000 * number)
    return model


def wrapped(model: nn.Module, path: str, name: str) -> nn.Module:
    """The model with one of its modules inside of another that holds nothing else; the model itself for ""."""
    outer = nn.Module()
    if not path:
        outer.add_module(name, model)
        return outer
    parent, _, leaf = path.rpartition(".")
    outer.add_module(name, model.get_submodule(path))
    model.get_submodule(parent).register_module(leaf, outer)
    return model


def values(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def arrived(model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(model), values(numbered()), strict=True))


BLOCKS = [f"stages.{s}.{b}" for s in range(2) for b in range(3)]
LAYERS = ["stages.0.1.norm", "stages.1.2.attention", "stages.1.0.attention.qkv", "head"]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("paths", [BLOCKS, BLOCKS[1:2], LAYERS, ["", *BLOCKS]], ids=["all", "one", "layers", "outer"])
def test_one_wrapper_on_one_side(name: str, side: str, paths: list[str]) -> None:
    models = {"source": numbered(), "target": Net()}
    for path in sorted(paths, reverse=True):  # the innermost first: a path holds until what is above it moves
        models[side] = wrapped(models[side], path, name)
    report = cs.load_into(models["target"], models["source"])
    assert arrived(models["target"]) and report.coverage == 1
    assert any(name in note for note in report.notes)


@pytest.mark.parametrize("seed", range(24))
def test_any_wrappers_on_both_sides(seed: int) -> None:
    draw = random.Random(seed)
    models = []
    for model, names in ((numbered(), WRAPPERS[:2]), (Net(), WRAPPERS[2:4])):
        name, outer = draw.choice(names), draw.choice(WRAPPERS)
        for path in sorted(draw.sample([*BLOCKS, *LAYERS], draw.randint(1, 8)), reverse=True):
            model = wrapped(model, path, name)
        models.append(wrapped(model, "", outer) if draw.random() < 0.5 else model)
    source, target = models
    report = cs.load_into(target, dict(source.state_dict()))
    assert arrived(target) and report.coverage == 1 and report.notes


def test_compiled_and_checkpointed_blocks_of_torch_itself() -> None:
    source, target = numbered(), Net()
    for stage in source.stages:
        for at, block in enumerate(stage):
            stage[at] = torch.compile(block, backend="eager")
    for stage in target.stages:
        for at, block in enumerate(stage):
            stage[at] = checkpoint_wrapper(block)
    assert "stages.0.0._orig_mod.norm.weight" in source.state_dict()
    cs.load_into(target, nn.DataParallel(source).state_dict())
    assert arrived(target)
    again = Net()
    cs.load_into(torch.compile(again, backend="eager"), source)
    assert arrived(again)


def test_a_name_that_both_sides_have_is_not_touched() -> None:
    def build() -> nn.Module:
        blocks = [nn.ModuleDict({"module": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(3)]
        return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "only": nn.ModuleDict({"module": nn.Linear(2, 2)})})

    source, target = build(), build()
    report = cs.load_into(target, wrapped(source, "blocks.1", "module"))
    assert all(torch.equal(a, b) for a, b in zip(values(source), values(target)))
    assert any("'blocks.1.module.module.weight' for 'blocks.1.module.weight'" in note for note in report.notes)


def test_what_would_take_two_keys_to_one_name_is_left_alone() -> None:
    source = {"a.weight": torch.ones(2, 2), "a.inner.weight": torch.zeros(2, 2), "a.bias": torch.ones(2)}
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, source)
    assert [d.code for d in error.value.diagnostics] == ["unexpected-keys"]


def test_one_layer_of_another_name_is_no_wrapper() -> None:
    source = nn.ModuleDict({"fc": nn.ModuleDict({"linear": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)})
    target = nn.ModuleDict({"fc": nn.ModuleDict({"conv": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)})
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(target, source)
    assert {d.code for d in error.value.diagnostics} == {"missing-keys", "unexpected-keys"}


def test_a_wrapped_head_of_another_size_is_told_by_the_names_of_the_model() -> None:
    source = numbered()
    source.head = nn.Linear(6, 5)
    for path in [*BLOCKS, "head"]:
        wrapped(source, path, "_orig_mod")
    with pytest.raises(cs.LoadError, match='init=\\["head"\\]'):
        cs.load_into(Net(), source)
    report = cs.load_into(Net(), source, mismatch="keep")
    assert report.kept == ("head.weight", "head.bias") and report.dropped[0] == "head._orig_mod.weight"
