"""Summaries count each parameter once and leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from ckptsurgery.errors import LoadError
from ckptsurgery.reporting.model_summary import summarise


def test_a_small_network_counts_as_one_counts_by_hand() -> None:
    found = summarise(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert (found.params, found.trainable, found.nbytes) == (51, 51, 204)
    assert [r.params for r in found.rows if r.params] == [25, 18, 8]


def test_a_shared_layer_counts_once() -> None:
    layer = nn.Linear(8, 8)
    found = summarise(nn.Sequential(layer, nn.ReLU(), layer), (1, 8))
    assert found.params == 72 and [r.repeated for r in found.rows] == [False, False, False, True]
    assert "(shared)" in str(found)


def test_tied_parameters_count_once_and_frozen_ones_are_told() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    found = summarise(model, (2, 4))
    assert (found.params, found.trainable) == (20, 15) and [r.params for r in found.rows] == [0, 15, 5]
    assert found.rows[-1].output == ((2, 4, 5),) and "Non-trainable params: 5" in str(found)


def test_totals_are_the_sums_of_the_rows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MultiheadAttention(4, 2))
    found = summarise(model)
    assert found.params == sum(r.params for r in found.rows) == sum(p.numel() for p in model.parameters())
    assert found.nbytes == sum(r.nbytes for r in found.rows)
    assert found.buffers == 9


def test_the_table_draws_the_tree() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 1)))
    lines = str(summarise(model, (3, 2))).splitlines()[3:9]
    assert [line[:25].rstrip() for line in lines] == [
        "Sequential",
        "├─Sequential: 1-1",
        "│    ├─Linear: 2-1",
        "│    └─ReLU: 2-2",
        "└─Sequential: 1-2",
        "     └─Linear: 2-3",
    ]
    assert "[3, 1]" in lines[-1]


def test_a_run_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    model[0].eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: model.calls.add_(1) and None)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    summarise(model, (4, 2))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert [m.training for m in model] == [False, True, True] and model.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_a_run_that_fails_says_on_what_and_leaves_no_hook() -> None:
    model = nn.Linear(2, 2).train()
    with pytest.raises(LoadError, match=r"cannot run on float32 \[1, 3\]"):
        summarise(model, (1, 3))
    assert not model._forward_hooks and model.training


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_real_encoder_is_run_on_token_ids(device: str) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    with torch.device(device):
        model = BertModel(config)
    found = summarise(model, (1, 5))
    rows = {r.name: r for r in found.rows}
    assert rows["encoder.layer.1.output.dense"].output == ((1, 5, 8),) and found.params == model.num_parameters()


def test_several_inputs_and_outputs() -> None:
    found = summarise(nn.MultiheadAttention(4, 2), [(5, 1, 4), (6, 1, 4), (6, 1, 4)])
    assert found.rows[0].output == ((5, 1, 4), (1, 5, 6)) and found.input[1] == (6, 1, 4)
    assert summarise(nn.Embedding(3, 2), (4,), dtype=torch.int32).rows[0].output == ((4, 2),)


def test_the_json_form_is_plain() -> None:
    found = summarise(nn.Linear(2, 3), (1, 2))
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["params"] == 9 and plain["rows"][0] == {
        "name": "",
        "type": "Linear",
        "depth": 0,
        "output": [[1, 3]],
        "params": 9,
        "trainable": 9,
        "nbytes": 36,
        "repeated": False,
        "input": [[1, 2]],
        "kernel": [],
        "mult_adds": 9,
    }


@pytest.mark.parametrize("size", ["3", (1, -1), ((1, 2), 3), ()])
def test_what_is_no_shape_is_refused(size: object) -> None:
    with pytest.raises(LoadError, match="no shape"):
        summarise(nn.Linear(2, 2), size)  # type: ignore[arg-type]


def test_lazy_parameters_and_empty_models_can_be_summed_up() -> None:
    assert summarise(nn.Sequential()).params == 0
    lazy = nn.Sequential(nn.LazyLinear(2))
    assert "Total params: 0" in str(summarise(lazy))
    with pytest.raises(LoadError, match=r"'0\.weight' has no shape yet"):
        summarise(lazy, (1, 3))
    assert isinstance(lazy[0].weight, nn.UninitializedParameter)
