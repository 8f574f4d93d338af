"""Initialisers: bit for bit torch's own, right in mean and variance, checked before they run."""

from __future__ import annotations

import functools
import math
import random

import numpy
import pytest
import torch
from torch import nn

from ckptsurgery.ops.base import OpError
from ckptsurgery.ops.initialisers import INITIALISERS, Initialiser
from ckptsurgery.ops.seeding import generator_for, key_seed, seeded_globals
from ckptsurgery.specs import TensorSpec

NAMES_OF_TORCH = {
    *("constant", "ones", "zeros", "eye", "dirac", "normal", "uniform", "trunc_normal", "orthogonal", "sparse"),
    *("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"),
}
BIG = (256, 512)


def filled(
    name: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32, **given: object
) -> torch.Tensor:
    return Initialiser.of(name, (), given).apply(torch.empty(shape, dtype=dtype), torch.Generator().manual_seed(seed))


def test_every_initialiser_of_torch_is_there_by_name() -> None:
    assert set(INITIALISERS) >= NAMES_OF_TORCH
    assert {n.removesuffix("_") for n in nn.init.__all__ if n.endswith("_")} <= set(INITIALISERS)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("normal", {"mean": 1.0, "std": 0.5}),
        ("uniform", {"a": -2.0, "b": 3.0}),
        ("trunc_normal", {"std": 0.02}),
        ("trunc_normal", {"std": 1.0, "a": -0.5, "b": 0.25}),
        ("xavier_normal", {"gain": 2.0}),
        ("xavier_uniform", {}),
        ("kaiming_normal", {"mode": "fan_out", "nonlinearity": "relu"}),
        ("kaiming_uniform", {"a": math.sqrt(5)}),
        ("orthogonal", {"gain": 3.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_generator_gives_the_bits_that_torch_gives(name: str, given: dict[str, float], dtype: torch.dtype) -> None:
    theirs = torch.empty(6, 10, dtype=dtype)
    getattr(nn.init, name + "_")(theirs, generator=torch.Generator().manual_seed(3), **given)
    assert torch.equal(filled(name, (6, 10), 3, dtype, **given), theirs)


@pytest.mark.parametrize(
    ("name", "given", "shape"),
    [
        ("constant", {"val": 0.3}, (2, 3)),
        ("ones", {}, (4,)),
        ("zeros", {}, ()),
        ("eye", {}, (3, 5)),
        ("eye", {}, (5, 3)),
        ("dirac", {}, (4, 2, 3)),
        ("dirac", {"groups": 2}, (4, 2, 3, 3)),
    ],
)
def test_what_draws_nothing_is_what_torch_gives(name: str, given: dict[str, float], shape: tuple[int, ...]) -> None:
    theirs = torch.empty(shape)
    getattr(nn.init, name + "_")(theirs, **given)
    assert torch.equal(filled(name, shape, **given), theirs)


@pytest.mark.parametrize(
    ("name", "given", "mean", "std"),
    [
        ("normal", {"mean": 0.5, "std": 2.0}, 0.5, 2.0),
        ("uniform", {"a": 1.0, "b": 4.0}, 2.5, 3 / math.sqrt(12)),
        ("xavier_normal", {"gain": 1.5}, 0.0, 1.5 * math.sqrt(2 / (256 + 512))),
        ("xavier_uniform", {"gain": "tanh"}, 0.0, 5 / 3 * math.sqrt(2 / (256 + 512))),
        ("kaiming_normal", {"nonlinearity": "relu"}, 0.0, math.sqrt(2 / 512)),
        ("kaiming_uniform", {"a": 1.0, "mode": "fan_out"}, 0.0, 1 / math.sqrt(256)),
        ("kaiming_normal", {"nonlinearity": "selu"}, 0.0, 0.75 / math.sqrt(512)),
        ("lecun_normal", {}, 0.0, 1 / math.sqrt(512)),
        ("variance_scaling", {"scale": 2.0, "mode": "fan_avg"}, 0.0, math.sqrt(2 / 384)),
        ("variance_scaling", {"mode": "fan_out", "distribution": "uniform"}, 0.0, 1 / 16),
        ("variance_scaling", {"distribution": "truncated_normal"}, 0.0, 1 / math.sqrt(512)),
        # A unit normal cut at two sigma has std 0.8796…
        ("trunc_normal_tf", {"mean": 1.0, "std": 0.02}, 1.0, 0.02 * 0.87962566),
        ("trunc_normal", {"std": 1.0}, 0.0, 0.87962566),
        ("trunc_normal", {"std": 0.02}, 0.0, 0.02),
        ("orthogonal", {"gain": 2.0}, 0.0, 2 / math.sqrt(512)),
    ],
)
def test_mean_and_spread_follow_the_formula(name: str, given: dict[str, float], mean: float, std: float) -> None:
    values = filled(name, BIG, **given).double()
    assert values.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(values.numel()))
    assert values.std().item() == pytest.approx(std, rel=0.02)


def test_uniform_kinds_stay_within_their_bound() -> None:
    bound = math.sqrt(3) * math.sqrt(2 / 512)
    values = filled("kaiming_uniform", BIG, nonlinearity="relu")
    assert bound * 0.99 < values.abs().max() <= bound


def test_trunc_normal_cuts_in_the_tensors_unit_and_its_tf_kind_in_sigmas() -> None:
    assert filled("trunc_normal", BIG, std=0.02).abs().max() > 0.06
    assert filled("trunc_normal_tf", BIG, std=0.02).abs().max() <= 0.04


def test_fans_of_a_convolution_count_the_receptive_field() -> None:
    assert filled("kaiming_normal", (64, 32, 5, 5), nonlinearity="linear").std().item() == pytest.approx(
        1 / math.sqrt(32 * 25), rel=0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 3, 2)])
