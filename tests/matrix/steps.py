"""The steps of the matrix: tensors, rules, and what the rules make of them in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import einops
import torch

import ckptsurgery as cs

State = dict[str, torch.Tensor]
Judge = Callable[[State], State]

# Shapes have edges inside of 1 MiB regions and chunks, of panels, and of the 2^17 elements that are gathered together.
LARGE = (601, 703)  # 1.6 MiB of float32
ROWS = {"q": 37, "k": 11}


@dataclass(frozen=True)
class Step:
    """What becomes of some tensors.

    Args:
        shapes: source key -> shape and dtype.
        rules: lines of the mapping language.
        made: the same in plain torch.
        ties: target key -> the target key it shares its tensor with.
    """

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    rules: tuple[str, ...]
    made: Judge
    ties: dict[str, str] = field(default_factory=dict)


F32, BF16, F16, F64, I64, FP8 = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.float8_e4m3fn,
)


def numbered(*parts: tuple[str, tuple[int, ...], torch.dtype]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Each part in three layers."""
    return {key.format(i=i): (shape, dtype) for i in range(3) for key, shape, dtype in parts}


def copied(s: State) -> State:
    return {f"copy.{k.removeprefix('c.')}": t for k, t in s.items() if k.startswith("c.")}


def turned(s: State) -> State:
    made = {f"turn.{i}.w": s[f"t.{i}.w"].T for i in range(3)} | {"turn.large": s["t.large"].T}
    return made | {f"turn.{i}.conv": s[f"t.{i}.conv"].permute(2, 0, 1) for i in range(3)}


def split(s: State) -> State:
    parts = {i: s[f"s.{i}.qkv"].chunk(3) for i in range(3)}
    made = {f"split.{i}.{p}": part for i in range(3) for p, part in zip("qkv", parts[i])}
    return made | {f"split.large.{p}": part.T for p, part in zip("ab", s["s.large"].chunk(2))}


def fused(s: State) -> State:
    made = {f"fuse.{i}.qk": torch.cat([s[f"f.{i}.q"], s[f"f.{i}.k"]]) for i in range(3)}
    return made | {"fuse.large": torch.cat([s["f.large.a"].T, s["f.large.b"].T])}


def mixed(s: State) -> State:
    made = {f"mix.{i}": einops.rearrange([s[f"g.{i}.a"], s[f"g.{i}.b"]], "p f d -> (f p) d") for i in range(3)}
    halves = [[s[f"g.two.{p}.{e}"] for e in range(2)] for p in "ab"]
    made["mix.two"] = einops.rearrange([torch.stack(half) for half in halves], "p e y x -> x (p y e)")
    return made | {"mix.uneven": torch.cat([s[f"g.uneven.{p}"] for p in "qk"]).T}


def stacked(s: State) -> State:
    experts = [s[f"e.{j}.w"] for j in range(70)]
    turned_ones = [s[f"e.{j}.u"].T for j in range(70)]
    return {"stack.w": torch.stack(experts), "stack.u": torch.stack(turned_ones)}


def cast(s: State) -> State:
    made = {f"cast.{i}.{m}": s[f"k.{i}.{m}"].to(BF16) for i in range(3) for m in "wb"}
    return made | {"cast.large": s["k.large"].T.to(BF16), "cast.wide": s["k.narrow"].float()}


def added(s: State) -> State:
    return {f"add.{i}": s[f"n.{i}"] + 1 for i in range(3)} | {"add.large": s["n.large"] + 1}


def gathered_and_cast(s: State) -> State:
    made = {f"both.{i}": torch.cat([s[f"b.{i}.{p}"] for p in "xyz"]).to(F16) for i in range(3)}
    return made | {"both.large": torch.stack([s["b.large.0"].T, s["b.large.1"].T]).to(BF16)}


def dequantised(s: State) -> State:
    made = {}
    for i in range(3):
        codes, scale = s[f"d.{i}.codes"].float(), s[f"d.{i}.scale"]
        grid = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
        made[f"fp8.{i}"] = (codes * grid).to(BF16)
    return made


def repeated(s: State) -> State:
    return {f"twice.{p}.{i}": s[f"r.{i}"] for i in range(3) for p in "ab"}


def tied(s: State) -> State:
    return {"tie.embed": s["w.embed"], "tie.head": s["w.embed"], "tie.other": s["w.other"]}


