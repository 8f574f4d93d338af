"""Loads into a model that fail, with what is right once the remedy is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pasting import Arguments, Case, load
from torch import Tensor, nn

import ckptsurgery as cs


class Net(nn.Module):
    """A stem, a body, and a head of its own in a module `net`."""

    def __init__(self, classes: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.net = nn.ModuleDict({"head": nn.Linear(4, classes)})


class Positions(nn.Module):
    """A position table, or a table of relative ones with its index."""

    def __init__(self, n: int, window: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)
        if window:
            self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 4))
            self.register_buffer("index", torch.zeros(window**2, window**2, dtype=torch.int64))
        else:
            self.pos_embed = nn.Parameter(torch.randn(1, n, 8))


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.lm_head = nn.Linear(3, 4)
        self.lm_head.weight = self.embed.weight


def state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The values of a model, none of them what another would have."""
    torch.manual_seed(len(prefix) + 1)
    values = {k: torch.randn(t.shape) if t.is_floating_point() else t + 1 for k, t in model.state_dict().items()}
    return {prefix + k: v for k, v in values.items()}


def holds(*names: str, of: dict[str, Tensor], **others: Tensor) -> Callable[[Any], bool]:
    """Whether a model holds these values: the named ones of a state, and others."""
    wanted = {n: of[n] for n in names} | {n.replace("__", "."): t for n, t in others.items()}
    return lambda model: all(torch.equal(model.state_dict()[n], t) for n, t in wanted.items())


def given(model: Callable[[], nn.Module], source: Any, **more: Any) -> Callable[[], Arguments]:
    return lambda: {"model": model(), "source": source, **more}


STEM = ("stem.weight", "stem.bias")


def keys() -> Iterator[Case]:
    whole = state(Net())
    stem = {k: whole[k] for k in STEM}
    kept = holds(*STEM, of=whole)
    yield Case("missing-keys", load, given(Net, stem), kept)
    bias = {k: v for k, v in whole.items() if k != "net.head.bias"}
    yield Case("missing-keys", load, given(Net, bias), holds(*bias, of=whole), note="the bias alone")
    yield Case("unexpected-keys", load, given(Net, {**whole, "aux.w": torch.ones(2)}), holds(*whole, of=whole))
    yield Case("no-such-module", load, given(Net, whole, init=["net.haed"]), kept, note="init")
    yield Case("no-such-module", load, given(Net, whole, keep=["net.haed"]), kept, note="keep")
    yield Case("no-such-module", load, given(Net, {**whole, "aux.w": torch.ones(2)}, drop=["axu"]),
               holds(*whole, of=whole), note="drop")  # fmt: skip
    both = {**state(Net(), "student."), **state(Net(), "teacher.")}
    student = {k.removeprefix("student."): v for k, v in both.items() if k.startswith("student.")}
    yield Case("ambiguous-prefix", load, given(Net, both), holds(*whole, of=student))


def shapes() -> Iterator[Case]:
    whole = state(Net())
    anything = holds(*STEM, of=whole)
    yield Case("shape-mismatch", load, given(lambda: Net(5), whole), anything, note="classes")
    gray = whole["stem.weight"].sum(1, keepdim=True)
    rest = [k for k in whole if k != "stem.weight"]
    for prefix in ("", "model."):
        source = {prefix + k: v for k, v in whole.items()}
        right = (holds(*rest, of=whole, stem__weight=gray), *[holds(*rest, of=whole)] * 2, None)
        arguments = given(lambda: Net(channels=1), {"state_dict": source} if prefix else source)
        yield Case("shape-mismatch", load, arguments, right, note=f"channels {prefix}")
    for old, new in ((10, 17), (197, 257)):
        table = state(Positions(old))
        right = lambda model, table=table: (  # noqa: E731 - the class token stays as it is
            torch.equal(model.pos_embed[:, 0], table["pos_embed"][:, 0])
            and not torch.equal(model.fc.weight, torch.zeros(2, 8))
        )
        yield Case(
            "shape-mismatch", load, given(lambda new=new: Positions(new), table),
            (right, *[holds("fc.weight", of=table)] * 2, None), note=f"positions {new}",
        )  # fmt: skip
    table = state(Positions(0, 4))
    centre = lambda model: torch.allclose(model.table[60], table["table"][24], atol=1e-4)  # noqa: E731
    yield Case("shape-mismatch", load, given(lambda: Positions(0, 6), table),
               (centre, *[holds("fc.weight", of=table)] * 2, None, None), note="relative")  # fmt: skip
    turned = {k: v.T if k == "net.head.weight" else v for k, v in whole.items()}
    yield Case("shape-mismatch", load, given(Net, {k: v.contiguous() for k, v in turned.items()}),
               (holds(*whole, of=whole), *[anything] * 3), note="transposed")  # fmt: skip


def ties() -> Iterator[Case]:
    source = {"embed.weight": torch.randn(4, 3), "lm_head.weight": torch.randn(4, 3), "lm_head.bias": torch.zeros(4)}
    either = lambda model: any(  # noqa: E731
        torch.equal(model.embed.weight, source[k]) for k in ("embed.weight", "lm_head.weight")
    )
    apart = lambda model: torch.equal(model.lm_head.weight, source["lm_head.weight"])  # noqa: E731
    yield Case("tied-values-differ", load, given(Tied, source), (either, apart), note="model")
    one = {k: v for k, v in source.items() if k != "lm_head.weight"}
    loaded = holds("embed.weight", of=source)
    yield Case("init-of-tied", load, given(Tied, one, init=["lm_head.weight"]), loaded)
    yield Case("keep-of-tied", load, given(Tied, one, keep=["lm_head.weight"]), loaded)
    without = {k: v for k, v in one.items() if k != "lm_head.bias"}
    yield Case("missing-keys", load, given(Tied, without), loaded, note="beside a tied name")


