"""Small networks that compute the same from weights under meaningless names, registered in any order.

A program is a list of steps over canonical modules. A network runs a program; where its modules are registered, how
they are called, what is fused and which branch runs first is drawn anew for each network.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Program", "ProgramNet", "drawn_program"]

_PARTS = {"attention": ("q", "k", "v"), "gated": ("gate", "up")}


@dataclass(frozen=True)
class Step:
    """One step: its kind, the names of its canonical modules, and sizes.

    Args:
        kind: what is computed; a method of `ProgramNet`.
        name: the prefix of its canonical modules.
        width, inner: sizes of its input and of what is inside.
    """

    kind: str
    name: str
    width: int
    inner: int = 0


@dataclass(frozen=True)
class Program:
    """Steps in their order; `image` inputs are `[n, c, h, w]`, others `[n, t, width]` or token numbers."""

    steps: tuple[Step, ...]
    image: bool
    tokens: bool
    width: int

    def inputs(self, seed: int) -> Tensor:
        """What the networks are called with."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(0, 11, (2, 5), generator=generator)
        shape = (2, 3, 8, 8) if self.image else (2, 5, self.width)
        return torch.randn(shape, generator=generator)


def drawn_program(draw: random.Random) -> Program:
    """A program of some blocks."""
    image = draw.random() < 0.35
    width = draw.choice([6, 8])
    steps: list[Step] = []
    tokens = not image and draw.random() < 0.5
    if image:
        steps.append(Step("stem", "stem", 3, width))
        for n in range(draw.randint(2, 4)):
            kind = draw.choice(["basic", "basic", "down", "bottleneck", "separable"])
            steps.append(Step(kind, f"s{n}", width, 2 * width if kind == "down" else width))
            width = steps[-1].inner
        steps.append(Step("pooled", "head", width, 4))
        return Program(tuple(steps), image, tokens, width)
    if tokens:
        steps.append(Step("embedded", "embed", width))
    kinds = ["attention", "attention", "mlp", "gated", "branches", "line", "scaled"]
    listed = [draw.choice(kinds) for _ in range(draw.randint(3, 6))]
    for n, kind in enumerate(listed):
        steps.append(Step(kind, f"s{n}", width, width if draw.random() < 0.6 else 2 * width))
    if draw.random() < 0.4:
        steps.insert(len(steps) // 2, Step("line", "shared", width, width))
        steps.append(Step("line", "shared", width, width))
    if draw.random() < 0.6:
        steps.append(Step("normed", "last", width))
    steps.append(Step("tied" if tokens and draw.random() < 0.5 else "head", "head", width, 11 if tokens else 4))
    return Program(tuple(steps), image, tokens, width)


class ProgramNet(nn.Module):
    """A program with its own names, order and fusing.

    Args:
        program: what it computes.
        draw: decides names and order.
        fuse: whether parts that read the same tensor are one matrix.
        late: whether the second of two branches runs first.
    """

    def __init__(self, program: Program, draw: random.Random, fuse: bool, late: bool) -> None:
        super().__init__()
        self.program, self.fuse, self.late = program, fuse, late
        self.orders = {s.name: draw.sample(range(3), 3) for s in program.steps}
        made: dict[str, nn.Module] = {}
        bare: dict[str, Tensor] = {}
        for step in program.steps:
            for name, build in self.built(step).items():
                if name not in made and name not in bare:
                    built = build()
                    (made if isinstance(built, nn.Module) else bare)[name] = built
        letters = [a + b for a in "bcdfghklmn" for b in "aeiouxyz"]
        draw.shuffle(letters)
        order = [*made, *bare]
        draw.shuffle(order)
        self.paths = dict(zip(order, letters))
        nests = [nn.Module() for _ in range(draw.randint(0, 3))]
        for name in order:
            place = draw.randrange(len(nests) + 1)
            holder = self if place == len(nests) else nests[place]
            if name in made:
                holder.add_module(self.paths[name], made[name])
            else:
                holder.register_parameter(self.paths[name], nn.Parameter(bare[name]))
            if holder is not self:
                self.paths[name] = f"z{place}.{self.paths[name]}"
        for place, nest in enumerate(nests):
            self.add_module(f"z{place}", nest)
        if any(s.kind == "tied" for s in program.steps) and draw.random() < 0.5:
            self.register_parameter(letters[-1], self.of("embed.m").weight)

    def of(self, name: str) -> Any:
        """A canonical module, or a parameter."""
        found: Any = self
        for part in self.paths[name].split("."):
            found = getattr(found, part)
        return found

    def built(self, s: Step) -> Mapping[str, Callable[[], nn.Module | Tensor]]:
        d, h = s.width, s.inner
        lin = lambda a, b: lambda: nn.Linear(a, b)  # noqa: E731
        conv = lambda a, b, k, g=1: lambda: nn.Conv2d(a, b, k, padding=k // 2, groups=g, bias=False)  # noqa: E731
        norm, bn = (lambda n: lambda: nn.LayerNorm(n)), (lambda n: lambda: nn.BatchNorm2d(n))
        table: dict[str, Mapping[str, Callable[[], nn.Module | Tensor]]] = {
            "stem": {"c": conv(3, h, 3), "b": bn(h)},
            "basic": {"c1": conv(d, h, 3), "b1": bn(h), "c2": conv(h, h, 3), "b2": bn(h)},
            "down": {"c1": conv(d, h, 3), "b1": bn(h), "c2": conv(h, h, 3), "b2": bn(h),
                     "c3": conv(d, h, 1), "b3": bn(h)},
            "bottleneck": {"c1": conv(d, h, 1), "b1": bn(h), "c2": conv(h, h, 3), "b2": bn(h),
                           "c4": conv(h, h, 1), "b4": bn(h)},
            "separable": {"c1": conv(d, h, 3, d), "c2": conv(h, h, 1), "b2": bn(h)},
            "pooled": {"m": lin(d, h)},
            "embedded": {"m": lambda: nn.Embedding(11, d), "pos": lambda: torch.randn(5, d)},
            "mlp": {"n": norm(d), "a": lin(d, h), "z": lin(h, d)},
            "branches": {"a": lin(d, d), "z": lin(d, d), "n": norm(d)},
            "line": {"m": lin(d, d)},
            "normed": {"m": norm(d)},
            "scaled": {"a": lin(d, d), "gamma": lambda: torch.randn(d), "n": norm(d)},
            "head": {"m": lin(d, h)},
            "tied": {},
        }  # fmt: skip
        if s.kind == "attention":
            parts = {"qkv": lin(d, 3 * d)} if self.fuse else {p: lin(d, d) for p in "qkv"}
            found: Mapping[str, Any] = {"n": norm(d), **parts, "o": lin(d, d)}
        elif s.kind == "gated":
            parts = {"gu": lin(d, 2 * h)} if self.fuse else {p: lin(d, h) for p in ("gate", "up")}
            found = {"n": norm(d), **parts, "down": lin(h, d)}
        else:
            found = table[s.kind]
        return {f"{s.name}.{k}": v for k, v in found.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Run the steps."""
        for step in self.program.steps:
            x = getattr(self, "_" + step.kind)(step.name, x)
        return x

    def parts(self, name: str, kind: str, x: Tensor) -> list[Tensor]:
        """What several projections make of one tensor, in canonical order."""
        names = _PARTS[kind]
        order = [n for n in self.orders[name] if n < len(names)]
        if self.fuse:
            chunks = self.of(f"{name}.{'qkv' if kind == 'attention' else 'gu'}")(x).chunk(len(names), -1)
            made = dict(zip(order, chunks))
        else:
            made = {n: self.of(f"{name}.{names[n]}")(x) for n in order}
        return [made[n] for n in range(len(names))]

    def canonical(self) -> dict[str, tuple[str, list[int]]]:
        """Canonical module -> the path that holds it, and its place among the parts where they are fused."""
        found: dict[str, tuple[str, list[int]]] = {}
        for name, path in self.paths.items():
            head, _, last = name.rpartition(".")
            if last in ("qkv", "gu"):
                parts = _PARTS["attention" if last == "qkv" else "gated"]
                order = [n for n in self.orders[head] if n < len(parts)]
                for place, n in enumerate(order):
                    found[f"{head}.{parts[n]}"] = path, [place, len(order)]
            else:
                found[name] = path, [0, 1]
        return found

    def _attention(self, n: str, x: Tensor) -> Tensor:
        q, k, v = self.parts(n, "attention", self.of(n + ".n")(x))
        return x + self.of(n + ".o")(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)

    def _gated(self, n: str, x: Tensor) -> Tensor:
        gate, up = self.parts(n, "gated", self.of(n + ".n")(x))
        return x + self.of(n + ".down")(nn.functional.silu(gate) * up)

    def _mlp(self, n: str, x: Tensor) -> Tensor:
        return x + self.of(n + ".z")(torch.tanh(self.of(n + ".a")(self.of(n + ".n")(x))))

    def _branches(self, n: str, x: Tensor) -> Tensor:
        one, two = self._pair(lambda: self.of(n + ".a")(x), lambda: torch.tanh(self.of(n + ".z")(x)))
        return self.of(n + ".n")(one + two)

    def _pair(self, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Sequence[Tensor]:
        """Two branches; on one side the second runs first."""
        if self.late:
            made = second()
            return first(), made
        return first(), second()

    def _line(self, n: str, x: Tensor) -> Tensor:
        return torch.tanh(self.of(n + ".m")(x))

    def _normed(self, n: str, x: Tensor) -> Tensor:
        return self.of(n + ".m")(x)

    def _scaled(self, n: str, x: Tensor) -> Tensor:
        return x + self.of(n + ".gamma") * self.of(n + ".a")(self.of(n + ".n")(x))

    def _embedded(self, n: str, x: Tensor) -> Tensor:
        return self.of(n + ".m")(x) + self.of(n + ".pos")

    def _head(self, n: str, x: Tensor) -> Tensor:
        return self.of(n + ".m")(x)

    def _tied(self, n: str, x: Tensor) -> Tensor:
        return x @ self.of("embed.m").weight.T

    def _stem(self, n: str, x: Tensor) -> Tensor:
        return torch.relu(self.of(n + ".b")(self.of(n + ".c")(x)))

    def _basic(self, n: str, x: Tensor) -> Tensor:
        h = torch.relu(self.of(n + ".b1")(self.of(n + ".c1")(x)))
        return torch.relu(x + self.of(n + ".b2")(self.of(n + ".c2")(h)))

    def _down(self, n: str, x: Tensor) -> Tensor:
        def main() -> Tensor:
            h = torch.relu(self.of(n + ".b1")(self.of(n + ".c1")(x)))
            return self.of(n + ".b2")(self.of(n + ".c2")(h))

        one, two = self._pair(main, lambda: self.of(n + ".b3")(self.of(n + ".c3")(x)))
        return torch.relu(one + two)

    def _bottleneck(self, n: str, x: Tensor) -> Tensor:
        h = torch.relu(self.of(n + ".b1")(self.of(n + ".c1")(x)))
        h = torch.relu(self.of(n + ".b2")(self.of(n + ".c2")(h)))
        return torch.relu(x + self.of(n + ".b4")(self.of(n + ".c4")(h)))

    def _separable(self, n: str, x: Tensor) -> Tensor:
        return torch.relu(self.of(n + ".b2")(self.of(n + ".c2")(self.of(n + ".c1")(x))))

    def _pooled(self, n: str, x: Tensor) -> Tensor:
        return self.of(n + ".m")(x.mean((-1, -2)))
