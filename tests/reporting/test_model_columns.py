"""A model's table has the columns that are asked for, and a depth below which modules are counted together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.conv(x)).mean((2, 3)))


def rows(text: str) -> list[list[str]]:
    return [line.split("    ") for line in text.splitlines()]


def test_mult_adds_are_parameters_times_positions() -> None:
    found = cs.summary(Net(), (2, 3, 12, 12), col_names=("mult_adds", "kernel_size", "input_size"))
    by_name = {row.name: row for row in found.rows}
    assert by_name["conv"].mult_adds == (8 * 3 * 9 + 8) * 2 * 10 * 10
    assert by_name["body.0"].mult_adds == (8 * 4 * 9 + 8) * 2 * 8 * 8
    assert by_name["body.1"].mult_adds == 0 and by_name["fc"].mult_adds == (16 + 2) * 2
    assert found.mult_adds == sum(row.mult_adds for row in found.rows)
    assert f"Mult-adds of one run: {found.mult_adds:,}" in str(found)
    assert by_name["conv"].kernel == (3, 3) and by_name["body"].input == ((2, 8, 10, 10),)


@pytest.mark.parametrize(
    "model, size, wanted",
    [  # what torchinfo 1.8 counts
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (6, 4), 258),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 3)), (2, 3, 9, 9), 54208),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)), (2, 3, 12, 12), 48800),
    ],
)
def test_mult_adds_are_those_of_an_independent_count(model: nn.Module, size: tuple[int, ...], wanted: int) -> None:
    assert cs.summary(model, size).mult_adds == wanted


def test_a_layer_that_runs_twice_counts_twice_and_a_shared_one_is_one_row() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert cs.summary(nn.Sequential(layer, layer), (3, 4)).mult_adds == 2 * 3 * 16


def test_a_depth_counts_together_what_lies_below() -> None:
    text = str(cs.summary(Net(), depth=1))
    assert "body.0" not in text and "Conv2d: 2-1" not in text
    (line,) = [line for line in text.splitlines() if "(body)" in line]
    assert line.split()[-1] == "312"  # 8 * 4 * 9 + 8 of the convolution, 16 of the norm
    assert "Total params: 554" in text and "Conv2d (conv): 1-1" in text


def test_trainable_tells_partly() -> None:
    model = Net()
    cs.select(model, "fc.bias").freeze()
    cs.select(model, "conv").freeze()
    lines = str(cs.summary(model, depth=1, col_names=("params_percent", "trainable"))).splitlines()
    assert [line.split()[-1] for line in lines if ": 1-" in line] == ["no", "yes", "partly"]


def test_an_unknown_column_is_told_with_the_nearest() -> None:
    with pytest.raises(cs.LoadError, match="did you mean 'mult_adds'"):
        cs.summary(Net(), col_names=("mult_add",))
    with pytest.raises(cs.CheckpointError):
        cs.summary({"w": torch.ones(2)}, col_names=("mult_adds",))


def test_a_checkpoint_has_a_depth_too() -> None:
    text = str(cs.summary({"a.b.w": torch.ones(2), "a.b.v": torch.ones(3), "c": torch.ones(1)}, depth=1))
    assert "a.b" in text and "w" not in [word for line in text.splitlines() for word in line.split()]