def test_orthogonal_is_orthogonal_in_every_width(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = filled("orthogonal", shape, dtype=dtype).float().flatten(1)
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_sparse_zeroes_its_share_of_each_column_and_follows_the_generator_alone() -> None:
    torch.manual_seed(1)
    once = filled("sparse", (10, 7), 5, sparsity=0.35)
    torch.manual_seed(2)
    assert torch.equal(filled("sparse", (10, 7), 5, sparsity=0.35), once)
    assert ((once == 0).sum(0) == 4).all()
    generator = torch.Generator().manual_seed(5)
    rule = Initialiser.of("sparse", (0.5,))
    first, second = (rule.apply(torch.empty(40, 3), generator) for _ in range(2))
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.parametrize("name", sorted(set(INITIALISERS) - {"default", "own"}))
def test_no_initialiser_touches_the_global_generators(name: str) -> None:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    given = {"constant": {"val": 1.0}, "sparse": {"sparsity": 0.5}}.get(name, {})
    filled(name, (4, 4, 3) if name == "dirac" else (4, 4), **given)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tobytes())


@pytest.mark.parametrize("name", ["normal", "xavier_uniform", "orthogonal", "trunc_normal", "eye"])
def test_memory_layout_does_not_change_the_values(name: str) -> None:
    rule = Initialiser.of(name)
    plain = rule.apply(torch.empty(4, 6), generator_for(0, "k"))
    strided = rule.apply(torch.empty(6, 4).t(), generator_for(0, "k"))
    view = torch.empty(8, 12)[::2, ::2]
    assert torch.equal(plain, strided) and torch.equal(plain, rule.apply(view, generator_for(0, "k")))


def test_a_parameter_is_filled_in_place_and_keeps_its_gradient_flag() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    made = Initialiser.of("xavier_normal").apply(weight, generator_for(0, "k"))
    assert made is weight and weight.requires_grad and weight.grad_fn is None and (weight != 0).any()


