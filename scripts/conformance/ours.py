"""This implementation behind the conformance suite: one case a line in, one answer a line out.

python scripts/conformance/run.py -- python scripts/conformance/ours.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

import ckptsurgery as cs
from ckptsurgery.language.toml import from_tree

__all__ = ["answer", "answer_back"]

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}  # fmt: skip


def source_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a case: as they are written, numbered in their order, or headers alone."""
    found: dict[str, Any] = {}
    start = 0
    for key, spec in case["source"].items():
        if isinstance(spec, list):
            found[key] = torch.arange(start, start + prod(spec)).reshape(spec)
            start += prod(spec)
        elif "elements" in spec:
            found[key] = torch.tensor(spec["elements"]).to(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
        else:
            found[key] = cs.TensorSpec(tuple(spec["shape"]), spec["dtype"])
    for first, *others in case.get("same", ()):
        found.update(dict.fromkeys(others, found[first]))
    return found


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe of a case makes of its source, or the codes of the error."""
    return _answered(case, source_of(case), case, inverse=False)


def answer_back(case: Mapping[str, Any]) -> dict[str, Any]:
    """What the inverse of the recipe makes of what the recipe is expected to make."""
    return _answered(case, source_of({"source": case["expected"]}), case["back"], inverse=True)


def _answered(case: Mapping[str, Any], source: Mapping[str, Any], given: Mapping[str, Any], inverse: bool) -> Any:
    target = given.get("target")
    wanted = {k: cs.TensorSpec(tuple(s["shape"]), s["dtype"]) for k, s in target.items()} if target else None
    try:
        recipe = from_tree(case["recipe"])
        plan = cs.plan(
            source, recipe.inverse() if inverse else recipe, target=wanted, config=given.get("config"),
            dims=given.get("dims"),
        )  # fmt: skip
        made = plan.state_dict()
    except cs.CkptSurgeryError as error:
        return {"errors": sorted({d.code for d in error.diagnostics})}
    return {"tensors": {key: _described(tensor) for key, tensor in made.items()}}


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    spec = cs.TensorSpec(tuple(tensor.shape), tensor.dtype)
    return {"dtype": spec.dtype, "shape": list(spec.shape), "elements": [int(x) for x in tensor.flatten().tolist()]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))))
