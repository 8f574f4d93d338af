"""First values by a model's own hooks: the one for a module, then the one for all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptsurgery.modeling.initialising import initialise


class Late(nn.Module):
    """Its hook for modules passes over its own parameter, which only the hook for all of it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 5)

    def init_weights(self) -> None:
        self.apply(self._init_weights)
        nn.init.constant_(self.table, 7)


@pytest.mark.parametrize("within", [False, True])
def test_what_the_hook_for_modules_passes_over_comes_from_the_hook_for_all(within: bool) -> None:
    model = nn.Sequential(Late()) if within else Late()
    path = "0." if within else ""
    rows = initialise(model, {path + "table": "default", path + "fc.weight": "default"})
    late = model[0] if within else model
    assert late.table.tolist() == [7, 7, 7] and late.fc.weight.unique().tolist() == [5]
    assert [row.by for row in rows] == ["Late.init_weights", "Late._init_weights"]
