"""Ops that merge models, against their formulas in numpy's float64, and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.ops.keyed import At, run_at
from ckptsurgery.ops.surveying import added, products
from ckptsurgery.specs import TensorSpec

NAMES = ["lerp", "ema", "diff", "apply", "task_arithmetic", "dare", "slerp", "nuslerp", "ties", "breadcrumbs", "della"]
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "lerp": (0.3,),
    "ema": (0.9,),
    "task_arithmetic": (0.7,),
    "dare": (0.4,),
    "slerp": (0.3,),
    "nuslerp": (0.3,),
    "ties": (0.4,),
    "breadcrumbs": (0.6, 0.1),
    "della": (0.4, 0.1),
}
PAIRS = ("lerp", "ema", "diff", "apply", "slerp", "nuslerp")


def models(count: int, seed: int = 0, shape: tuple[int, ...] = (20, 30)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(name: str, tensors: list[Tensor], *args: Any, key: str = "k", seed: int = 0, **keywords: Any) -> Tensor:
    (made,) = run_at(make_op(name, args, keywords), tuple(tensors), At(key, seed))
    return made


def wide(tensors: list[Tensor]) -> list[np.ndarray]:
    return [t.double().numpy() for t in tensors]


def close(made: Tensor, wanted: Any, tolerance: float = 3e-6) -> bool:
    return bool(np.allclose(made.double().numpy(), wanted, rtol=0, atol=tolerance))


def test_lines_and_deltas() -> None:
    a, b, *_ = tensors = models(3)
    x, y, z = wide(tensors)
    assert close(run("lerp", [a, b], 0.3), 0.7 * x + 0.3 * y)
    assert close(run("ema", [a, b], 0.9), 0.9 * x + 0.1 * y)
    assert close(run("diff", [a, b]), y - x)
    assert close(run("apply", [a, run("diff", [a, b])], 1), y)
    assert close(run("task_arithmetic", tensors, 0.7, w=(0.5, -1)), x + 0.7 * (0.5 * (y - x) - (z - x)))
    assert torch.equal(run("lerp", [a, b], 0), a)
    assert torch.equal(run("lerp", [a, b], 1), b)


def test_arcs_keep_lengths_and_ends() -> None:
    a, b = models(2)
    x, y = (v.ravel() for v in wide([a, b]))
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    wanted = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
    for name in ("slerp", "nuslerp"):
        assert close(run(name, [a, b], 0.3), wanted.reshape(a.shape))
        assert torch.allclose(run(name, [a, b], 0.0), a)
        assert torch.allclose(run(name, [a, b], 1.0), b)
        assert torch.equal(run(name, [a, 2 * a], 0.5), 1.5 * a)  # parallel: a line
        assert torch.equal(run(name, [a, 0 * a], 0.5), 0.5 * a)
    unit = [t / t.norm() for t in (a, b)]
    assert abs(float(run("slerp", unit, 0.4).norm()) - 1) < 1e-6
    base = models(1, seed=9)[0]
    assert torch.allclose(run("nuslerp", [base, a, b], 0.3), base + run("nuslerp", [a - base, b - base], 0.3))


def test_ties_trims_elects_and_merges() -> None:
    base, *tuned = tensors = models(4)
    w = (0.5, 0.3, 0.2)
    x, *others = wide(tensors)
    deltas = []
    for delta in (y - x for y in others):
        kept = np.argsort(-np.abs(delta), axis=None)[: int(0.3 * delta.size)]
        mask = np.zeros(delta.size)
        mask[kept] = 1
        deltas.append(delta * mask.reshape(delta.shape))
    weighted = [d * v for d, v in zip(deltas, w)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(d) == sign for d in weighted]
    total, divisor = sum(d * m for d, m in zip(weighted, agree)), sum(v * m for v, m in zip(w, agree))
    merged = total / np.where(divisor == 0, 1, divisor)
    assert close(run("ties", tensors, 0.3, w=w), x + merged)
    assert close(run("ties", tensors, 0.3, 2.0, w=w, normalise=False), x + 2 * total)
    assert torch.equal(run("ties", tensors, 0.0), base)
    assert torch.allclose(run("ties", [base, tuned[0]], 1.0), tuned[0])


def test_breadcrumbs_leave_out_the_largest_and_the_smallest() -> None:
    base, tuned = torch.zeros(10), torch.arange(10.0) * torch.tensor([1.0, -1] * 5)
    assert run("breadcrumbs", [base, tuned], 0.5, 0.2).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert run("breadcrumbs", [base, tuned], 0.9, 0.5).count_nonzero() == 8  # of nine kept one is 0


def test_random_drops_keep_the_mean_and_are_the_same_again() -> None:
    base, tuned = torch.zeros(300, 400), torch.ones(300, 400)
    made = run("dare", [base, tuned], 0.25)
    assert sorted(set(made.flatten().tolist())) == [0.0, 4.0]
    assert abs(float(made.mean()) - 1) < 0.02
    assert torch.equal(made, run("dare", [base, tuned], 0.25))
    assert not torch.equal(made, run("dare", [base, tuned], 0.25, key="other"))
    assert not torch.equal(made, run("dare", [base, tuned], 0.25, seed=1))
    two = run("dare", [base, tuned, tuned], 0.25)
    assert set(two.flatten().tolist()) == {0.0, 4.0, 8.0}  # each model has draws of its own
    magnitudes = torch.rand(300, 400, generator=torch.Generator().manual_seed(0))
    dropped = run("della", [base, magnitudes], 0.5, 0.3, elect=False)
    assert abs(float(dropped.mean()) - 0.5) < 0.02
    large, small = magnitudes > 0.8, magnitudes < 0.2
    assert float((dropped[large] != 0).double().mean()) > float((dropped[small] != 0).double().mean()) + 0.3


@given(st.integers(0, 50), st.integers(1, 60))
def test_draws_do_not_depend_on_how_a_tensor_is_cut(start: int, count: int) -> None:
    whole = At("k", 3).uniform(start + count)
    assert whole[start:].tolist() == At("k", 3, start).uniform(count).tolist()


def test_model_stock_and_karcher() -> None:
    base, *tuned = tensors = models(4)
    x, *others = wide(tensors)
    deltas = [(y - x).ravel() for y in others]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = np.mean([deltas[i] @ deltas[j] / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j]) for i, j in pairs])
    t = 3 * cosine / (1 + 2 * cosine)
    assert close(run("model_stock", tensors), t * np.mean(others, axis=0) + (1 - t) * x)
    assert torch.allclose(run("model_stock", [base, tuned[0], tuned[0]]), tuned[0])
    one = run("karcher", tuned)
    assert torch.allclose(one, run("karcher", tuned[::-1]), atol=1e-5)  # whatever the order
    units = [(y / np.linalg.norm(y)).ravel() for y in others]
    point = (one.double().numpy() / np.linalg.norm(one)).ravel()
    logs = [np.arccos(u @ point) / np.sin(np.arccos(u @ point)) * (u - (u @ point) * point) for u in units]
    assert np.linalg.norm(sum(logs)) < 1e-3  # the mean of the logarithms is 0 there
    assert abs(float(one.norm()) - np.mean([np.linalg.norm(y) for y in others])) < 1e-3
    assert torch.allclose(run("karcher", [base, base]), base, atol=1e-6)


def test_weights_of_a_sum_stand_in_a_list_or_in_a_table_by_choice() -> None:
    tensors = models(3)
    x, y, z = wide(tensors)
    stacked = torch.stack(tensors)
    assert close(run("sum_over", [stacked], "m", (0.2, 0.3, 0.5)), 0.2 * x + 0.3 * y + 0.5 * z)
    table = make_op("sum_over", ("m", (("b", 0.3), ("c", 0.5), ("a", 0.2))))
    assert table.ordered([("a", "b", "c")]) == make_op("sum_over", ("m", (0.2, 0.3, 0.5)))
    with pytest.raises(OpError, match="the choices of m are"):
        table.ordered([("a", "b")])
    with pytest.raises(OpError, match="2 weights for 3 entries"):
        make_op("sum_over", ("m", (1.0, 2.0))).infer((TensorSpec([3, 2], "F32"),))


@pytest.mark.parametrize("name", [*NAMES, "model_stock", "karcher"])
def test_every_merge_computes_in_float32_and_rounds_once(name: str) -> None:
    halves = [t.bfloat16() for t in models(2 if name in PAIRS else 3)]
    made = run(name, halves, *ARGUMENTS.get(name, ()))
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, run(name, [t.float() for t in halves], *ARGUMENTS.get(name, ())).bfloat16())
    mixed = run(name, [halves[0], *(t.float() for t in halves[1:])], *ARGUMENTS.get(name, ()))
    assert torch.equal(mixed, made)  # to the dtype of the first


@pytest.mark.parametrize("name", [*NAMES, "model_stock", "karcher"])
def test_integers_go_by_a_named_policy_and_shapes_must_agree(name: str) -> None:
    count = 2 if name in PAIRS else 3
    counters = [torch.tensor(n) for n in (3, 7, 5)[:count]]
    args = ARGUMENTS.get(name, ())
    with pytest.raises(OpError, match="integers=first"):
        run(name, counters, *args)
    assert run(name, counters, *args, integers="first").item() == 3
    assert run(name, counters, *args, integers="max").item() == 7
    with pytest.raises(OpError, match="differ in shape"):
        run(name, [torch.zeros(2), *(torch.zeros(3) for _ in range(count - 1))], *args)
    with pytest.raises(OpError, match="sources"):
        run(name, [torch.zeros(2)], *args)
    with pytest.raises(OpError, match="range"):
        big = torch.full((2,), 3e38)
        run("apply", [big, big])


@pytest.mark.parametrize(
    ("name", "args"),
    [("dare", (0,)), ("dare", (1.5,)), ("ties", (-0.1,)), ("della", (0.9, 0.2)), ("ema", (2,)), ("breadcrumbs", (2,))],
)
def test_shares_lie_within_their_range(name: str, args: Any) -> None:
    with pytest.raises(OpError, match=name):
        make_op(name, args)


def test_products_are_the_same_for_any_number_of_threads() -> None:
    """torch sums a large tensor in another order when it has more threads."""
    tensors = tuple(models(2, shape=(300, 1000)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(make_op("slerp", (0.3,)).survey(tensors))
    finally:
        torch.set_num_threads(before)
    assert all(other == found[0] for other in found)
    whole = np.array(found[0]).sum(0)
    a, b = (tensor.double().numpy().ravel() for tensor in tensors)
    np.testing.assert_allclose(whole, [[a @ a, a @ b], [a @ b, b @ b]], rtol=1e-8, atol=1e-8 * (abs(a) @ abs(b)))


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e-18, 1e-12, 1.0, 1e12, 1e19, 1e30, 0.0])
@pytest.mark.parametrize("count", [1, 63, 64, 1000, 1 << 15, (1 << 15) + 1, 3 << 15, (3 << 15) + 700])
def test_products_have_the_range_of_float64(count: int, scale: float) -> None:
    """Squares of float32 leave its range long before the values do."""
    pair = [tensor * scale for tensor in models(2, shape=(count,))]
    a, b = (tensor.double().numpy() for tensor in pair)
    want, close = np.array([[a @ a, a @ b], [a @ b, b @ b]]), abs(a) @ abs(b)
    np.testing.assert_allclose(added(products(pair), 2), want, rtol=1e-8, atol=1e-8 * close)
    np.testing.assert_allclose(added(products([t.double() for t in pair]), 2), want, rtol=1e-13, atol=1e-13 * close)


def test_products_of_mixed_scales_lose_no_stretch() -> None:
    sizes = torch.tensor([1.0, 1e-25, 0.0, 1e25, 1e-19]).repeat_interleave(1 << 15)
    pair = [tensor * sizes for tensor in models(2, shape=sizes.shape)]
    found = np.array(products(pair))
    for n in range(5):
        a, b = (tensor.double().numpy()[n << 15 : n + 1 << 15] for tensor in pair)
        close = abs(a) @ abs(b)
        np.testing.assert_allclose(found[n], [[a @ a, a @ b], [a @ b, b @ b]], rtol=1e-8, atol=1e-8 * close)
