"""Loads where memory is shared: between the model and the source, or between tensors of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ckptsurgery as cs


def holding(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


@pytest.mark.parametrize("shift", [0, 1, 600])
def test_a_source_over_the_models_own_memory_is_read_before_it_is_written(shift: int) -> None:
    row = np.arange(600 * 600 + shift, dtype=np.float32)
    model = holding(w=torch.from_numpy(row[shift:].reshape(600, 600)))
    source = {"w": torch.from_numpy(row[: 600 * 600].reshape(600, 600))}  # another storage, the same memory
    expected = source["w"].clone().T
    cs.load_into(model, source, cs.Recipe(rules=["w [x y] -> w [y x]"]))
    assert torch.equal(model.get_parameter("w"), expected)


@pytest.mark.parametrize("reversed_file", [False, True])
def test_parameters_that_overlap_load_what_agrees_where_they_meet(tmp_path: Path, reversed_file: bool) -> None:
    row, new = torch.zeros(9), torch.arange(9.0)
    state = {"a": new[:6].clone(), "b": new[3:].clone()}
    torch.save(dict(reversed(state.items())) if reversed_file else state, tmp_path / "x.pt")
    cs.load_into(holding(a=row[:6], b=row[3:]), tmp_path / "x.pt")
    assert torch.equal(row, new)


@pytest.mark.parametrize("form", ["views", "reshaped", "kept", "within"])
def test_parameters_that_overlap_refuse_what_differs_where_they_meet(form: str) -> None:
    row, keep = torch.zeros(9), ["b"] if form == "kept" else []
    if form == "within":
        model = holding(a=row.as_strided((3, 3), (1, 1)))
    else:
        model = holding(a=row[:6], b=row[:6].view(2, 3) if form == "reshaped" else row[3:])
    source = {key: torch.rand(t.shape) for key, t in model.state_dict().items() if key not in keep}
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, source, keep=keep)
    assert [d.code for d in caught.value.diagnostics] == ["overlapping-values"]
    assert not row.any()
    if form != "kept":
        cs.load_into(model, source, assign=True)
        assert all(torch.equal(t, source[key]) for key, t in model.state_dict().items())


def test_parameters_that_alternate_in_memory_take_any_values() -> None:
    row = torch.zeros(8)
    source = {"even": torch.rand(4), "odd": torch.rand(4)}
    cs.load_into(holding(even=row[::2], odd=row[1::2]), source)
    assert torch.equal(row, torch.stack(list(source.values()), 1).flatten())
