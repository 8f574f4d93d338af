"""Files that Paddle 3.3 wrote: opened without Paddle, exactly, and converted to what computes the same."""

from __future__ import annotations

import pickle
import re
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import ckptsurgery as cs


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What `make_paddle_files.py` put into the tensor of that name."""
    start = zlib.crc32(name.encode()) % 64
    count = torch.Size(shape).numel()
    return (((torch.arange(count) + start) % 128 - 64) / 8).reshape(shape)


def first_name(key: str) -> str:
    """An LSTM's weights stand in the file once more, by cell, and that name was the last to be filled."""
    found = re.fullmatch(r"lstm\.(weight|bias)_(ih|hh)_l0(_reverse)?", key)
    return f"lstm.0.cell_{'bw' if found[3] else 'fw'}.{found[1]}_{found[2]}" if found else key


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "tests" / "data" / "paddle"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_state_dict_of_either_protocol_comes_out_exactly(folder: Path, protocol: int) -> None:
    with cs.open(folder / f"net_p{protocol}.pdparams") as checkpoint:
        assert len(checkpoint) == 40
        assert {spec.dtype for spec in checkpoint.specs.values()} == {"F32"}
        for key in checkpoint:
            assert torch.equal(checkpoint[key].load(), numbers(first_name(key), checkpoint[key].shape)), key


def test_the_layouts_are_paddles_own(folder: Path) -> None:
    specs = cs.open(folder / "net_p4.pdparams").specs
    shapes = {key: specs[key].shape for key in ("head.weight", "embed.weight", "conv.weight", "up.weight")}
    assert shapes == {
        "head.weight": (4, 3),
        "embed.weight": (5, 4),
        "conv.weight": (3, 2, 3, 3),
        "up.weight": (3, 2, 2, 2),
    }
    assert {"bn._mean", "bn._variance", "norm.scale", "act._weight", "attn.q_proj.weight"} <= set(specs)
    assert "bn.num_batches_tracked" not in specs


def test_bfloat16_is_known_by_its_16_bits(folder: Path) -> None:
    with cs.open(folder / "bf16.pdparams") as checkpoint:
        assert {spec.dtype for spec in checkpoint.specs.values()} == {"BF16"}
        for key in checkpoint:
            assert torch.equal(checkpoint[key].load().float(), numbers(key, checkpoint[key].shape)), key


def test_a_nested_file_shows_its_tensors_and_what_else_it_holds(folder: Path) -> None:
    with cs.open(folder / "nested.pdparams") as checkpoint:
        assert checkpoint.extras["epoch"] == 3
        assert torch.equal(checkpoint["bn._mean"].load(), numbers("bn._mean", (3,)))


def test_an_optimizers_file_fits_no_model(folder: Path) -> None:
    assert "linear_0.w_0_moment1_0" in cs.open(folder / "adam.pdopt")
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(nn.ModuleDict({"fc": nn.Linear(4, 4)}), folder / "adam.pdopt")
    assert [d.code for d in caught.value.diagnostics] == ["nothing-fits"]


def test_what_was_converted_by_module_type_computes_what_paddle_computed(folder: Path) -> None:
    model = nn.ModuleDict(
        {
            "mlp": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
            "lstm": nn.LSTM(4, 3, bidirectional=True, batch_first=True),
            "attn": nn.MultiheadAttention(4, 2, batch_first=True),
        }
    ).eval()
    linear = [name for name, module in model["mlp"].named_modules() if type(module) is nn.Linear]
    recipe = cs.Recipe(
        rules=[
            *(f"mlp.{name}.weight [i o] -> mlp.{name}.weight [o i]" for name in linear),
            "{m...}.{l:_mean,_variance} -> {m...}.{l:running_mean,running_var}",
            "attn.{p:q,k,v}_proj.{l} [d? o] -> attn.in_proj_{l} [(p o) d?]",
            "attn.out_proj.weight [i o] -> attn.out_proj.weight [o i]",
        ],
        drop=["lstm.0.cell_{way}.{l}"],
        init={"{m...}.num_batches_tracked": "zeros"},
        rest="keep",
    )
    report = cs.load_into(model, cs.open(folder / "forward.pdparams", subtree="net"), recipe)
    assert report.coverage > 0.98 and len(report.dropped) == 8
    seen = cs.open(folder / "forward.pdparams", subtree="seen").state_dict()
    x = seen["x"]
    with torch.no_grad():
        ours = {"mlp": model["mlp"](x[:, 0]), "lstm": model["lstm"](x)[0], "attn": model["attn"](x, x, x)[0]}
    for name, y in ours.items():
        assert (y - seen[name]).abs().max() <= 1e-5 * max(1.0, float(seen[name].abs().max())), name


@pytest.mark.parametrize("depth", [0, 1, 9, 15])
def test_a_named_array_is_an_array_however_deep_it_lies(depth: int, tmp_path: Path) -> None:
    tree: object = {"w": ("linear_0.w_0", numpy.arange(3.0))}
    for _ in range(depth):
        tree = {"part": tree}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(tree, 4))
    with cs.open(tmp_path / "x.pdparams") as checkpoint:
        assert list(checkpoint) == ["w"]
        assert checkpoint["w"].load().tolist() == [0, 1, 2]
