"""`load_into` takes what `plan` takes, and a model on the meta device needs no telling."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs

RULE = "qkv.weight [(p rows:p) d] -> {p:q,k,v}.weight [rows:p d]"


class Attention(nn.Module):
    """Query, key and value of their own sizes."""

    def __init__(self, rows: tuple[int, int, int] = (8, 2, 2), device: str = "cpu") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, n, bias=False, device=device) for n in rows)


@pytest.fixture
def fused() -> dict[str, torch.Tensor]:
    return {"qkv.weight": torch.arange(36.0).view(12, 3)}


def test_load_into_and_plan_share_their_arguments() -> None:
    shared = {"config", "dims", "dtype", "subtree"}
    assert shared <= inspect.signature(cs.load_into).parameters.keys()
    assert shared <= inspect.signature(cs.plan).parameters.keys()
    for call in (cs.load_into, cs.Plan.load_into, cs.Plan.save):
        assert "progress" in inspect.signature(call).parameters


@pytest.mark.parametrize("given", [{"dims": {"rows": {"q": 8, "k": 2, "v": 2}}}, {"config": {"h": 8, "g": 2}}, {}])
def test_sizes_reach_the_recipe(fused: dict[str, torch.Tensor], given: dict[str, object]) -> None:
    dims = {"rows": {"q": "config.h", "k": "config.g", "v": "config.g"}} if "config" in given else {}
    model = Attention()
    cs.load_into(model, fused, cs.Recipe([RULE], dims=dims), **given)
    assert torch.equal(torch.cat([model.q.weight, model.k.weight, model.v.weight]), fused["qkv.weight"])


def test_sizes_that_nothing_asks_for_are_an_error() -> None:
    with pytest.raises(cs.CkptSurgeryError, match="heads"):
        cs.load_into(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), dims={"heads": 2})


@pytest.mark.parametrize("how", [None, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_meta_model_is_assigned_and_any_other_copied_into(
    fused: dict[str, torch.Tensor], tmp_path: Path, device: str, how: bool | None
) -> None:
    cs.save(fused, tmp_path / "fused.safetensors")
    for load in (cs.load_into, lambda m, s, r, assign: cs.plan(s, r, m).load_into(m, assign=assign)):
        model = Attention(device=device)
        before = model.q.weight
        load(model, tmp_path / "fused.safetensors", cs.Recipe([RULE]), assign=how)
        assert (model.q.weight is before) == (how is None and device == "cpu")
        assert torch.equal(model.k.weight, fused["qkv.weight"][8:10])


def test_all_problems_of_a_meta_model_come_at_once() -> None:
    model = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(3, 1, device="meta"))
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "extra": torch.zeros(1)})
    assert {"missing-keys", "shape-mismatch", "unexpected-keys"} <= {d.code for d in caught.value.diagnostics}


def test_copying_into_a_meta_model_can_be_insisted_on_and_is_refused() -> None:
    with pytest.raises(cs.LoadError, match="meta-target"):
        cs.load_into(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2).state_dict(), assign=False)
