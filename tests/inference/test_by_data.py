"""By inputs: networks whose names mean nothing, whose order is shuffled, and which are fused differently."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from score_inputs import case, score


# Between them: separate and fused projections, branches that run in the other order, tied and shared weights, bare
# parameters, convolutions with a shortcut.
@pytest.mark.parametrize("seed", [0, 10, 15, 21, 41, 46])
def test_random_networks_are_aligned_by_the_data_that_flows_through_them(seed: int) -> None:
    *args, _ = case(seed)
    found = score(*args)
    assert (found.fails, found.wrong, found.open, found.parity) == ("", [], [], "equal")


class Branches(nn.Module):
    """Two branches of two layers each, which run in either order."""

    def __init__(self, names: str, late: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.names, self.late, self.scale = names, late, scale
        for name in sorted(names):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e = (getattr(self, n) for n in self.names)
        x = e(x)
        branches = [lambda: b(torch.tanh(a(x))), lambda: torch.sin(d(torch.tanh(c(x))))]
        made = [run() for run in branches[::-1]][::-1] if self.late else [run() for run in branches]
        return torch.cat([made[0] * self.scale, made[1]], -1)


def test_branches_that_run_in_another_order_are_told_by_what_they_make() -> None:
    torch.manual_seed(0)
    one, two = Branches("abcde", False), Branches("zyxwv", True)
    found = cs.suggest(one, two, inputs=torch.randn(3, 4))
    assert found.parity is not None and found.parity.ok
    made = cs.plan(one, found.recipe).state_dict()
    pairs = zip(one.names, two.names)
    assert all(torch.equal(made[f"{b}.weight"], one.get_parameter(f"{a}.weight")) for a, b in pairs)


def test_where_outputs_differ_in_the_end_no_choice_is_made_between_what_would_do_alike() -> None:
    torch.manual_seed(0)
    one, two = Branches("abcde", False), Branches("zyxwv", True, scale=2.0)
    found = cs.suggest(one, two, inputs=torch.randn(3, 4))
    assert found.parity is not None and not found.parity.ok
    assert set(found.unmatched_target) == {f"{n}.{leaf}" for n in "zyxw" for leaf in ("weight", "bias")}
    (said,) = [a for a in found.assumptions if a.kind == "parity"]
    assert set(said.keys) == {"v.weight", "v.bias"}
