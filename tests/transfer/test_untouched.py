"""A load that cannot be finished is not begun: whatever is wrong with `init`, the model keeps every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


class Bare(nn.Module):
    """A parameter that no method of the module fills."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def gives_up(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """An initialiser with a fault of its own."""
    raise ArithmeticError("no values today")


def wrong_shape(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """An initialiser that makes another tensor than asked for."""
    return torch.ones(7)


REST = {"scale": "ones", "steps": "zeros"}
MISTAKES: dict[str, dict[str, Any]] = {
    "a formula of fans on a bias": {**REST, "head.weight": "ones", "head.bias": "xavier_uniform"},
    "a pattern of vectors": {**REST, "head.weight": "ones", "head.{l:bias}": "orthogonal"},
    "no default": {"head": "default", "scale": "default", "steps": "zeros"},
    "a normal for integers": {**REST, "head": "default", "steps": "normal(std=0.02)"},
    "a callable that raises": {**REST, "head": gives_up},
    "a callable of another shape": {**REST, "head": wrong_shape},
    "a value that the dtype lacks": {**REST, "head": "default", "steps": "constant(0.5)"},
}


@pytest.mark.parametrize("meta", [False, True], ids=["copied into", "assigned to a meta model"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_init_leaves_the_model_as_it_was(mistake: str, meta: bool) -> None:
    if meta:
        with torch.device("meta"):
            model = Bare()
    else:
        model = Bare()
    before = dict(model.state_dict(keep_vars=True))
    held = {} if meta else {name: tensor.detach().clone() for name, tensor in before.items()}
    source = {"body.weight": torch.full((3, 3), 5.0), "body.bias": torch.full((3,), 5.0)}
    with pytest.raises((cs.CkptSurgeryError, ArithmeticError)):
        cs.load_into(model, source, init=MISTAKES[mistake])
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], held[name]) for name in held)


def test_and_a_right_one_fills_it() -> None:
    model = Bare()
    init = {**REST, "head": {"weight": "xavier_uniform", "bias": "zeros"}}
    report = cs.load_into(model, {"body.weight": torch.ones(3, 3), "body.bias": torch.ones(3)}, init=init)
    assert len(report.initialised) == 4 and not model.head.bias.any() and model.body.weight.eq(1).all()
