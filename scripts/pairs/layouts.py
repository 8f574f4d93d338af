"""Layouts of one network: the same tensors under other names, fused, regrouped, turned, stacked or rounded.

A canonical network is a dict of tensors. A layout lists them as one codebase would. Two layouts of the same canonical
tensors are a source and a target, and what becomes of each element is known.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SCHEMES", "Layout", "Network", "drawn_layout", "drawn_network"]

Tensors = dict[str, Tensor]

SCHEMES = (
    {
        "layer": "model.layers.{i}.", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "qkv": "self_attn.qkv_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj", "gu": "mlp.gate_up_proj", "n1": "input_layernorm", "n2": "post_attention_layernorm",
        "router": "mlp.router", "expert": "mlp.experts.{e}.", "experts": "mlp.experts.", "embed": "model.embed_tokens",
        "pos": "model.embed_positions", "nf": "model.norm", "head": "lm_head", "weight": "weight", "bias": "bias",
    },
    {
        "layer": "h.{i}.", "q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.wo", "qkv": "attn.c_attn",
        "gate": "ffn.w1", "up": "ffn.w3", "down": "ffn.w2", "gu": "ffn.w13", "n1": "ln_1", "n2": "ln_2",
        "router": "ffn.router", "expert": "ffn.experts.{e}.", "experts": "ffn.experts.", "embed": "wte", "pos": "wpe",
        "nf": "ln_f", "head": "output", "weight": "weight", "bias": "bias",
    },
    {
        "layer": "decoder/block_{i}/", "q": "attention/query", "k": "attention/key", "v": "attention/value",
        "o": "attention/out", "qkv": "attention/qkv", "gate": "mlp/wi_0", "up": "mlp/wi_1", "down": "mlp/wo",
        "gu": "mlp/wi", "n1": "pre_attention_norm", "n2": "pre_mlp_norm", "router": "moe/router",
        "expert": "moe/expert_{e}/", "experts": "moe/", "embed": "decoder/token_embedder",
        "pos": "decoder/position_embedder", "nf": "decoder/final_norm", "head": "decoder/logits", "weight": "kernel",
        "bias": "bias",
    },
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Sizes of a network, and what of it exists."""

    layers: int
    width: int
    heads: int
    groups: int
    head: int
    inner: int
    experts: int
    biases: bool
    tied: bool
    constant: bool

    def tensors(self, fill: Callable[[str, tuple[int, ...]], Tensor]) -> Tensors:
        """The canonical tensors, filled by name and shape."""
        return {name: fill(name, shape) for name, shape in self.shapes()}

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every canonical tensor with its shape, `[out, in]`."""
        d, rows = self.width, {"q": self.heads * self.head, "k": self.groups * self.head, "v": self.groups * self.head}
        yield from (("embed", (3 * d, d)), ("pos", (d + 4, d)), ("nf.w", (d,)), ("nf.b", (d,)))
        if not self.tied:
            yield "head", (3 * d, d)
        for i in range(self.layers):
            for part, n in rows.items():
                yield f"{i}.{part}.w", (n, d)
                if self.biases:
                    yield f"{i}.{part}.b", (n,)
            yield f"{i}.o.w", (d, rows["q"])
            yield from ((f"{i}.{n}.{x}", (d,)) for n in ("n1", "n2") for x in "wb")
            if self.experts:
                yield f"{i}.router.w", (self.experts, d)
            for e in range(self.experts) if self.experts else (-1,):
                yield f"{i}.{e}.gate.w", (self.inner, d)
                yield f"{i}.{e}.up.w", (self.inner, d)
                yield f"{i}.{e}.down.w", (d, self.inner)


@dataclass(frozen=True)
class Layout:
    """How one codebase lists a network.

    Args:
        names: words for the modules; the rows of `SCHEMES`, or words without a meaning.
        attention: `"separate"`, `"fused"`, `"grouped"`, `"heads"`, `"kernels"` or `"ragged kernels"`.
        rotary: whether rows of queries and keys lie in pairs.
        order: of the query heads: `"plain"`, `"turned"` (the groups within the heads) or `"shuffled"`.
        feed: `"separate"`, `"gate up"`, `"up gate"`, `"interleaved"` or `"leading"`.
        turned: whether matrices are `[in, out]`.
        stacked: whether experts are one tensor; with `feed` not separate, gate and up are too.
        scanned: whether all layers are one tensor.
        head: whether tied output weights are listed.
        dtype: of every tensor.
    """

    names: Mapping[str, str]
    attention: str
    rotary: bool
    order: str
    feed: str
    turned: bool
    stacked: bool
    scanned: bool
    head: bool
    dtype: torch.dtype

    @property
    def nameless(self) -> bool:
        """Whether the words mean nothing."""
        return all(self.names["q"] != scheme["q"] for scheme in SCHEMES)

    def of(self, net: Network, tensors: Tensors) -> Tensors:
        """The tensors as this codebase lists them; integers keep their dtype."""
        found: Tensors = {}
        w, b = self.names["weight"], self.names["bias"]
        sep = "/" if "/" in self.names["layer"] else "."
        found[self.names["embed"] + sep + w] = tensors["embed"]
        found[self.names["pos"] + sep + w] = tensors["pos"]
        layers = [dict(self._layer(net, tensors, i, sep)) for i in range(net.layers)]
        if self.scanned:
            head = self.names["layer"].replace("{i}", "all")
            found |= {head + k: torch.stack([rows[k] for rows in layers]) for k in layers[0]}
        else:
            for i, rows in enumerate(layers):
                found |= {self.names["layer"].format(i=i) + k: t for k, t in rows.items()}
        found |= {f"{self.names['nf']}{sep}{n}": tensors[f"nf.{x}"] for n, x in ((w, "w"), (b, "b"))}
        if not net.tied or self.head:
            found[self.names["head"] + sep + w] = tensors["embed" if net.tied else "head"]
        cast = lambda t: t if t.dtype == torch.int64 else t.to(self.dtype)  # noqa: E731
        return {k: cast(t).contiguous() for k, t in found.items()}

    def _layer(self, net: Network, tensors: Tensors, i: int, sep: str) -> Iterator[tuple[str, Tensor]]:
        w, b = self.names["weight"], self.names["bias"]
        for n in ("n1", "n2"):
            yield f"{self.names[n]}{sep}{w}", tensors[f"{i}.{n}.w"]
            yield f"{self.names[n]}{sep}{b}", tensors[f"{i}.{n}.b"]
        for leaf, kind in ((w, "w"), (b, "b")) if net.biases else ((w, "w"),):
            parts = {p: self._rows(net, p, tensors[f"{i}.{p}.{kind}"]) for p in "qkv"}
            for name, tensor in self._attention(net, parts):
                yield f"{self.names[name]}{sep}{leaf}", tensor
        out = self._columns(net, tensors[f"{i}.o.w"])
        if self.attention == "kernels":
            yield f"{self.names['o']}{sep}{w}", out.T.reshape(net.heads, net.head, net.width)
        else:
            yield f"{self.names['o']}{sep}{w}", self._turn(out)
        if net.experts:
            yield f"{self.names['router']}{sep}{w}", self._turn(tensors[f"{i}.router.w"])
            rows = [dict(self._feed({p: tensors[f"{i}.{e}.{p}.w"] for p in ("gate", "up", "down")}))
                    for e in range(net.experts)]  # fmt: skip
            for name in rows[0]:
                if self.stacked:
                    yield (
                        f"{self.names['experts']}{_last(self.names[name])}{sep}{w}",
                        torch.stack([r[name] for r in rows]),
                    )
                    continue
                for e, row in enumerate(rows):
                    yield f"{self.names['expert'].format(e=e)}{_last(self.names[name])}{sep}{w}", row[name]
        else:
            for name, tensor in self._feed({p: tensors[f"{i}.-1.{p}.w"] for p in ("gate", "up", "down")}):
                yield f"{self.names[name]}{sep}{w}", tensor

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.turned and tensor.dim() == 2 else tensor

    def _rows(self, net: Network, part: str, tensor: Tensor) -> Tensor:
        """Rows in the order of this codebase."""
        shape, heads = tensor.shape, net.heads if part == "q" else net.groups
        if part == "q":
            tensor = self._heads(net, tensor)
        if self.rotary and part != "v":
            tensor = tensor.reshape(heads, 2, net.head // 2, *shape[1:]).transpose(1, 2)
        return tensor.reshape(shape)

    def _columns(self, net: Network, tensor: Tensor) -> Tensor:
        return self._heads(net, tensor.T.contiguous()).T

    def _heads(self, net: Network, tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if self.order == "turned":
            split = tensor.reshape(net.groups, net.heads // net.groups, net.head, *shape[1:])
            return split.transpose(0, 1).reshape(shape)
        if self.order == "shuffled":
            order = random.Random(net.heads).sample(range(net.heads), net.heads)
            return tensor.reshape(net.heads, net.head, *shape[1:])[order].reshape(shape)
        return tensor

    def _attention(self, net: Network, parts: Tensors) -> Iterator[tuple[str, Tensor]]:
        tail = parts["q"].shape[1:]
        if self.attention == "fused":
            yield "qkv", self._turn(torch.cat([*parts.values()]))
        elif self.attention == "grouped":
            rows = [t.reshape(net.groups, -1, *tail) for t in parts.values()]
            yield "qkv", self._turn(torch.cat(rows, 1).flatten(0, 1))
        elif self.attention == "heads":
            rows = [t.reshape(net.heads, 1, net.head, *tail) for t in parts.values()]
            yield "qkv", self._turn(torch.cat(rows, 1).reshape(-1, *tail))
        elif self.attention == "ragged kernels":
            yield "qkv", torch.cat([t.reshape(-1, net.head, *tail) for t in parts.values()])
        elif self.attention == "kernels":
            for p, t in parts.items():
                yield p, (t.T if tail else t).reshape(*tail, -1, net.head)
        else:
            for p, t in parts.items():
                yield p, self._turn(t)

    def _feed(self, parts: Tensors) -> Iterator[tuple[str, Tensor]]:
        gate, up = parts["gate"], parts["up"]
        if self.feed == "gate up":
            yield "gu", self._turn(torch.cat([gate, up]))
        elif self.feed == "up gate":
            yield "gu", self._turn(torch.cat([up, gate]))
        elif self.feed == "interleaved":
            yield "gu", self._turn(torch.stack([gate, up], 1).flatten(0, 1))
        elif self.feed == "leading":
            yield "gu", torch.stack([gate.T, up.T])
        else:
            yield "gate", self._turn(gate)
            yield "up", self._turn(up)
        yield "down", self._turn(parts["down"])


def _last(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def drawn_network(draw: random.Random) -> Network:
    """A network of random sizes; as many layers as experts, and as heads, now and then."""
    groups, times = draw.choice([(2, 1), (2, 2), (2, 3), (4, 1), (3, 2)])
    layers = draw.choice([2, 3, 3, 4])
    return Network(
        layers=layers, width=draw.choice([16, 20, 24]), heads=groups * times, groups=groups, head=draw.choice([4, 6]),
        inner=draw.choice([24, 28, 32]), experts=draw.choice([0, 0, layers, 2, 3, 4]), biases=draw.random() < 0.5,
        tied=draw.random() < 0.4, constant=draw.random() < 0.4,
    )  # fmt: skip


def drawn_layout(draw: random.Random, net: Network, side: int) -> Layout:
    """A layout of it; on the source's side (0) matrices lie plainly more often."""
    attention = ["separate", "separate", "fused", "grouped", "kernels", "ragged kernels"]
    attention += ["heads"] if net.heads == net.groups else []
    names = dict(draw.choice(SCHEMES)) if draw.random() < 0.7 else _nameless(draw)
    return Layout(
        names, draw.choice(attention), draw.random() < 0.4,
        draw.choice(["plain"] * 5 + ["turned", "turned", "shuffled"]),
        draw.choice(["separate", "separate", "gate up", "up gate", "interleaved", "leading"]), draw.random() < 0.3,
        draw.random() < 0.5, draw.random() < 0.12, draw.random() < 0.6,
        torch.float32 if side == 0 else draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    )  # fmt: skip


def _nameless(draw: random.Random) -> dict[str, str]:
    words = [a + b + c for a in "bdfgkz" for b in "aeiou" for c in "xzjq"]
    draw.shuffle(words)
    names = dict(zip(SCHEMES[0], words))
    names |= {"layer": names["layer"] + ".{i}.", "expert": names["expert"] + ".{e}.", "experts": names["experts"] + "."}
    return names
