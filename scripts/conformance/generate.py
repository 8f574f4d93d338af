"""Write the conformance suite of the language from the tests of this implementation.

    python scripts/conformance/generate.py

Every call of `forward`, `both_ways` and `refused` in the tests of planning is one case: a recipe, a source, and the
result or the codes of the error. They go into `tests/conformance/cases/`, with conversions of the corpus beside them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.catalog import as_recipe
from ckptsurgery.language.rules import Rule
from ckptsurgery.ops.registry import op_names

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "conformance" / "cases"
MODULES = (
    "rule_table", "language_runs", "sums_and_tables", "flat_restrictions", "partners_and_shares", "empty_parts",
    "sizes_on_both_sides", "chained_ties", "problems", "problems_of_targets",
)  # fmt: skip
MOST_ELEMENTS = 240
PAIRS = (
    "hf_llama__litgpt", "meta_llama__hf4_llama", "hf_phi3__litgpt", "hf4_mixtral__hf5", "hf_gptneox__litgpt",
    "torch_TransformerEncoder__paddle", "hf5_gpt2__nanogpt", "timm_vit__hf4_vit", "hf_qwen3_moe__litgpt",
    "tv_resnet18__paddle", "hf4_whisper__hf5", "efficientnet_pytorch_b0__timm_tf",
)  # fmt: skip

for folder in ("tests/planning", "tests/recipes"):
    sys.path.insert(0, str(ROOT / folder))
import both_ways  # noqa: E402
import conversions  # noqa: E402


class Unwritable(Exception):
    """A case that the format cannot hold."""


def recipe_tree(recipe: Any) -> dict[str, Any]:
    """A recipe as the tree that its TOML file has."""
    if isinstance(recipe, str) and "->" in recipe:
        return {"schema": 1, "rules": [recipe]}
    if isinstance(recipe, list):
        return {"schema": 1, "rules": [str(rule) for rule in recipe]}
    return tomllib.loads(as_recipe(recipe).dumps())


def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors with all of their elements, which must be whole numbers."""
    found = {}
    for key, tensor in state.items():
        spec = cs.TensorSpec(tuple(tensor.shape), tensor.dtype)
        whole = tensor.flatten().tolist()
        if not spec.dtype.startswith(("F", "I", "U", "BF")) or any(x != x or x != int(x) for x in whole):
            raise Unwritable(key)
        found[key] = {"dtype": spec.dtype, "shape": list(spec.shape), "elements": [int(x) for x in whole]}
    if sum(len(t["elements"]) for t in found.values()) > MOST_ELEMENTS:
        raise Unwritable("too many elements")
    return found


