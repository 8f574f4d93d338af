"""One network written twice, as two codebases would: other names, another layout of attention, another head.

`Pretrained` keeps query, key and value in one fused projection; `Student` keeps them apart. With the same numbers
inside they compute the same features, and nothing but the mapping between their names relates them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

__all__ = ["Pretrained", "Speller", "Student"]

_PATCHES, _PIXELS = 16, 4  # an 8 x 8 image is 4 x 4 patches of 2 x 2 pixels


def _patches(images: Tensor) -> Tensor:
    return images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, _PATCHES, _PIXELS)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class _FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _FusedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Pretrained(nn.Module):
    """The network as its first authors wrote it: `blocks.0.attn.qkv.weight`."""

    def __init__(self, classes: int = 6, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Linear(_PIXELS, width)
        self.pos = nn.Parameter(torch.randn(1, _PATCHES, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """`[n, width]` of `[n, 64]` images."""
        x = self.patch(_patches(images)) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(dim=1)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[n, classes]`."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


class _SplitAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        return self.output(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _SplitAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp["down"](gelu(self.mlp["up"](self.mlp_norm(x))))  # type: ignore[no-any-return]


class Student(nn.Module):
    """The same network in another codebase: `encoder.layers.0.attention.query.weight`, and a head of its own."""

    def __init__(self, classes: int = 4, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"patches": nn.Linear(_PIXELS, width), "positions": nn.Embedding(_PATCHES, width)})
        nn.init.normal_(self.embed["positions"].weight, std=0.02)  # type: ignore[arg-type]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(width, heads) for _ in range(depth))})
        self.encoder["norm"] = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """`[n, width]` of `[n, 64]` images."""
        x = self.embed["patches"](_patches(images)) + self.embed["positions"].weight
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.encoder["norm"](x).mean(dim=1)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[n, classes]`."""
        return self.classifier(self.features(images))  # type: ignore[no-any-return]


class Speller(nn.Module):
    """A language model over letters whose head is its embedding: `head.weight is embed.weight`."""

    def __init__(self, letters: int = 27, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, letters, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        """Logits `[n, length, letters]` of `[n, length]` letters."""
        return self.head(self.mix(self.embed(text))[0])  # type: ignore[no-any-return]
