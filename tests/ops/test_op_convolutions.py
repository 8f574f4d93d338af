from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, conv3d, interpolate

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec


def run(name, tensor, *args, **keywords):
    (result,) = make_op(name, args, keywords).run((tensor,))
    return result


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_timms_rule_sums_for_one_channel_and_otherwise_repeats_cuts_and_scales():
    kernel = random(4, 3, 2, 2)
    assert torch.equal(run("adapt_input_conv", kernel, 1), kernel.sum(1, keepdim=True))
    assert run("adapt_input_conv", kernel, 3) is kernel
    assert torch.equal(run("adapt_input_conv", kernel, 2), kernel[:, :2] * (3 / 2))
    assert torch.equal(run("adapt_input_conv", kernel, 7), kernel.repeat(1, 3, 1, 1)[:, :7] * (3 / 7))


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 6, 8])
def test_a_repeated_kernel_answers_a_repeated_image_as_before(channels):
    kernel, image = random(4, 3, 2, 2), random(1, 3, 5, 5)
    turn = [i % 3 for i in range(channels)]
    adapted = run("adapt_input_conv", kernel, channels, "repeat")
    expected = conv2d(image[:, : min(3, channels)], kernel[:, : min(3, channels)])
    assert torch.allclose(conv2d(image[:, turn], adapted), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_summed_kernel_answers_a_grey_image_as_before(channels):
    kernel, grey = random(4, 3, 2, 2), random(1, 1, 5, 5)
    adapted = run("adapt_input_conv", kernel, channels, "sum")
    expected = conv2d(grey.expand(-1, 3, -1, -1), kernel)
    assert torch.allclose(conv2d(grey.expand(-1, channels, -1, -1), adapted), expected, atol=1e-5)


def test_the_mean_stands_in_each_new_channel():
    kernel = random(4, 3, 2, 2).bfloat16()
    adapted = run("adapt_input_conv", kernel, 5, "mean")
    assert torch.equal(adapted, kernel.float().mean(1, keepdim=True).bfloat16().expand(4, 5, 2, 2))


def test_new_channels_of_zero_leave_the_old_bits_and_can_be_cut_again():
    kernel = random(4, 3, 2, 2)
    made = make_op("adapt_input_conv", (5, "zero_new"))
    grown = made.run((kernel,))[0]
    assert torch.equal(grown[:, :3], kernel) and not grown[:, 3:].any()
    assert torch.equal(made.inverse((TensorSpec([4, 3, 2, 2], "F32"),)).run((grown,))[0], kernel)
    grown[0, 4, 0, 0] = -0.0
    with pytest.raises(OpError, match="channels 3 to 4 are not zero"):
        run("adapt_input_conv", grown, 3, "zero_new")


@pytest.mark.parametrize("mode", ["timm", "flexivit"])
@pytest.mark.parametrize("size", [(6, 6), (8, 5), (12, 9)])
def test_where_the_patch_grows_a_resized_patch_gives_the_old_embedding(mode, size):
    kernel, patch = random(6, 3, 4, 5), random(10, 3, 4, 5)
    how = {"mode": "bicubic", "antialias": True} if mode == "timm" else {"mode": "bilinear"}
    resized = interpolate(patch, size=size, **how)
    embedded = conv2d(resized, run("resize_patch_embed", kernel, size, mode))
    assert torch.allclose(embedded, conv2d(patch, kernel), atol=1e-4)


def test_where_the_patch_shrinks_the_kernel_is_the_least_squares_one():
    kernel = random(2, 1, 6, 6)
    units = torch.eye(36).reshape(36, 1, 6, 6)
    resize = interpolate(units, size=(4, 4), mode="bicubic", antialias=True).flatten(1)
    best = torch.linalg.lstsq(resize, kernel.flatten(1).T, driver="gelsd").solution
    assert torch.allclose(run("resize_patch_embed", kernel, 4).flatten(1).T, best, atol=1e-4)


def test_a_patch_of_equal_size_passes_untouched():
    kernel = random(2, 3, 4, 4)
    made = make_op("resize_patch_embed", (4,))
    assert made.run((kernel,))[0] is kernel
    assert made.inverse((TensorSpec([2, 3, 4, 4], "F32"),)) == made


def test_an_averaged_kernel_answers_a_still_video_as_the_image():
    kernel, image = random(4, 3, 2, 2), random(1, 3, 5, 5)
    video = image[:, :, None].expand(-1, -1, 3, -1, -1)
    answer = conv3d(video, run("inflate", kernel, 3))
    assert torch.allclose(answer[:, :, 0], conv2d(image, kernel), atol=1e-5)


def test_a_centred_kernel_looks_at_the_middle_frame_alone():
    kernel = random(4, 3, 2, 2)
    inflated = run("inflate", kernel, 3, "center")
    assert torch.equal(inflated[:, :, 1], kernel)
    assert not inflated[:, :, 0].any() and not inflated[:, :, 2].any()


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [("adapt_input_conv", 4, [8, 3]), ("resize_patch_embed", 8, [8, 3, 4]), ("inflate", 3, [8, 3, 2, 2, 2])],
)
def test_what_is_no_kernel_is_refused_from_the_header(name, argument, shape):
    with pytest.raises(OpError, match="wants a kernel of"):
        make_op(name, (argument,)).infer((TensorSpec(shape, "F32"),))
