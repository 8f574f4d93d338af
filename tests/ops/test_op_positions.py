from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec


def run(name, tensor, *args, **keywords):
    (result,) = make_op(name, args, keywords).run((tensor,))
    return result


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def as_image(tokens, rows, columns):
    return tokens.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)


def as_tokens(image):
    return image.permute(0, 2, 3, 1).flatten(1, 2)


MODES = {
    "timm": {"size": (5, 6), "mode": "bicubic", "antialias": True},
    "plain": {"size": (5, 6), "mode": "bicubic"},
    "dinov2": {"scale_factor": (5.1 / 3, 6.1 / 4), "mode": "bicubic"},
    "torchvision": {"size": (5, 6), "mode": "bicubic", "align_corners": True},
    "big_vision": {"size": (5, 6), "mode": "bilinear", "align_corners": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_is_resampled_in_float32_by_the_rule_of_its_mode_and_prefix_tokens_stay(mode, dtype):
    table = random(1, 2 + 12, 7, dtype=dtype)
    result = run("resize_pos_embed", table, (5, 6), prefix=2, old_grid=(3, 4), mode=mode)
    expected = as_tokens(interpolate(as_image(table[:, 2:].float(), 3, 4), **MODES[mode])).to(dtype)
    assert torch.equal(result, torch.cat([table[:, :2], expected], 1))
    assert torch.equal(run("resize_pos_embed", table[0], (5, 6), prefix=2, old_grid=(3, 4), mode=mode), result[0])


def test_the_plain_mode_is_what_transformers_does_at_run_time():
    embeddings = Dinov2Embeddings(Dinov2Config(hidden_size=8, image_size=56, patch_size=14))
    with torch.no_grad():
        embeddings.position_embeddings.copy_(random(1, 17, 8))
        expected = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 6 * 9, 8), 6 * 14, 9 * 14)
        result = run("resize_pos_embed", embeddings.position_embeddings, (6, 9), prefix=1, mode="plain")
    assert torch.equal(result, expected)


def linear(values, size):
    return np.interp(np.linspace(0, len(values) - 1, size), np.arange(len(values)), values)


def test_big_vision_is_linear_between_grid_points_with_corners_on_corners():
    table = random(16, 2)
    result = run("resize_pos_embed", table, (7, 6), mode="big_vision").reshape(7, 6, 2).numpy()
    rows = np.apply_along_axis(linear, 0, table.reshape(4, 4, 2).numpy(), 7)
    assert np.allclose(result, np.apply_along_axis(linear, 1, rows, 6), atol=1e-5)


def test_an_equal_grid_passes_untouched_and_is_its_own_inverse():
    table = random(1, 17, 4)
    made = make_op("resize_pos_embed", (4, 1))
    assert made.run((table,))[0] is table
    assert made.inverse((TensorSpec([1, 17, 4], "F32"),)) == made
    assert make_op("resize_pos_embed", (5, 1)).inverse((TensorSpec([1, 17, 4], "F32"),)) is None
    assert made.inverse() is None


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        ([1, 197, 4], {"grid": 16}, "are 197, no square; give old_grid=[rows, columns]; prefix=1 leaves 14 x 14"),
        ([1, 13, 4], {"grid": 16, "prefix": 1, "old_grid": (3, 3)}, "are 12, not 3 x 3"),
        ([2, 197, 4], {"grid": 16, "prefix": 1}, "[tokens, width] or [1, tokens, width]"),
        ([1, 1, 4], {"grid": 16, "prefix": 1}, "are 0, no square"),
        ([1, 1, 4], {"grid": 16, "prefix": 5}, "are -4, no square"),
    ],
)
def test_tokens_that_make_no_grid_are_told_what_would_settle_it(shape, arguments, text):
    with pytest.raises(OpError) as caught:
        make_op("resize_pos_embed", (), arguments).infer((TensorSpec(shape, "F32"),))
    assert text in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bicubic_bias_table_is_resized_as_an_image_and_its_extra_rows_stay(dtype):
    table = random(7 * 9 + 3, 5, dtype=dtype)
    result = run("resize_rel_pos_bias", table, (6, 4), extra=3, old_window=(4, 5))
    expected = as_tokens(interpolate(as_image(table[:63].float(), 7, 9), size=(11, 7), mode="bicubic"))[0].to(dtype)
    assert torch.equal(result, torch.cat([expected, table[63:]]))


def offsets(reach):
    return torch.arange(-reach, reach + 1, dtype=torch.float64)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (14, 16), (5, 9), (12, 7)])
def test_a_geometric_bias_table_is_a_cubic_spline_over_offsets_on_a_geometric_progression(old, new):
    # What tells: a not-a-knot spline gives back a cubic as it is, so a table that holds one at the progression's points
    # must hold it at 0, ±1, ±2, ... afterwards.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    steps = np.cumsum([q**k for k in range(old - 1)])
    at = torch.tensor([*-steps[::-1], 0.0, *steps])

    def cubic(x, y):
        x, y = x / new, y / new
        return 1 + x - 2 * x**2 + x**3 * y + 0.5 * y**3 - x * y

    table = cubic(at[:, None], at[None, :]).reshape(-1, 1)
    result = run("resize_rel_pos_bias", table, new, mode="geometric")
    reach = offsets(new - 1).clamp(float(at[0]), float(at[-1]))
    assert torch.allclose(result, cubic(reach[:, None], reach[None, :]).reshape(-1, 1), atol=1e-9)


def test_a_geometric_bias_table_agrees_with_scipys_spline():
    # BEiT's fine-tuning script through scipy 1.17's RectBivariateSpline (the same FITPACK as its interp2d).
    table = torch.tensor([[math.sin(1.7 * i)] for i in range(49)], dtype=torch.float64)
    result = run("resize_rel_pos_bias", table, 5, mode="geometric").reshape(9, 9)
    assert torch.allclose(result[0, :4], torch.tensor(SCIPY, dtype=torch.float64), atol=1e-6)


SCIPY = [1.36e-06, 1.0829486, 0.79643455, -0.25554089]


def test_windows_that_the_table_does_not_show_are_asked_for():
    for rows, arguments, text in [
        (
            172,
            {"window": 4},
            "give old_window=[rows, columns] or another extra (3 where a class token has its own rows)",
        ),
        (16, {"window": 4}, "(2n-1)**2"),
        (25, {"window": 4, "old_window": (2, 3)}, "not 3 x 5"),
        (9, {"window": 4, "mode": "geometric"}, "4 offsets or more"),
    ]:
        with pytest.raises(OpError) as caught:
            make_op("resize_rel_pos_bias", (), arguments).infer((TensorSpec([rows, 2], "F32"),))
        assert text in str(caught.value)
