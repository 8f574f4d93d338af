"""A number is written into a tensor exactly when the tensor's dtype can hold it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.selection import select

NUMBERS: list[float] = [
    0, 1, 2, -1, 0.5, 1.0, 127, 128, -128, -129, 255, 256, 65504.0, 65520.0, 1e39, -1e39, 2**31 - 1, 2**31,
    2**63 - 1, 2**63, math.inf, -math.inf, math.nan,
]  # fmt: skip
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]


def fits(number: float, dtype: torch.dtype) -> bool:
    if dtype.is_floating_point:
        return not math.isfinite(number) or abs(number) <= torch.finfo(dtype).max
    if not math.isfinite(number) or number != int(number):
        return False
    least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return least <= int(number) <= most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_number_is_written_exactly_when_it_fits(number: float, dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("value", torch.zeros(3, dtype=dtype))
    selection = select(model, buffers=True)
    if fits(number, dtype):
        selection.assign_("value", number, 1)
        written = model.get_buffer("value").tolist()
        expected = torch.tensor(number, dtype=dtype).item()
        assert written[0] == written[2] == 0
        assert written[1] == expected or (math.isnan(expected) and math.isnan(written[1]))
    else:
        with pytest.raises(LoadError) as caught:
            selection.assign_("value", number, 1)
        assert [d.code for d in caught.value.diagnostics] == ["lossy-cast"]
        assert not model.get_buffer("value").any()