STEPS: dict[str, Step] = {
    "copy": Step(
        numbered(("c.{i}.w", (5, 7), F32), ("c.{i}.odd", (3,), F16), ("c.{i}.flag", (3,), torch.uint8))
        | {"c.large": ((700, 1001), BF16), "c.empty": ((0, 3), F32), "c.scalar": ((), I64)},
        ("c.{r...} -> copy.{r...}",),
        copied,
    ),
    "turn": Step(
        numbered(("t.{i}.w", (33, 65), F32), ("t.{i}.conv", (4, 3, 5), F16)) | {"t.large": (LARGE, F32)},
        (
            "t.{i}.w [x y] -> turn.{i}.w [y x]",
            "t.{i}.conv [a b c] -> turn.{i}.conv [c a b]",
            "t.large [x y] -> turn.large [y x]",
        ),
        turned,
    ),
    "split": Step(
        numbered(("s.{i}.qkv", (33, 19), F32)) | {"s.large": (((606), 703), F32)},
        (
            "s.{i}.qkv [(p d) x] -> split.{i}.{p:q,k,v} [d x]",
            "s.large [(p d) x] -> split.large.{p:a,b} [x d]",
        ),
        split,
    ),
    "fuse": Step(
        numbered(("f.{i}.q", (ROWS["q"], 23), F32), ("f.{i}.k", (ROWS["k"], 23), F32))
        | {f"f.large.{p}": ((403, 501), F32) for p in "ab"},
        (
            "f.{i}.{p:q,k} [rows:p d] -> fuse.{i}.qk [(p rows:p) d]",
            "f.large.{p:a,b} [x y] -> fuse.large [(p y) x]",
        ),
        fused,
    ),
    "mix": Step(
        # "two" has columns at distances of 1 and of many, "uneven" columns of two widths: each in one region.
        numbered(("g.{i}.a", (129, 31), F32), ("g.{i}.b", (129, 31), F32))
        | {f"g.two.{p}.{e}": ((43, 60), F32) for p in "ab" for e in range(2)}
        | {f"g.uneven.{p}": ((rows, 127), F32) for p, rows in ROWS.items()},
        (
            "g.{i}.{p:a,b} [f d] -> mix.{i} [(f p) d]",
            "g.two.{p:a,b}.{e} [y x] -> mix.two [x (p y e)]",
            "g.uneven.{p:q,k} [rows:p d] -> mix.uneven [d (p rows:p)]",
        ),
        mixed,
    ),
    "stack": Step(
        {f"e.{j}.{m}": ((67, 41), F32) for j in range(70) for m in "wu"},
        ("e.{j}.w [o i] -> stack.w [j o i]", "e.{j}.u [o i] -> stack.u [j i o]"),
        stacked,
    ),
    "cast": Step(
        numbered(("k.{i}.w", (17, 29), F32), ("k.{i}.b", (29,), F32))
        | {"k.large": (LARGE, F32), "k.narrow": ((31, 5), BF16)},
        (
            "k.{i}.{m} -> cast.{i}.{m} | cast(bf16)",
            "k.large [x y] -> cast.large [y x] | cast(bf16)",
            "k.narrow -> cast.wide | cast(f32)",
        ),
        cast,
    ),
    "add": Step(
        numbered(("n.{i}", (13, 3), F32)) | {"n.large": (LARGE, F32)},
        ("n.{i:0..2} -> add.{i} | add(1)", "n.large -> add.large | add(1)"),
        added,
    ),
    "gather and cast": Step(
        numbered(*((f"b.{{i}}.{p}", (9, 21), F32) for p in "xyz"))
        | {f"b.large.{j}": ((403, 501), F32) for j in (0, 1)},
        (
            "b.{i}.{p:x,y,z} [o d] -> both.{i} [(p o) d] | cast(f16)",
            "b.large.{j} [x y] -> both.large [j y x] | cast(bf16)",
        ),
        gathered_and_cast,
    ),
    "join": Step(
        numbered(("d.{i}.codes", (200, 261), FP8), ("d.{i}.scale", (2, 3), F32)),
        ("d.{i}.codes, d.{i}.scale -> fp8.{i} | fp8_dequant(block=128)",),
        dequantised,
    ),
    "repeat": Step(
        numbered(("r.{i}", (11, 6), F32)),
        ("r.{i} -> twice.a.{i}, twice.b.{i}",),
        repeated,
    ),
    "tie": Step(
        {"w.embed": ((31, 8), F32), "w.other": ((31, 8), F32)},
        ("w.{m:embed,other} -> tie.{m}",),
        tied,
        {"tie.head": "tie.embed"},
    ),
}


def filled(steps: Sequence[Step]) -> State:
    """Return random sources, so that bytes from a wrong place are wrong bytes."""
    state: State = {}
    for number, (key, (shape, dtype)) in enumerate(pair for step in steps for pair in step.shapes.items()):
        draw = torch.Generator().manual_seed(number)
        if dtype in (I64, torch.uint8):
            state[key] = torch.randint(0, 250, shape, generator=draw, dtype=dtype)
        else:
            state[key] = torch.randn(shape, generator=draw).to(dtype)
    return state


@cache
def known(names: tuple[str, ...]) -> tuple[State, State]:
    """Return sources and what becomes of them; no test may write into either."""
    steps = [STEPS[name] for name in names]
    state = filled(steps)
    return state, judged(steps, state)


def recipe_of(steps: Sequence[Step], **more: Any) -> cs.Recipe:
    rules = [rule for step in steps for rule in step.rules]
    ties = {alias: key for step in steps for alias, key in step.ties.items()}
    return cs.Recipe(rules, tie=ties, **more)


def judged(steps: Sequence[Step], state: State) -> State:
    return {key: tensor.contiguous() for step in steps for key, tensor in step.made(state).items()}
