"""All options of `load_into` together, against a plain model of what the documentation says of each."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

SHAPE = (2, 3)
# fits; fits after a lossless or a lossy cast; another shape; codes without scales; only in the source, or the model
SOURCE = {
    "fits": torch.full(SHAPE, 7.0),
    "narrow": torch.full(SHAPE, 7.0, dtype=torch.bfloat16),
    "wide": torch.full(SHAPE, 7.0, dtype=torch.float64),
    "shape": torch.full((4, 3), 7.0),
    "codes": torch.full(SHAPE, 7.0).to(torch.float8_e4m3fn),
    "extra": torch.full(SHAPE, 7.0),
}
MODEL = ("fits", "narrow", "wide", "shape", "codes", "gone")
NAMED = [("", ""), *product(("init", "keep", "drop"), dict.fromkeys((*MODEL, "extra")))]


def expected(mismatch: str, partial: bool, dtype: str, said: dict[str, str]) -> set[str] | dict[str, str]:
    """The codes of the errors, or what becomes of each tensor of the model.

    Args:
        said: the tensor that `init`, `keep` or `drop` names -> which of them.
    """
    codes: set[str] = set()
    actions: dict[str, str] = {}
    if said.get("extra") in ("init", "keep") or said.get("gone") == "drop":
        codes.add("no-such-module")
    for key in (*MODEL, "extra"):
        way = said.get(key, "")
        held = key in SOURCE and way != "drop"
        if key == "extra":
            codes |= {"unexpected-keys"} if held and not partial else set()
        elif way in ("init", "keep"):
            actions[key] = "initialised" if way == "init" else "kept"
        elif not held:
            actions[key] = "missing"
            codes |= set() if partial else {"missing-keys"}
        elif key == "shape" and mismatch != "error":
            actions[key] = "initialised" if mismatch == "init" else "kept"
        elif key == "shape" or (key == "codes" and dtype != "model"):
            actions[key] = "missing"
            codes |= set() if partial else {"shape-mismatch" if key == "shape" else "unscaled-codes"}
        else:
            actions[key] = "loaded"
            if (key == "wide" and dtype != "model") or (key == "narrow" and dtype == "error"):
                codes.add("dtype-mismatch")
    return codes or actions


def build() -> nn.ModuleDict:
    model = nn.ModuleDict({key: nn.Linear(3, 2, bias=False) for key in MODEL})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    return model


@pytest.mark.parametrize(("mismatch", "partial"), list(product(("error", "init", "keep"), (False, True))))
@pytest.mark.parametrize("dtype", ["lossless", "error", "model"])
def test_all_options_combine(mismatch: str, partial: bool, dtype: str) -> None:
    # half of the runs settle all that is not under test, so that few of them end in an error
    for (way, name), others in product(NAMED, ({}, {"gone": "init", "extra": "drop", "wide": "keep"})):
        said = {**others, name: way} if way else others
        options = {w: [k for k, v in said.items() if v == w] for w in ("init", "keep", "drop")}
        wanted = expected(mismatch, partial, dtype, said)
        model = build()
        source = {f"{k}.weight": v.clone() for k, v in SOURCE.items()}
        told = (mismatch, partial, dtype, options)
        try:
            report = cs.load_into(model, source, mismatch=mismatch, partial=partial, dtype=dtype, **options)
        except cs.CkptSurgeryError as error:
            assert {d.code for d in error.diagnostics if d.severity == "error"} == wanted, told
            assert all((p == 3).all() for p in model.parameters()), told
            continue
        assert {e.key: e.action for e in report.ledger if e.action not in ("dropped", "unexpected")} == (
            {f"{k}.weight": v for k, v in wanted.items()} if isinstance(wanted, dict) else wanted
        ), told
        assert all(is_so(model[k].weight, v) for k, v in wanted.items()), told  # type: ignore[union-attr]
        lost = {f"{k}.weight" for k in SOURCE if isinstance(wanted, dict) and wanted.get(k) != "loaded"}
        assert {*report.dropped, *report.unexpected_keys} == lost, told


def is_so(value: Tensor, action: str) -> bool:
    if action == "loaded":
        return bool((value == 7).all())
    same = bool((value == 3).all())
    return not same and bool((value.abs() < 1).all()) if action == "initialised" else same
