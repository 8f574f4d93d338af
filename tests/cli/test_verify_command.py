"""`verify` on real models that a module beside the user builds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import ckptsurgery as cs
from ckptsurgery.cli.program import app

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 2)
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.stem(x)) * self.scale))

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"fc": nn.Linear(4, 6), "bn": nn.BatchNorm1d(6)})
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.body["bn"](self.body["fc"](x)) * 2.0)

class Stubborn(Net):
    "Reads a value when it is built, so that it has to be built with memory."
    def __init__(self):
        super().__init__()
        assert float(self.stem.weight.sum()) == float(self.stem.weight.sum())

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))

def number():
    return 3
"""
RENAMED = "nets_of_mine:Renamed"
RULES = ["stem.{l} -> body.fc.{l}", "norm.{l} -> body.bn.{l}", "head.{l} -> out.{l}"]
AS_RULES = [word for rule in RULES for word in ("--rule", rule)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The module, checkpoints and a batch; the working directory."""
    (tmp_path / "nets_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    import nets_of_mine as nets

    net = nets.Net()
    net.norm.running_mean.normal_()
    cs.save(net.state_dict(), "a.safetensors")
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, "wrapped.pt")
    cs.plan(net.state_dict(), RULES).save("renamed.safetensors")
    cs.save({**net.state_dict(), "head.weight": net.head.weight.detach() + 1}, "other.safetensors")
    cs.save(nets.Tied(), "tied.safetensors")
    cs.save({"x": torch.randn(8, 4)}, "named.safetensors")
    cs.save({"0": torch.randn(8, 4)}, "batch.safetensors")
    cs.save({"ids": torch.arange(5)[None]}, "ids.safetensors")
    yield tmp_path
    del sys.modules["nets_of_mine"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments], prog_name="ckptsurgery")


def verified(*arguments: str, model: str = "nets_of_mine:Net", inputs: str = "batch.safetensors") -> Result:
    return run(*arguments, "--model", model, "--inputs", inputs)


@pytest.mark.parametrize(
    ("arguments", "model", "inputs"),
    [
        (("a.safetensors", "a.safetensors"), "nets_of_mine:Net", "batch.safetensors"),
        (("a.safetensors", "wrapped.pt"), "nets_of_mine:Net", "named.safetensors"),
        (("a.safetensors", "a.safetensors"), "nets_of_mine:Stubborn", "batch.safetensors"),
        (("tied.safetensors", "tied.safetensors"), "nets_of_mine:Tied", "ids.safetensors"),
        (("a.safetensors", "renamed.safetensors", "--other", RENAMED), "nets_of_mine:Net", "batch.safetensors"),
        (
            ("a.safetensors", "a.safetensors", "--other", RENAMED, *AS_RULES),
            "nets_of_mine:Net",
            "batch.safetensors",
        ),
    ],
)  # fmt: skip
def test_models_that_compute_the_same_agree(folder: Path, arguments: tuple[str, ...], model: str, inputs: str) -> None:
    result = verified(*arguments, model=model, inputs=inputs)
    assert result.exit_code == 0, result.output + result.stderr


def test_each_side_says_where_its_model_lies(folder: Path) -> None:
    """A file of a folder, a subtree, a mount and a component; each beside other weights, which are not meant."""
    net, other = cs.open("a.safetensors").state_dict(), cs.open("other.safetensors").state_dict()
    (folder / "two").mkdir()
    cs.save(net, "two/good.safetensors")
    cs.save(other, "two/bad.safetensors")
    torch.save({"model": other, "ema": net}, "both.pt")
    torch.save({"model": net, "ema": other}, "turned.pt")
    for name, state in (("unet", net), ("vae", other)):
        (folder / "pipe" / name).mkdir(parents=True)
        cs.save(state, f"pipe/{name}/diffusion_pytorch_model.safetensors")
    (folder / "pipe" / "model_index.json").write_text('{"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"]}')
    cs.save({key.removeprefix("head."): t for key, t in net.items() if key.startswith("head.")}, "head.safetensors")
    cs.save({key: t for key, t in net.items() if not key.startswith("head.")}, "trunk.safetensors")
    sides = [("two", {"file": "good.safetensors"}), ("pipe", {"component": "unet"})]
    for place, options in sides:
        as_first = [word for name, value in options.items() for word in (f"--{name}", value)]
        as_second = [word for name, value in options.items() for word in (f"--{name}-other", value)]
        for given in ((place, "a.safetensors", *as_first), ("a.safetensors", place, *as_second)):
            result = verified(*given)
            assert result.exit_code == 0, (given, result.output, result.stderr)
    assert verified("both.pt", "turned.pt", "--subtree", "ema", "--subtree-other", "model").exit_code == 0
    assert verified("both.pt", "turned.pt", "--subtree", "ema").exit_code == 1
    mounts = "--mount-other", "=trunk.safetensors", "--mount-other", "head.=head.safetensors"
    result = verified("a.safetensors", *mounts)
    assert result.exit_code == 0, (result.output, result.stderr)
    assert verified("a.safetensors", "two", "--file-other", "bad.safetensors").exit_code == 1


def test_a_changed_weight_is_found_where_it_is(folder: Path) -> None:
    result = verified("a.safetensors", "other.safetensors")
    assert result.exit_code == 1 and "head" in result.stdout, result.output
    as_json = verified("a.safetensors", "other.safetensors", "--json")
    assert as_json.exit_code == 1 and '"head"' in as_json.stdout


@pytest.mark.parametrize("option", ["--model", "--other"])
@pytest.mark.parametrize(("wrong", "says"), [("nets_of_mine:Nett", "Nett"), ("no_such_module:Net", "no_such_module")])
def test_a_mistake_is_blamed_on_its_own_option(folder: Path, option: str, wrong: str, says: str) -> None:
    given = ["a.safetensors", "a.safetensors", "--inputs", "batch.safetensors", option, wrong]
    result = run(*given, *(["--model", "nets_of_mine:Net"] if option == "--other" else []))
    assert result.exit_code == 2 and option in result.stderr and says in result.stderr
    assert "--target" not in result.stderr


def test_what_builds_no_model_is_named(folder: Path) -> None:
    result = verified("a.safetensors", "a.safetensors", model="nets_of_mine:number")
    assert result.exit_code == 1 and "cannot-build" in result.stderr


def test_a_checkpoint_that_does_not_fit_is_told_in_the_words_of_the_command(folder: Path) -> None:
    result = verified("a.safetensors", "tied.safetensors")
    assert result.exit_code == 1 and "shape-mismatch" in result.stderr
    assert "assign=" not in result.stderr and "partial=" not in result.stderr
