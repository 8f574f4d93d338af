"""Whisper as OpenAI lays it out, written from its paper for these tests; and weight_norm under its old names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Keys have no bias."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor | None = None, *, causal: bool = False) -> Tensor:
        seen = x if other is None else other
        q, k, v = (
            t.unflatten(-1, (self.count, -1)).transpose(1, 2) for t in (self.query(x), self.key(seen), self.value(seen))
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, count: int, *, cross: bool) -> None:
        super().__init__()
        self.attn, self.attn_ln = Attention(width, count), nn.LayerNorm(width)
        self.cross_attn = Attention(width, count) if cross else None
        self.cross_attn_ln = nn.LayerNorm(width) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, audio: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), causal=audio is not None)
        if self.cross_attn is not None and self.cross_attn_ln is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), audio)
        return x + self.mlp(self.mlp_ln(x))


class Encoder(nn.Module):
    def __init__(self, mels: int, width: int, count: int, layers: int, length: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, count, cross=False) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(mel)))).transpose(1, 2) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class Decoder(nn.Module):
    def __init__(self, words: int, width: int, count: int, layers: int, length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, count, cross=True) for _ in range(layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, audio: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, audio)
        return self.ln(x) @ self.token_embedding.weight.T


class Whisper(nn.Module):
    """Speech to text."""

    def __init__(self, mels: int, words: int, width: int, count: int, layers: int, audio: int, text: int) -> None:
        super().__init__()
        self.encoder = Encoder(mels, width, count, layers, audio)
        self.decoder = Decoder(words, width, count, layers, text)

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mel))


class OldWeightNorm(nn.Module):
    """A convolution whose weight is g · v / |v|, the norm over all but the last axis, as old checkpoints name it."""

    def __init__(self, width: int, size: int, groups: int) -> None:
        super().__init__()
        self.groups, self.padding = groups, size // 2
        self.weight_g = nn.Parameter(torch.ones(1, 1, size))
        self.weight_v = nn.Parameter(torch.ones(width, width // groups, size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        return functional.conv1d(x, weight, self.bias, padding=self.padding, groups=self.groups)
