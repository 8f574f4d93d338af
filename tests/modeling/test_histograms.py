"""Histograms of statistics: every finite value is counted once, where numpy counts it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import ckptsurgery as cs
from ckptsurgery.modeling.statistics import stats_of

BIG = torch.finfo(torch.float64).max


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(3000, generator=torch.Generator().manual_seed(1)),
        torch.arange(-7, 8, dtype=torch.int64),
        torch.tensor([0.0, float("nan"), 1.0, float("inf"), 0.5]),
        torch.tensor([-BIG, 0.0, BIG], dtype=torch.float64),
        torch.tensor([0.0, 5e-324], dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.randn(50, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)),
        torch.randn(64, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    ],
    ids=["normal", "integers", "not finite", "the largest", "the smallest", "bool", "complex", "float8"],
)
def test_every_finite_value_is_counted_once(values: torch.Tensor) -> None:
    (row,) = stats_of({"w": values})
    plain = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    numbers = plain.double().numpy()
    finite = numbers[np.isfinite(numbers)]
    assert sum(row.histogram) == finite.size and len(row.histogram) == 41
    share = (finite / 2 - row.min / 2) / (row.max / 2 - row.min / 2) if row.max > 1e-300 else finite / row.max
    assert np.abs(np.histogram(share, 41, (0.0, 1.0))[0] - row.histogram).sum() <= 2  # a value on an edge


def test_one_value_is_one_bar_and_none_is_none() -> None:
    same, empty, lost = stats_of({"same": torch.ones(5), "empty": torch.ones(0), "lost": torch.tensor([float("nan")])})
    assert same.histogram == (5,) and empty.histogram == lost.histogram == ()


def test_a_page_compares_what_was_what_is_and_what_is_promised() -> None:
    net = nn.Linear(300, 200)
    chosen = cs.select(net, "weight")
    before = chosen.stats()
    chosen.init_("xavier_normal")
    promised = chosen.promised("xavier_normal")
    page = chosen.stats().to_html("a head", before=before, promised=promised)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    (row,) = data["rows"]
    assert data["facts"] == ["1 tensor", "1 of 1 are as promised"]
    assert row["promised"]["kept"] and row["before"]["std"] == before[0].std != row["now"]["std"]
    wrong = before.to_html(promised=promised)
    assert "0 of 1 are as promised" in wrong and '"before":null' in wrong


def test_what_is_not_finite_is_no_number_in_the_page() -> None:
    page = stats_of({"w": torch.tensor([float("inf")])}).to_html()
    data = re.search(r'id="data">(.*?)</script>', page)[1]
    assert json.loads(data, parse_constant=pytest.fail)["rows"][0]["now"]["mean"] is None