def test_tensors_without_elements_and_meta_tensors_pass_in_silence() -> None:
    Initialiser.of("kaiming_normal").apply(torch.empty(0, 3))
    assert Initialiser.of("normal").apply(torch.empty(2, device="meta")).is_meta


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("xavier_uniform", (8,), "at least 2 dimensions"),
        ("kaiming_normal", (), "at least 2 dimensions"),
        ("orthogonal", (3,), "at least 2 dimensions"),
        ("eye", (2, 2, 2), "needs 2 dimensions"),
        ("dirac", (2, 2), "3 to 5 dimensions"),
        ("lecun_normal", (5,), "at least 2 dimensions"),
    ],
)
def test_a_tensor_of_the_wrong_rank_is_refused_with_rule_and_shape(
    name: str, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(OpError, match=says) as caught:
        Initialiser.of(name).check(TensorSpec(shape, "F32"))
    assert str(list(shape)) in str(caught.value) and name in str(caught.value)


def test_integers_take_what_they_can_hold_and_nothing_drawn() -> None:
    spec = TensorSpec((2,), "I64")
    Initialiser.of("zeros").check(spec)
    Initialiser.of("constant", (3,)).check(spec)
    for rule in (Initialiser.of("constant", (0.5,)), Initialiser.of("normal")):
        with pytest.raises(OpError, match="I64"):
            rule.check(spec)


@pytest.mark.parametrize(
    ("name", "args", "keywords", "says"),
    [
        ("xavier_unifrom", (), {}, "no initialiser is called 'xavier_unifrom'"),
        ("normal", (), {"sdt": 1.0}, "normal has no argument 'sdt'"),
        ("normal", (0.0, 1.0, 2.0), {}, "too many"),
        ("normal", (0.0,), {"mean": 1.0}, "twice"),
        ("constant", (), {}, "needs val"),
        ("normal", (), {"std": -1.0}, "std is above 0"),
        ("normal", (), {"std": math.nan}, "finite"),
        ("normal", (), {"std": "wide"}, "finite number"),
        ("normal", (), {"std": True}, "finite number"),
        ("trunc_normal", (), {"a": 2.0, "b": 1.0}, "a is below b"),
        ("kaiming_normal", (), {"mode": "fanin"}, "fanin"),
        ("xavier_normal", (), {"gain": "rleu"}, "rleu"),
        ("sparse", (1.5,), {}, "0 to 1"),
        ("dirac", (0,), {}, "positive integer"),
        ("zeros", (1,), {}, "takes no arguments"),
    ],
)
def test_bad_arguments_are_named_and_the_nearest_good_one_suggested(
    name: str, args: tuple[float, ...], keywords: dict[str, object], says: str
) -> None:
    with pytest.raises(OpError, match=says) as caught:
        Initialiser.of(name, args, keywords)
    near = {"xavier_unifrom": "xavier_uniform", "sdt": "std", "fanin": "fan_in", "rleu": "relu"}
    assert caught.value.instead == {word: [right] for word, right in near.items() if word in f"{name} {keywords}"}


def test_equal_rules_are_equal_however_they_were_written() -> None:
    assert Initialiser.of("normal_", (0.0, 0.02)) == Initialiser.of("normal", (), {"std": 0.02, "mean": 0.0})
    assert str(Initialiser.of("kaiming_uniform", (), {"nonlinearity": "relu"})) == "kaiming_uniform(nonlinearity=relu)"


@pytest.mark.parametrize(
    "function",
    [
        lambda tensor, generator: tensor.normal_(generator=generator),
        lambda tensor, generator: torch.randn(tensor.shape, generator=generator),
        nn.init.normal_,
        functools.partial(nn.init.normal_, mean=0.0),
    ],
)
def test_a_callable_draws_from_the_generator_it_is_handed(function: object) -> None:
    made = Initialiser.wrap(function).apply(torch.empty(5), torch.Generator().manual_seed(2))  # type: ignore[arg-type]
    assert torch.equal(made, torch.empty(5).normal_(generator=torch.Generator().manual_seed(2)))


def test_a_callable_of_one_argument_may_fill_in_place() -> None:
    def fill(tensor: torch.Tensor) -> None:
        tensor.fill_(4)

    assert Initialiser.wrap(fill).apply(torch.empty(2)).tolist() == [4, 4]


def test_a_callable_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(OpError, match=r"\[3\].*\[2\]"):
        Initialiser.wrap(lambda tensor: torch.zeros(3)).apply(torch.empty(2))


def test_default_and_own_need_their_model() -> None:
    for name in ("default", "own"):
        with pytest.raises(OpError, match="in its model"):
            Initialiser.of(name).apply(torch.empty(2))


def test_seeds_differ_by_key_and_by_seed_and_stay_what_they_were() -> None:
    assert len({key_seed(s, k) for s in range(20) for k in "abc"}) == 60
    assert key_seed(0, "head.weight") == 1889623915906025276


def test_seeded_globals_put_back_every_generator_after_an_error_too() -> None:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    with pytest.raises(KeyError), seeded_globals(3):
        drawn = torch.rand(2), random.random(), numpy.random.rand()
        raise KeyError
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tobytes())
    with seeded_globals(3):
        assert torch.equal(drawn[0], torch.rand(2))
        assert drawn[1:] == (random.random(), numpy.random.rand())
