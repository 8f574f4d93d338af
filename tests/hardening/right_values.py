"""Right values without `assert`, for `python -O`: each check raises by itself. Run as a program."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckptsurgery as cs

State = dict[str, Tensor]


def check(truth: bool, text: str) -> None:
    if not truth:
        raise SystemExit(f"wrong: {text}")


def same(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], text: str) -> None:
    check(sorted(made) == sorted(wanted), f"{text}: the keys {sorted(made)}")
    for key, tensor in wanted.items():
        check(made[key].dtype == tensor.dtype and torch.equal(made[key], tensor), f"{text}: the values of {key}")


def refused(code: str, text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except cs.CkptSurgeryError as error:
        check(error.diagnostics[0].code == code, f"{text}: {error}")
    else:
        check(False, f"{text} is accepted")


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + int(torch.Size(shape).numel()), dtype=torch.float32).reshape(shape)


CASES: list[tuple[str, State, State, dict[str, Any]]] = [
    ("a.{i}.w [x y] -> b.{i+1}.w [y x]", {"a.0.w": numbered(2, 3)}, {"b.1.w": numbered(2, 3).T.contiguous()}, {}),
    (
        "qkv [(p rows:p) d] -> {p:q,k,v} [rows:p d]",
        {"qkv": numbered(8, 2)},
        {"q": numbered(4, 2), "k": numbered(2, 2, start=8), "v": numbered(2, 2, start=12)},
        {"rows": {"q": 4, "k": 2, "v": 2}},
    ),
    ("e.{e}.w [f d] -> all [e f d]", {"e.0.w": numbered(2, 2), "e.1.w": numbered(2, 2, start=4)},
     {"all": numbered(2, 2, 2)}, {}),
    ("l.{i:1,3}.w -> x.{i+10}.w", {"l.1.w": numbered(2), "l.3.w": numbered(2, start=2)},
     {"x.11.w": numbered(2), "x.13.w": numbered(2, start=2)}, {}),
    ("b.{(s t)}.w -> s.{s}.{t}.w", {f"b.{i}.w": numbered(2, start=i) for i in range(3)},
     {"s.0.0.w": numbered(2), "s.1.0.w": numbered(2, start=1), "s.1.1.w": numbered(2, start=2)}, {"t": [1, 2]}),
    ("w [(g h) d] -> w [(g r h) d] | repeat_over(r)", {"w": numbered(4, 1)},
     {"w": torch.tensor([0.0, 1, 0, 1, 2, 3, 2, 3])[:, None]}, {"g": 2, "r": 2}),
]  # fmt: skip


def rules(folder: Path) -> None:
    for number, (rule, source, wanted, dims) in enumerate(CASES):
        recipe = cs.Recipe([rule], dims=dims)
        plan = cs.plan(source, recipe)
        same(plan.state_dict(), wanted, rule)
        same(plan.inverse(wanted).state_dict(), source, f"{rule}, back")
        for suffix in ("safetensors", "pt"):
            cs.save(source, folder / f"{number}.{suffix}")
            there = folder / f"{number}-made.{suffix}"
            with cs.open(folder / f"{number}.{suffix}") as checkpoint:
                cs.plan(checkpoint, recipe).save(there, check=True)
            with cs.open(there) as checkpoint:
                same(checkpoint.state_dict(), wanted, f"{rule} in {suffix}")


def refusals(folder: Path) -> None:
    parts = {"q": (16, 4), "k": (8, 4), "v": (8, 4)}
    target = {key: cs.TensorSpec(shape, "F32") for key, shape in parts.items()}
    split = "qkv [(p rows:p) d] -> {p:q,k,v} [rows:p d]"
    for rows in (20, 40):
        source = {"qkv": torch.zeros(rows, 4), "z": torch.full((64, 4), 7.0)}
        path = folder / f"{rows}.safetensors"
        cs.save(source, path)
        refused(
            "size-mismatch",
            f"{rows} rows for 32",
            partial(cs.plan, str(path), cs.Recipe([split], drop=["z"]), target=target),
        )
    one = {"qkv": cs.TensorSpec([12, 2], "F32")}
    refused("one-size", "one number", lambda: cs.plan(one, cs.Recipe([split], dims={"rows": 4})))
    refused("indivisible", "7 rows", lambda: cs.plan({"w": cs.TensorSpec([7], "F32")}, "w [(p d)] -> {p:a,b} [d]"))
    broken = folder / "broken.safetensors"
    whole = (folder / "20.safetensors").read_bytes()
    broken.write_bytes(whole[:-8])
    try:
        cs.open(broken)
    except cs.CheckpointError:
        pass
    else:
        check(False, "a file that is cut off is opened")


def models() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    state = {key: numbered(*t.shape, start=5) for key, t in model.state_dict().items()}
    cs.load_into(model, state)
    same(model.state_dict(), state, "a model that is loaded")
    try:
        cs.load_into(model, {**state, "0.weight": torch.zeros(4, 3)})
    except cs.CkptSurgeryError:
        same(model.state_dict(), state, "a model that was refused a tensor")
    else:
        check(False, "a tensor of another shape is loaded")


if __name__ == "__main__":
    check(sys.flags.optimize > 0, "this runs under python -O")
    with tempfile.TemporaryDirectory() as place:
        rules(Path(place))
        refusals(Path(place))
        models()
    print("all right")
