"""Vision models built here, converted by the recipes and run: both codebases' networks agree."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, convert, noisy
from reference_vision import Basic, Bottleneck, ConvNeXt, ResNet, ViT, in_paddle
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import ckptsurgery as cs

CLASSES = 5


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_vit_with_fused_qkv(image: torch.Tensor) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=CLASSES, layer_norm_eps=1e-6,
    )  # fmt: skip
    timm = noisy(ViT(32, 4, 64, layers=2, image=32, patch=8, classes=CLASSES))
    way = cs.load_recipe("vit/timm_to_hf").then(cs.load_recipe("vit/hf_to_hf5"))
    hf = convert(timm, way, ViTForImageClassification(config))
    assert_parity(hf(image).logits, timm(image))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnet_with_its_statistics(image: torch.Tensor, kind: str) -> None:
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type=kind, num_labels=CLASSES)
    timm = noisy(ResNet(Basic if kind == "basic" else Bottleneck, 16, [32, 64], 2, CLASSES))
    hf = convert(timm, cs.load_recipe("resnet/tv_to_hf"), ResNetForImageClassification(config))
    assert_parity(hf(image).logits, timm(image))


@torch.no_grad()
def test_resnet_in_paddles_layout(image: torch.Tensor) -> None:
    torchvision = noisy(ResNet(Basic, 16, [32, 64], 2, CLASSES))
    paddle = in_paddle(ResNet(Basic, 16, [32, 64], 2, CLASSES))
    convert(torchvision, cs.load_recipe("resnet/tv_to_paddle"), paddle)
    assert_parity(paddle(image), torchvision(image))


@torch.no_grad()
def test_convnext_through_its_authors_layout(image: torch.Tensor) -> None:
    config = ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[2, 1], num_labels=CLASSES, layer_norm_eps=1e-6)
    timm = noisy(ConvNeXt([16, 32], [2, 1], CLASSES))
    way = cs.load_recipe("convnext/fb_to_timm").inverse().then(cs.load_recipe("convnext/fb_to_hf"))
    hf = ConvNextForImageClassification(config)
    convert(timm, way, hf)
    assert_parity(hf(image).logits, timm(image))