def values() -> Iterator[Case]:
    fc = lambda: nn.Linear(3, 2)  # noqa: E731
    precise = {k: v.double() / 3 for k, v in state(fc()).items()}
    narrow = holds(*precise, of={k: v.float() for k, v in precise.items()})
    yield Case("dtype-mismatch", load, given(fc, precise), (narrow, holds(*precise, of=precise)))
    whole = state(fc())
    right = holds(*whole, of=whole)
    yield Case("bad-argument", load, given(fc, whole, mismatch="eror"), right, note="mismatch")
    yield Case("bad-argument", load, given(fc, whole, dtype="source"), right, note="source")
    broken = {**whole, "bias": torch.tensor([float("nan"), 0])}
    yield Case("non-finite", load, given(fc, broken, check_values=True), holds("weight", of=whole))
    empty = lambda: nn.Linear(3, 2, device="meta")  # noqa: E731
    yield Case("meta-target", load, given(empty, whole, assign=False), right)
    yield Case("meta-kept", load, given(empty, {"weight": whole["weight"]}, partial=True, assign=True),
               lambda model: torch.equal(model.weight, whole["weight"]) and not model.bias.is_meta)  # fmt: skip
    wide = lambda: _shown_often(fc())  # noqa: E731
    yield Case("expanded-target", load, given(wide, whole), right)
    overlapping = lambda: _overlapping(fc())  # noqa: E731
    yield Case("overlapping-values", load, given(overlapping, whole), right)
    yield Case(
        "bad-initialiser",
        load,
        given(fc, whole, init={"bias": "zeross"}),
        holds("weight", of=whole, bias=torch.zeros(2)),
    )
    inner = {f"fc.{k}": v for k, v in whole.items()}
    yield Case("no-default", load, given(Bare, inner, init=["scale"]),
               lambda model: float(model.scale.detach().std()) < 0.1)  # fmt: skip
    yield Case(
        "init-hook-failed", load, given(Failing, {"bias": whole["bias"]}, init=["weight"]), holds("bias", of=whole)
    )
    codes = {"weight": torch.ones(2, 3, dtype=torch.int8), "bias": whole["bias"]}
    yield Case("integer-parameter", load, given(fc, codes, assign=True, dtype="source"), holds(*codes, of=codes))


def _overlapping(model: nn.Linear) -> nn.Linear:
    model.bias = nn.Parameter(model.weight.data.view(-1)[:2])
    return model


def _shown_often(model: nn.Linear) -> nn.Linear:
    model.weight = nn.Parameter(torch.zeros(1, 3).expand(2, 3))
    return model


class Bare(nn.Module):
    """A parameter that nothing initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(64))


class Failing(nn.Linear):
    """A layer whose own initialisation raises once the model is built."""

    def __init__(self) -> None:
        self.built = False
        super().__init__(3, 2)
        self.built = True

    def reset_parameters(self) -> None:
        if self.built:
            raise ValueError("not again")
        super().reset_parameters()


def selecting() -> Iterator[Case]:
    def chosen(model: nn.Module, what: Any, **options: Any) -> list[str]:
        return list(cs.select(model, what, **options).names)

    model = lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())  # noqa: E731
    cases = (
        ("0.wieght", lambda names: names == ["0.weight"]),
        ("{i:0}", lambda names: names == ["0.weight", "0.bias"]),
        ("1.running_mean", lambda names: names == ["1.running_mean"]),
        ("2", lambda names: names == []),
        (nn.GELU, lambda names: names == []),
    )
    for what, right in cases:
        yield Case(
            "nothing-selected", chosen, lambda what=what: {"model": model(), "what": what}, right, note=str(what)
        )
    untied = lambda model, name: (cs.untie(model, name), model)[1]  # noqa: E731
    yield Case("unknown-tensor", untied, lambda: {"model": Tied(), "name": "lm_head.wieght"},
               lambda model: model.lm_head.weight is not model.embed.weight)  # fmt: skip


def layouts(stack: Path) -> Iterator[Case]:
    import pickle

    path = stack / "model.pdparams"
    torch.manual_seed(3)
    linear = {f"{n}.weight": torch.randn(i, o) for n, (i, o) in (("0", (4, 4)), ("2", (4, 6)), ("4", (6, 2)))}
    linear |= {f"{n}.bias": torch.randn(o) for n, o in (("0", 4), ("2", 6), ("4", 2))}
    path.write_bytes(pickle.dumps({k: v.numpy() for k, v in linear.items()}, protocol=2))
    net = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))  # noqa: E731
    right = holds(*linear, of={k: v.T if v.ndim == 2 else v for k, v in linear.items()})
    yield Case("paddle-layout", load, given(net, str(path)), right)
    odd = stack / "odd.pt"
    torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2), "s": torch.eye(3).to_sparse()}, odd)
    fc = lambda: nn.ModuleDict({"fc": nn.Linear(3, 2)})  # noqa: E731
    yield Case("unreadable-tensors", load, given(fc, str(odd)), lambda model: bool((model["fc"].weight == 1).all()))
