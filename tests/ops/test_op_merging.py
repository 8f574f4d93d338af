from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def specs(*shapes, dtype="F32"):
    return tuple(TensorSpec(s, dtype) for s in shapes)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_layer_answers_as_the_layer_beside_its_update(rslora):
    layer, down, up, x = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False), random(3, 6)
    scale = 16 / (2**0.5 if rslora else 2)
    with torch.no_grad():
        expected = layer(x) + scale * up(down(x))
        layer.weight.copy_(
            make_op("lora_merge", (16,), {"rslora": rslora}).run((layer.weight, down.weight, up.weight))[0]
        )
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_merged_convolution_answers_as_the_convolution_beside_its_update():
    layer, down, up = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 8, 1, bias=False)
    x = random(1, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x) + 4 * up(down(x))
        layer.weight.copy_(make_op("lora_merge", (8, 2)).run((layer.weight, down.weight, up.weight))[0])
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_weight_stored_as_in_and_out_takes_the_transposed_update():
    weight, a, b = random(8, 6, dtype=torch.bfloat16), random(2, 6), random(8, 2)
    (plain,) = make_op("lora_merge", (3,)).run((weight, a, b))
    (flipped,) = make_op("lora_merge", (3,), {"fan_in_fan_out": True}).run((weight.t().contiguous(), a, b))
    assert torch.equal(plain, (weight.float() + 1.5 * (b @ a)).bfloat16())
    assert torch.equal(flipped.t(), plain)


def test_updates_that_do_not_belong_to_the_weight_are_refused_with_the_shapes_they_should_have():
    for shapes, keywords, text in [
        ([(8, 6), (8, 2), (2, 6)], {"r": 2}, "write the sources as weight, A, B"),
        ([(8, 6), (2, 6), (8, 2)], {"r": 4}, "has rank 2, not 4"),
        ([(8, 6), (2, 5), (8, 2)], {}, r"A is \[r, 6\] and B is \[8, r\].*they are \[2, 5\] and \[8, 2\]"),
        ([(8, 6), (0, 6), (8, 0)], {}, "r of 1 or more"),
        ([(8,), (2, 6), (8, 2)], {}, "wants a weight"),
    ]:
        with pytest.raises(OpError, match=text):
            make_op("lora_merge", (1,), keywords).infer(specs(*shapes))


@pytest.mark.parametrize(
    "alpha", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0).bfloat16()]
)
@pytest.mark.parametrize("kernel", [(), (3,), (1, 1), (3, 5)])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_the_file_is_the_alpha_of_the_formula(alpha, kernel, rslora):
    weight, down = random(8, 6, *kernel), random(2, 6, *kernel)
    up = random(8, 2, *[1] * len(kernel))
    update = torch.zeros_like(weight)
    for o in range(8):
        for r in range(2):
            update[o] += up[o, r].reshape(()) * down[r]
    (merged,) = make_op("lora_merge", (), {"rslora": rslora}).run((weight, down, up, alpha))
    assert torch.allclose(merged, weight + 3 / (2**0.5 if rslora else 2) * update, atol=1e-6)
    assert torch.equal(merged, make_op("lora_merge", (3,), {"rslora": rslora}).run((weight, down, up))[0])


def test_alpha_is_given_once():
    three = specs((8, 6), (2, 6), (8, 2))
    for args, given, text in [
        ((), three, r"needs alpha: lora_merge\(alpha=16\), or a fourth source"),
        ((3,), (*three, *specs(())), "given twice, as 3 and as the fourth source"),
        ((), (*three, *specs((2,))), r"one number, not F32 \[2\]"),
        ((), (*three, *specs((), dtype="BOOL")), "alpha is BOOL"),
        ((), three[:2], "3 sources in this order: weight, A, B; it was given 2"),
    ]:
        with pytest.raises(OpError, match=text):
            make_op("lora_merge", args).infer(given)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_folding_and_unfolding_are_torchs_weight_norm(dim):
    layer = nn.Conv1d(4, 6, 3)
    weight = layer.weight.detach().clone()
    parametrizations.weight_norm(layer, dim=dim)
    parts = layer.parametrizations.weight
    with torch.no_grad():
        g, v = make_op("unfold_weight_norm", (dim,)).run((weight,))
        assert g.shape == parts.original0.shape
        assert torch.allclose(g, parts.original0) and torch.equal(v, parts.original1)
        parts.original0.mul_(2.5)
        parts.original1.add_(0.1)
        (folded,) = make_op("fold_weight_norm", (dim,)).run((parts.original0, parts.original1))
        assert torch.allclose(folded, layer.weight, atol=1e-6)


def test_folding_undoes_unfolding_but_for_rounding_and_says_no_more():
    unfold = make_op("unfold_weight_norm", (1,))
    weight = random(5, 4, 3)
    (back,) = unfold.inverse().run(unfold.run((weight,)))
    assert torch.allclose(back, weight, atol=1e-6)
    assert unfold.inverse().inverse() == unfold
    assert unfold.inverse(specs((5, 4, 3))) is None


def test_a_direction_of_norm_zero_has_no_weight():
    v = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    with pytest.raises(OpError, match="1 of 2 directions of v have norm 0"):
        make_op("fold_weight_norm").run((torch.ones(2, 1), v))


def test_a_magnitude_of_another_shape_or_dtype_is_refused():
    with pytest.raises(OpError, match=r"g is F32 \[6, 1, 1\], not F32 \[6\]"):
        make_op("fold_weight_norm").infer(specs((6,), (6, 4, 3)))
    with pytest.raises(OpError, match="has no dim 3"):
        make_op("unfold_weight_norm", (3,)).infer(specs((6, 4, 3)))
