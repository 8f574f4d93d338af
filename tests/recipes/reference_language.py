"""Small language models as other codebases lay them out, written from their papers for these tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def angles(length: int, size: int) -> Tensor:
    """Rotary angles [length, size / 2], base 10000."""
    return torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, size, 2) / size))


def rotate_pairs(x: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, as complex numbers; x is [batch, head, time, size]."""
    turn = torch.polar(torch.ones(()), angles(x.shape[-2], x.shape[-1]))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def rotate_halves(x: Tensor) -> Tensor:
    """Rotary embedding of the first half with the second."""
    angle = angles(x.shape[-2], x.shape[-1])
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with grouped keys and values; heads are merged again."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> Tensor:
    """[batch, time, count * size] -> [batch, count, time, size]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def linear(rows: int, columns: int) -> nn.Linear:
    """A linear layer without a bias."""
    return nn.Linear(rows, columns, bias=False)


class MetaAttention(nn.Module):
    """wq, wk, wv, wo; rotary pairs."""

    def __init__(self, width: int, q: int, kv: int) -> None:
        super().__init__()
        size = width // q
        self.q, self.kv = q, kv
        self.wq, self.wk, self.wv = linear(width, q * size), linear(width, kv * size), linear(width, kv * size)
        self.wo = linear(q * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.wq(x), self.q), heads(self.wk(x), self.kv), heads(self.wv(x), self.kv)
        return self.wo(attend(rotate_pairs(q), rotate_pairs(k), v))


class MetaFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = linear(width, hidden), linear(hidden, width), linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class MetaBlock(nn.Module):
    def __init__(self, width: int, hidden: int, q: int, kv: int) -> None:
        super().__init__()
        self.attention = MetaAttention(width, q, kv)
        self.feed_forward = MetaFeedForward(width, hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """Llama as Meta's reference lays it out."""

    def __init__(
        self, words: int, width: int, hidden: int, layers: int, q: int, kv: int, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(words, width)
        self.layers = nn.ModuleList(MetaBlock(width, hidden, q, kv) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.output = linear(width, words)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class FusedAttention(nn.Module):
    """qkv in one, [Q; K; V]; rotary halves."""

    def __init__(self, width: int, q: int, kv: int) -> None:
        super().__init__()
        self.q, self.kv, self.size = q, kv, width // q
        self.qkv = linear(width, (q + 2 * kv) * self.size)
        self.proj = linear(q * self.size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([n * self.size for n in (self.q, self.kv, self.kv)], dim=-1)
        return self.proj(attend(rotate_halves(heads(q, self.q)), rotate_halves(heads(k, self.kv)), heads(v, self.kv)))


class GatedMLP(nn.Module):
    """proj(silu(fc_1 x) * fc_2 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2, self.proj = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(functional.silu(self.fc_1(x)) * self.fc_2(x))


class Experts(nn.Module):
    """The best two experts of each token, weighted by a softmax over those two."""

    def __init__(self, width: int, hidden: int, count: int) -> None:
        super().__init__()
        self.gate = linear(width, count)
        self.experts = nn.ModuleList(GatedMLP(width, hidden) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.gate(x).topk(2, dim=-1)
        weights = torch.zeros_like(self.gate(x)).scatter(-1, chosen, best.softmax(-1))
        return sum(weights[..., n, None] * expert(x) for n, expert in enumerate(self.experts))


class LitBlock(nn.Module):
    def __init__(self, width: int, hidden: int, q: int, kv: int, experts: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.attn = FusedAttention(width, q, kv)
        self.mlp = Experts(width, hidden, experts) if experts else GatedMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LitGPT(nn.Module):
    """Llama, or Mixtral with experts, as litgpt lays it out."""

    def __init__(self, words: int, width: int, hidden: int, layers: int, q: int, kv: int, experts: int = 0) -> None:
        super().__init__()
        blocks = nn.ModuleList(LitBlock(width, hidden, q, kv, experts) for _ in range(layers))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(words, width), "h": blocks, "ln_f": RMSNorm(width)})
        self.lm_head = linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class NanoAttention(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, self.count) for t in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(attend(q, k, v))


class NanoMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))


class NanoBlock(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = NanoAttention(width, count), NanoMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """GPT-2 as nanoGPT lays it out: linear layers, the head tied to the embedding."""

    def __init__(self, words: int, width: int, layers: int, count: int, length: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(words, width),
                "wpe": nn.Embedding(length, width),
                "h": nn.ModuleList(NanoBlock(width, count) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = linear(width, words)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class PaddleLinear(nn.Module):
    """Paddle's Linear: its weight is [in, out]."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(rows, columns)), nn.Parameter(torch.zeros(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class PaddleAttention(nn.Module):
    """Paddle's MultiHeadAttention: q, k and v apart."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (PaddleLinear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(p(x), self.count) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PaddleLayer(nn.Module):
    """Paddle's TransformerEncoderLayer, norms behind, gelu."""

    def __init__(self, width: int, count: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = PaddleAttention(width, count)
        self.linear1, self.linear2 = PaddleLinear(width, hidden), PaddleLinear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(functional.gelu(self.linear1(x))))


class PaddleEncoder(nn.Module):
    """Paddle's TransformerEncoder."""

    def __init__(self, width: int, count: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PaddleLayer(width, count, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
