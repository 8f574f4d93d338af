"""Models and tensors on a device that is not the CPU: `shelf.py` makes one, in a process of its own.

Each law below runs there; the test of its name tells what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs


class Net(nn.Module):
    """Ties, a persistent and a computed buffer, a head that is not in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.cls = nn.Linear(8, 3)
        self.register_buffer("steps", torch.arange(4.0) + 1, persistent=False)


LAWS: dict[str, Callable[[str], None]] = {}


def law(run: Callable[[str], None]) -> Callable[[str], None]:
    LAWS[run.__name__] = run
    return run


def source(folder: str) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint of the model without its head."""
    torch.manual_seed(1)
    tensors = {key: t for key, t in Net().state_dict().items() if not key.startswith("cls")}
    cs.save(tensors, folder + "/net.safetensors", overwrite=True)
    return folder + "/net.safetensors", tensors


def check(found: nn.Module | dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], device: str = "shelf:0") -> None:
    """Equal byte for byte, and all of it on the device."""
    tensors = found.state_dict() if isinstance(found, nn.Module) else found
    for key, tensor in wanted.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key].cpu(), tensor), key
    everything = [*found.parameters(), *found.buffers()] if isinstance(found, nn.Module) else list(found.values())
    assert {str(tensor.device) for tensor in everything} == {device}


def code_of(run: Callable[[], object]) -> str:
    with pytest.raises(cs.CkptSurgeryError) as told:
        run()
    return told.value.diagnostics[0].code


@law
def a_meta_model_comes_to_lie_there_as_a_whole(folder: str) -> None:
    path, wanted = source(folder)
    model, on_cpu = cs.skeleton(Net), Net()
    report = cs.load_into(model, path, assign=True, device="shelf", init="cls", seed=5)
    cs.load_into(on_cpu, path, init="cls", seed=5)
    check(model, {**on_cpu.state_dict(), **wanted})
    assert model.head.weight is model.embed.weight and model.embed.weight.requires_grad
    assert torch.equal(model.steps.cpu(), on_cpu.steps)
    assert len(report.loaded) == 6 and len(report.initialised) == 2


@law
def a_copy_fills_what_lies_there(folder: str) -> None:
    path, wanted = source(folder)
    model = Net().to("shelf")
    model.head.weight = model.embed.weight  # such devices untie what is moved to them
    before = model.embed.weight
    cs.load_into(model, path, keep="cls", device="shelf", check_values=True)
    check(model, wanted)
    assert model.embed.weight is before and model.head.weight is before


@law
def what_is_kept_is_moved_along(folder: str) -> None:
    path, wanted = source(folder)
    model = Net()
    head = model.cls.weight.detach().clone()
    cs.load_into(model, path, keep="cls", assign=True, device=torch.device("shelf"))
    check(model, {**wanted, "cls.weight": head})


@law
def a_state_dict_may_be_made_there(folder: str) -> None:
    path, wanted = source(folder)
    with cs.open(path) as checkpoint:
        check(checkpoint.state_dict("shelf"), wanted)
    rules = ["embed.weight [a b] -> e [b a]", "norm.{x} -> n.{x}", "head.weight -> h | cast(f16)"]
    plan = cs.plan(path, rules)
    check(plan.state_dict(device="shelf"), plan.state_dict())


@law
def what_lies_there_can_be_a_source(folder: str) -> None:
    path, wanted = source(folder)
    with cs.open(path) as checkpoint:
        there = checkpoint.state_dict("shelf")
    model = cs.skeleton(Net)
    cs.load_into(model, there, assign=True, device="shelf", init={"cls": "zeros"})
    check(model, wanted)
    assert model.norm.weight.untyped_storage()._cdata != there["norm.weight"].untyped_storage()._cdata
    on_cpu = Net()
    cs.load_into(on_cpu, there, keep="cls")
    check(on_cpu, wanted, "cpu")


@law
def another_device_than_the_model_s_is_refused(folder: str) -> None:
    path, _ = source(folder)
    model = Net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert code_of(lambda: cs.load_into(model, path, keep="cls", device="shelf")) == "other-device"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert code_of(lambda: cs.load_into(Net(), path, keep="cls", device="nowhere")) == "bad-device"


@law
def a_device_without_room_says_so_and_nothing_is_loaded(folder: str) -> None:
    cs.save({"weight": torch.ones(600, 600)}, folder + "/big.safetensors")
    model = cs.skeleton(lambda: nn.Linear(600, 600, bias=False))
    with pytest.raises(cs.LoadError, match="shelf is full") as told:
        cs.load_into(model, folder + "/big.safetensors", assign=True, device="shelf")
    assert told.value.diagnostics[0].code == "device-failed"
    assert told.value.untouched == ("weight",)
    assert model.weight.is_meta
    with cs.open(folder + "/big.safetensors") as checkpoint:
        assert code_of(lambda: checkpoint.state_dict("shelf")) == "device-failed"


@law
def a_file_that_was_changed_leaves_the_model_as_it_was(folder: str) -> None:
    path, wanted = source(folder)
    plan, model = cs.plan(path, "{k...} -> {k...}", target=wanted), cs.skeleton(Net)
    with Path(path).open("r+b") as file:
        file.truncate(Path(path).stat().st_size - 300)
    with pytest.raises(cs.LoadError, match="changed") as told:
        plan.load_into(model, assign=True, device="shelf")
    assert not told.value.written and set(told.value.untouched) >= {"embed.weight", "norm.weight"}
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(cs.__file__).parents[1]), *sys.path))}
    said = subprocess.run([sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    told: dict[str, str] = json.loads(said.stdout)
    return told


@pytest.mark.parametrize("name", LAWS)
def test_on_another_device(name: str, outcome: dict[str, str]) -> None:
    assert outcome[name] == "held", outcome[name]


def main() -> None:
    from shelf import put_up

    put_up()
    told = {}
    for name, run in LAWS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(folder)
                told[name] = "held"
            except (Exception, pytest.fail.Exception):  # what came of it is what is asked for
                told[name] = traceback.format_exc()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
