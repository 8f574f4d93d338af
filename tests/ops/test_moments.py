"""What the initialisers promise is what they draw, and a draw from elsewhere does not pass for it."""

from __future__ import annotations

import math

import pytest
import torch

from ckptsurgery.ops.initialisers import INITIALISERS, Initialiser
from ckptsurgery.ops.moments import Moments, moments
from ckptsurgery.specs import TensorSpec

CASES = [
    "constant(3)",
    "ones",
    "zeros",
    "eye",
    "dirac(groups=2)",
    "normal(mean=1, std=0.5)",
    "uniform(a=-2, b=3)",
    "trunc_normal(std=0.02)",
    "trunc_normal(mean=0.3, a=-0.5, b=0.25)",
    "trunc_normal_tf(mean=1, std=0.02, a=-1)",
    "xavier_normal(gain=tanh)",
    "xavier_uniform",
    "kaiming_normal(mode=fan_out, nonlinearity=relu)",
    "kaiming_uniform(a=2.2360679)",
    "lecun_normal",
    "orthogonal(gain=3)",
    "sparse(0.3, std=2)",
    "variance_scaling(2, mode=fan_avg)",
    "variance_scaling(distribution=uniform)",
]


def read(text: str) -> Initialiser:
    from ckptsurgery.language.calls import parse_call

    call = parse_call(text)
    return Initialiser.of(call.name, call.args, dict(call.keywords))


def shape_for(text: str, size: int) -> tuple[int, ...]:
    return (size, size // 2, 3) if text.startswith(("dirac", "kaiming")) else (size, size // 2)


def promise(text: str, shape: tuple[int, ...], dtype: str = "F32") -> Moments:
    found = moments(read(text), TensorSpec(shape, dtype))
    assert found is not None
    return found


def test_every_formula_promises_something() -> None:
    assert {text.partition("(")[0] for text in CASES} == set(INITIALISERS) - {"default", "own"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 8, 300])
@pytest.mark.parametrize("text", CASES)
def test_a_draw_keeps_the_promise(text: str, size: int, dtype: torch.dtype) -> None:
    shape = shape_for(text, size)
    said = moments(read(text), TensorSpec(shape, dtype))
    assert said is not None
    for seed in range(5):
        tensor = torch.empty(shape, dtype=dtype)
        read(text).apply(tensor, torch.Generator().manual_seed(seed))
        values = tensor.double()
        assert abs(values.mean() - said.mean) <= said.mean_slack
        assert abs(values.std(correction=0) - said.std) <= said.std_slack
        assert said.low <= values.min() and values.max() <= said.high


@pytest.mark.parametrize("text", CASES)
def test_a_large_draw_leaves_little_to_chance(text: str) -> None:
    said = promise(text, shape_for(text, 300))
    assert said.mean_slack <= 0.05 * max(said.std, abs(said.mean), 1e-6)
    assert said.std_slack <= 0.05 * max(said.std, abs(said.mean), 1e-6)


def test_formulas_as_the_papers_have_them() -> None:
    assert math.isclose(promise("xavier_normal", (30, 20)).std, math.sqrt(2 / 50))
    assert math.isclose(promise("kaiming_normal(nonlinearity=relu)", (30, 20, 3, 3)).std, math.sqrt(2 / 180))
    assert math.isclose(promise("uniform(a=-1, b=1)", (9,)).std, 1 / math.sqrt(3))
    assert math.isclose(promise("lecun_normal", (30, 20)).std, math.sqrt(1 / 20), rel_tol=1e-6)


def test_no_promise_where_nothing_can_be_said() -> None:
    spec = TensorSpec((2, 2), "F32")
    assert moments(read("default"), spec) is None
    assert moments(Initialiser.wrap(torch.zero_), spec) is None
    assert moments(read("normal"), TensorSpec((0, 2), "F32")) is None
    assert moments(read("normal"), TensorSpec((2, 2), "C64")) is None
    assert moments(read("trunc_normal(a=50, b=51)"), spec) is None