def specs(of: Mapping[str, Any]) -> dict[str, Any]:
    """Headers alone."""
    return {k: {"dtype": s.dtype, "shape": list(s.shape)} for k, s in of.items()}


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a case is given beside its recipe and its source."""
    if given.keys() - {"target", "dims", "config"}:
        raise Unwritable(str(sorted(given)))
    found = {k: v for k, v in given.items() if v is not None}
    if "target" in found:
        if not all(isinstance(s, cs.TensorSpec) for s in found["target"].values()):
            raise Unwritable("a target of tensors")
        found["target"] = specs(found["target"])
    return found


class Recorder:
    """The cases of one run, by test module."""

    def __init__(self) -> None:
        self.cases: dict[str, list[dict[str, Any]]] = {}
        self.seen: set[str] = set()
        self.module = self.test = ""
        self.ops = set(op_names())  # before a test registers one of its own
        self.random = False

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.module, self.test = item.path.stem.removeprefix("test_"), item.name
        self.random = hasattr(getattr(item, "obj", None), "hypothesis")  # other cases in every run

    def add(self, recipe: Any, case: dict[str, Any]) -> None:
        """Keep a case that is new, and that can be written."""
        if self.random:
            return
        try:
            case = {"name": self.test, "recipe": recipe_tree(recipe), **case}
            if not ops_of(case["recipe"]) <= self.ops:
                return
            text = json.dumps({k: v for k, v in case.items() if k != "name"}, sort_keys=True)
        except (TypeError, cs.CkptSurgeryError):
            return
        used = "use" in text and '"use":' in text
        if text not in self.seen and not used and '"data"' not in text:
            self.seen.add(text)
            case["needs"] = ["ops"] if ops_of(case["recipe"]) else []
            self.cases.setdefault(self.module, []).append(case)


def rules(tree: Mapping[str, Any]) -> list[str]:
    """All rules of a tree."""
    own = [*tree.get("rules", ())]
    return own + [rule for part in (*tree.get("scope", ()), *tree.get("then", ())) for rule in rules(part)]


def ops_of(tree: Mapping[str, Any]) -> set[str]:
    """The names of all ops of a tree; rules that do not parse have none."""
    found = set()
    for text in rules(tree):
        try:
            rule = Rule.parse(text)
        except cs.RecipeError:
            continue
        found |= {call.name for call in (*rule.before, *rule.after)}
    return found


def watched(recorder: Recorder) -> None:
    """Put the recorder around the three functions, before the tests import them."""
    forward, both, refused = both_ways.forward, both_ways.both_ways, both_ways.refused

    def record(recipe: Any, source: Any, wanted: Any, given: Mapping[str, Any], back: Any = None) -> None:
        try:
            case = {"source": tensors(source), **arguments(given), "expected": tensors(wanted)}
            if back is not None:
                case["back"] = arguments({k: v for k, v in back.items() if v is not None})
        except Unwritable:
            return
        recorder.add(recipe, case)

    def forward_recorded(recipe: Any, source: Any, wanted: Any, **given: Any) -> Any:
        made = forward(recipe, source, wanted, **given)
        record(recipe, source, wanted, given)
        return made

    def both_recorded(recipe: Any, source: Any, wanted: Any, *, back: Any = None, **given: Any) -> Any:
        made = both(recipe, source, wanted, back=back, **given)
        kept = {k: v for k, v in given.items() if k != "target"}
        record(recipe, source, wanted, given, kept | dict(back or {}))
        return made

    def refused_recorded(shapes: Any, recipe: Any, target: Any = None, **given: Any) -> Any:
        error = refused(shapes, recipe, target, **given)
        try:
            wanted = {"target": both_ways.specs_of(target)} if target else {}
            case = {"source": specs(both_ways.specs_of(shapes)), **arguments({**given, **wanted})}
        except Unwritable:
            return error
        recorder.add(recipe, {**case, "errors": sorted({d.code for d in error.diagnostics})})
        return error

    both_ways.forward, both_ways.both_ways, both_ways.refused = forward_recorded, both_recorded, refused_recorded


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """One hash of a state dict of numbers: key, a zero byte, the elements as int64, for each key in order."""
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(key.encode() + b"\0" + state[key].contiguous().numpy().astype("<i8").tobytes())
    return whole.hexdigest()


def conversion(name: str) -> dict[str, Any]:
    """A conversion of the corpus, proved by the corpus's own hashes first."""
    pair, recipe = conversions.pair(name), conversions.recipe_for(name)
    numbered = pair.numbered()
    made = cs.plan(numbered, recipe, target=None, config=pair.config).state_dict()
    assert conversions.hashes({k: made[k] for k in pair.expected}) == pair.expected, name
    return {
        "name": name,
        "recipe": recipe_tree(recipe),
        "config": pair.config or {},
        "source": {key: list(spec.shape) for key, spec in pair.source.items()},
        "same": [group for group in pair.tied_source if len(group) > 1],
        "expected": {key: list(made[key].shape) for key in sorted(made)},
        "digest": digest(made),
        "needs": [],
    }


def main() -> None:
    """Run the tests, and write the cases."""
    recorder = Recorder()
    watched(recorder)
    files = [str(ROOT / "tests" / "planning" / f"test_{name}.py") for name in MODULES]
    failed = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *files], plugins=[recorder])
    if failed:
        raise SystemExit(failed)
    CASES.mkdir(parents=True, exist_ok=True)
    for module, cases in recorder.cases.items():
        _write(module, cases)
    _write("conversions", [conversion(name) for name in PAIRS])


def _write(name: str, cases: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    path = CASES / f"{name}.json"
    path.write_text(f"[\n{lines}\n]\n")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
