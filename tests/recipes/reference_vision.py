"""Small vision models as timm lays them out, written from their papers for these tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FusedAttention(nn.Module):
    """qkv in one, [Q; K; V]."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.count, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, width: int, count: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = FusedAttention(width, count), MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self, width: int, count: int, hidden: int, layers: int, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(ViTBlock(width, count, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(len(image), -1, -1), self.patch_embed(image)), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def convolution(rows: int, columns: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without a bias that keeps the size but for its stride."""
    return nn.Conv2d(rows, columns, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, each with its norm; the shortcut is a convolution where the shape changes."""

    def __init__(self, rows: int, columns: int, stride: int) -> None:
        super().__init__()
        inner = columns // 4
        self.conv1, self.bn1 = convolution(rows, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = convolution(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = convolution(inner, columns, 1), nn.BatchNorm2d(columns)
        changes = stride > 1 or rows != columns
        self.downsample = (
            nn.Sequential(convolution(rows, columns, 1, stride), nn.BatchNorm2d(columns)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Basic(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    def __init__(self, rows: int, columns: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(rows, columns, 3, stride), nn.BatchNorm2d(columns)
        self.conv2, self.bn2 = convolution(columns, columns, 3), nn.BatchNorm2d(columns)
        changes = stride > 1 or rows != columns
        self.downsample = (
            nn.Sequential(convolution(rows, columns, 1, stride), nn.BatchNorm2d(columns)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network; the stages after the first halve the image."""

    def __init__(self, block: type[nn.Module], stem: int, widths: list[int], depth: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(3, stem, 7, 2), nn.BatchNorm2d(stem)
        self.stages = len(widths)
        for n, (rows, columns) in enumerate(zip([stem, *widths], widths)):
            first = block(rows, columns, 2 if n else 1)
            self.add_module(
                f"layer{n + 1}", nn.Sequential(first, *(block(columns, columns, 1) for _ in range(depth - 1)))
            )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for n in range(self.stages):
            x = self.get_submodule(f"layer{n + 1}")(x)
        return self.fc(x.mean((2, 3)))


class PaddleBatchNorm(nn.Module):
    """Paddle's BatchNorm2D: `_mean`, `_variance`, no count of batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("_mean", torch.zeros(width))
        self.register_buffer("_variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self._mean, self._variance, self.weight, self.bias)


class PaddleLinear(nn.Module):
    """Paddle's Linear: its weight is [in, out]."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(rows, columns)), nn.Parameter(torch.zeros(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def in_paddle(model: nn.Module) -> nn.Module:
    """The model with Paddle's own layers in place of torch's."""
    for name, module in list(model.named_modules()):
        made: nn.Module
        if isinstance(module, nn.BatchNorm2d):
            made = PaddleBatchNorm(module.num_features)
        elif isinstance(module, nn.Linear):
            made = PaddleLinear(module.in_features, module.out_features)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    return model


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, 4 * width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.mlp(self.norm(self.conv_dw(x).movedim(1, -1)))
        return x + y.movedim(-1, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels of [batch, channel, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtStage(nn.Module):
    def __init__(self, rows: int, columns: int, depth: int, first: bool) -> None:
        super().__init__()
        smaller = nn.Sequential(ChannelNorm(rows, eps=1e-6), nn.Conv2d(rows, columns, 2, stride=2))
        self.downsample = nn.Identity() if first else smaller
        self.blocks = nn.Sequential(*(ConvNeXtBlock(columns) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """ConvNeXt with its head: mean, norm, linear."""

    def __init__(self, widths: list[int], depths: list[int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))
        pairs = zip([widths[0], *widths], widths, depths)
        self.stages = nn.Sequential(*(ConvNeXtStage(a, b, d, n == 0) for n, (a, b, d) in enumerate(pairs)))
        head = {"norm": nn.LayerNorm(widths[-1], eps=1e-6), "fc": nn.Linear(widths[-1], classes)}
        self.head = nn.ModuleDict(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.head["norm"](self.stages(self.stem(x)).mean((2, 3))))
