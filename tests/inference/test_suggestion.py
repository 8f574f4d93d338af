"""Recipes inferred from names and shapes: the bar on the corpus, the rules' form, what is left open."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import OURS, THEIRS, block, spec

import ckptsurgery as cs
from ckptsurgery.language.toml import loads

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from conversions import recipe_for

DATA = Path(__file__).parent.parent / "data" / "corpus"
PAIRS = sorted(p.name.removesuffix(".json.gz") for p in DATA.glob("*.json.gz"))


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def specs(side: dict[str, Any]) -> dict[str, cs.TensorSpec]:
    return {k: cs.TensorSpec(tuple(v["shape"]), v["dtype"]) for k, v in side.items()}


def numbered(side: dict[str, Any]) -> dict[str, torch.Tensor]:
    filled, at = {}, 0
    for key, one in side.items():
        filled[key] = torch.arange(at, at + prod(one["shape"])).reshape(one["shape"])
        at += prod(one["shape"])
    return filled


@cache
def outcome(name: str) -> tuple[int, tuple[str, ...], tuple[str, ...], frozenset[str]]:
    """How many target tensors are right; which are wrong; which are open; which an assumption names."""
    pair = load(name)
    found = cs.suggest(specs(pair["source"]), specs(pair["target"]))
    made = cs.plan(numbered(pair["source"]), loads(found.recipe.dumps())).state_dict()
    right, wrong, left = 0, [], []
    for key, wanted in pair["expected"].items():
        if key not in made:
            left.append(key)
        elif hashlib.sha256(made[key].contiguous().numpy().astype("<i8").tobytes()).hexdigest() == wanted:
            right += 1
        else:
            wrong.append(key)
    return right, tuple(wrong), tuple(left), frozenset(k for a in found.assumptions for k in a.keys)


def test_the_corpus_is_nearly_all_right_and_every_wrong_tensor_is_named_by_an_assumption() -> None:
    results = [outcome(name) for name in PAIRS]
    right, wrong, left = (sum(n) for n in zip(*((r, len(w), len(o)) for r, w, o, _ in results)))
    assert right / (right + wrong + left) >= 0.993
    assert wrong / (right + wrong + left) <= 0.006
    assert sum(not w and not o for _, w, o, _ in results) >= 42
    assert all(set(w) <= named for _, w, _, named in results)


@pytest.mark.parametrize("name", PAIRS)
def test_a_suggested_recipe_plans_against_its_target_and_covers_it(name: str) -> None:
    pair = load(name)
    source, target = specs(pair["source"]), specs(pair["target"])
    found = cs.suggest(source, target)
    tensors = {
        k: torch.empty(s.shape, dtype=torch.int64 if s.dtype == "I64" else torch.float32) for k, s in source.items()
    }
    plan = cs.plan(tensors, found.recipe)
    open_ = {*found.unmatched_target, *(q.target for q in found.ambiguous)}
    assert {*plan.specs, *plan.ties} == set(target) - open_
    assert set(plan.dropped) == set(found.unmatched_source)
    if not open_:
        cs.plan(tensors, found.recipe, target=target)


# No word of the engine belongs to one family of models or to one codebase.
FAMILIES = {
    *(
        "bert",
        "gpt",
        "llama",
        "qwen",
        "mistral",
        "mixtral",
        "phi",
        "gemma",
        "falcon",
        "bloom",
        "neox",
        "pythia",
        "swin",
    ),
    *(
        "convnext",
        "resnet",
        "efficientnet",
        "vit",
        "deit",
        "clip",
        "whisper",
        "wav",
        "hubert",
        "mamba",
        "deepseek",
        "timm",
    ),
    *(
        "torchvision",
        "paddle",
        "huggingface",
        "litgpt",
        "torchtune",
        "gguf",
        "nanogpt",
        "diffusers",
        "openai",
        "taming",
    ),
    *(
        "curated",
        "segformer",
        "detr",
        "dino",
        "beit",
        "roberta",
        "bart",
        "opt",
        "regnet",
        "mobilenet",
        "densenet",
        "vgg",
    ),
}


def test_no_family_and_no_codebase_is_named_in_the_engine() -> None:
    folder = Path(cs.__file__).parent / "inference"
    for path in folder.glob("*.py"):
        said = {w.lower() for w in re.findall(r"[A-Za-z]+", path.read_text())}
        assert not said & FAMILIES, path.name


def test_eighty_layers_take_as_many_rules_as_three() -> None:
    few = cs.suggest(block(OURS, "h.", 3), block(THEIRS, "layers.", 3))
    many = cs.suggest(block(OURS, "h.", 80), block(THEIRS, "layers.", 80))
    assert [str(r) for r in few.recipe.rules] == [str(r) for r in many.recipe.rules]
    assert many.coverage == 1.0
    assert "h.{i}.attn.{p:q,k,v}.weight [rows:p b] -> layers.{i}.self_attn.qkv.weight [(p rows:p) b]" in [
        str(r) for r in many.recipe.rules
    ]


def test_a_fused_tensor_is_split_with_the_sizes_that_only_the_target_shows() -> None:
    found = cs.suggest(block(THEIRS, "layers.", 2), block(OURS, "h.", 2))
    assert found.recipe.dims["rows"] == {"q": 16, "k": 8, "v": 8}
    assert cs.plan({k: torch.zeros(s.shape) for k, s in block(THEIRS, "layers.", 2).items()}, found.recipe).specs[
        "h.1.attn.k.weight"
    ] == spec(8, 16)


def test_a_flat_index_meets_nested_stages() -> None:
    names = {"norm.weight": (8,), "fc1.weight": (32, 8), "fc2.weight": (8, 32)}
    source = block(names, "blocks.", 6)
    target = {
        f"stages.{s}.{b}.{n}": spec(*shape)
        for s, b in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
        for n, shape in names.items()
    }
    found = cs.suggest(source, target)
    plan = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    assert {step.sources[0]: step.targets[0] for step in plan.steps}["blocks.4.norm.weight"] == "stages.2.1.norm.weight"


def test_stages_that_count_backwards_are_reversed() -> None:
    shapes = {0: 8, 1: 16, 2: 32}
    source = {
        f"up.{i}.conv.{n}": spec(*s) for i, c in shapes.items() for n, s in (("weight", (c, c, 3, 3)), ("bias", (c,)))
    }
    source |= {f"up.{i}.norm.weight": spec(c) for i, c in shapes.items()}
    target = {
        k.replace(f"up.{i}.", f"up_blocks.{2 - i}."): s for k, s in source.items() for i in shapes if f"up.{i}." in k
    }
    assert [str(r) for r in cs.suggest(source, target).recipe.rules] == ["up.{i}.{r...} -> up_blocks.{2-i}.{r...}"]


def test_square_matrices_turn_with_their_neighbours_and_the_trust_is_said() -> None:
    source = block({"proj.weight": (16, 16), "fc.weight": (16, 64), "embed.weight": (16, 16)}, "h.", 3)
    target = block({"proj.weight": (16, 16), "fc.weight": (64, 16), "embed.weight": (16, 16)}, "h.", 3)
    found = cs.suggest(source, target)
    steps = {k: str(r) for r in found.recipe.rules for k in ("proj", "embed") if k in str(r)}
    assert "[b a]" in steps["proj"]
    assert "[" not in steps["embed"]
    assert any(a.kind == "square" and "h.1.proj.weight" in a.keys for a in found.assumptions)


def test_what_is_open_is_left_out_of_the_recipe_and_told_by_the_plan_for_the_target() -> None:
    source, target = block(OURS, "h.", 2), {**block(OURS, "layers.", 2), "head.weight": spec(5, 16)}
    found = cs.suggest(source, target)
    assert not found.recipe.init
    tensors = {k: torch.zeros(s.shape) for k, s in source.items()}
    assert "head.weight" not in cs.plan(tensors, found.recipe).state_dict()
    with pytest.raises(cs.PlanError, match=r"head\.weight"):
        cs.plan(tensors, found.recipe, target=target)


def test_of_two_depths_the_layers_that_both_have_go_by_their_number() -> None:
    source = {**block(OURS, "h.", 7), "ln_f.weight": spec(16)}
    target = {**block(THEIRS, "layers.", 5), "norm.weight": spec(16)}
    found = cs.suggest(source, target)
    made = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    assert {step.sources[0]: step.targets[0] for step in made.steps}["h.4.mlp.w2.weight"] == "layers.4.ff.down.weight"
    assert not made.specs.keys() - target.keys()


def test_what_has_lost_its_partner_takes_no_other_ones_place() -> None:
    source, target = block(OURS, "h.", 6), block(THEIRS, "layers.", 6)
    lost = [k for k in source if k.startswith("h.3.") and "ln_2" in k]
    found = cs.suggest({k: s for k, s in {**source, "ln_f.weight": spec(16)}.items() if k not in lost}, target)
    open_ = {*found.unmatched_target, *(q.target for q in found.ambiguous)}
    assert open_ == {"layers.3.post_norm.weight"}


def test_numbers_with_leading_zeros_are_spelled_out() -> None:
    source = {k.replace("h.", "layer_0", 1): s for k, s in block(OURS, "h.", 3).items()}
    found = cs.suggest(source, block(THEIRS, "layers.", 3))
    assert found.coverage == 1.0
    assert any("{i:00,01,02}" in str(r) and "{i:0,1,2}" in str(r) for r in found.recipe.rules)


def test_a_matrix_that_its_names_call_the_second_is_not_the_first_for_standing_first() -> None:
    names = {"mlp.dense_4h_to_h.weight": (8, 32), "mlp.dense_h_to_4h.weight": (32, 8), "norm.weight": (8,)}
    to = {"norm.weight": (8,), "mlp.fc.weight": (32, 8), "mlp.proj.weight": (8, 32)}
    found = cs.suggest(block(names, "h.", 3), block(to, "layers.", 3))
    assert not any("[" in str(r) for r in found.recipe.rules)
    assert found.coverage == 1.0


def test_what_all_keys_end_in_says_nothing() -> None:
    names = {"norm.gamma": (8,), "norm.beta": (8,), "fc.kernel": (8, 32), "fc.bias": (32,)}
    source = {f"{k}:0": s for k, s in block(names, "h.", 3).items()}
    to = {"norm.weight": (8,), "norm.bias": (8,), "fc.weight": (32, 8), "fc.bias": (32,)}
    found = cs.suggest(source, block(to, "layers.", 3))
    made = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    pairs = {step.targets[0]: step.sources[0] for step in made.steps}
    assert pairs["layers.1.norm.bias"] == "h.1.norm.beta:0"
    assert len(pairs) == 12


def test_a_sequence_with_a_named_first_and_last_meets_one_that_is_counted() -> None:
    shapes = {"weight": (8, 8), "bias": (8,)}
    source = {f"heads.{h}.layers.{i}.{l}": spec(*s) for h in range(3) for i in range(3) for l, s in shapes.items()}
    target = {
        f"heads.{h}.{m}.{l}": spec(*s)
        for h in range(3)
        for m in ("proj_in", "proj_out", "layers.0")
        for l, s in shapes.items()
    }
    found = cs.suggest(source, target)
    made = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    pairs = {step.targets[0]: step.sources[0] for step in made.steps}
    for name, number in (("proj_in", 0), ("layers.0", 1), ("proj_out", 2)):
        assert pairs[f"heads.1.{name}.weight"] == f"heads.1.layers.{number}.weight"


def test_an_output_head_without_a_source_is_tied_to_the_embedding() -> None:
    source = {"embed_tokens.weight": spec(50, 8), **block({"norm.weight": (8,), "fc.weight": (32, 8)}, "layers.", 2)}
    found = cs.suggest(source, {**source, "lm_head.weight": spec(50, 8)})
    assert found.recipe.tie == {"lm_head.weight": "embed_tokens.weight"}
    assert any(a.kind == "tied" and "lm_head.weight" in a.keys for a in found.assumptions)


def test_what_has_no_counterpart_is_dropped_by_name_and_listed() -> None:
    source = {**block(OURS, "h.", 2), "h.0.mask": spec(7, 7), "h.1.mask": spec(7, 7)}
    found = cs.suggest(source, {**block(OURS, "layers.", 2), "head.weight": spec(5, 16)})
    assert found.unmatched_source == ("h.0.mask", "h.1.mask")
    assert found.unmatched_target == ("head.weight",)
    assert found.recipe.drop == ("h.{i}.mask",)
    assert "no counterpart" in str(found)


def test_equal_tensors_that_nothing_tells_apart_are_left_open() -> None:
    source = {f"{n}.weight": spec(8, 8) for n in ("foo", "bar")}
    target = {f"{n}.weight": spec(8, 8) for n in ("alpha", "omega")}
    found = cs.suggest(dict(sorted(source.items())), dict(sorted(target.items())))
    assert found.coverage == 0.0
    assert set(found.unmatched_target) | {q.target for q in found.ambiguous} == set(target)


def test_an_open_question_has_candidates_and_the_evidence_for_each() -> None:
    source = {"foo.weight": spec(8, 8), "bar.weight": spec(8, 8), **block(OURS, "h.", 2)}
    found = cs.suggest(source, {"omega.weight": spec(8, 8), "sigma.weight": spec(3), **block(OURS, "h.", 2)})
    (question,) = found.ambiguous
    assert question.target == "omega.weight"
    assert {c.sources for c in question.candidates} == {("foo.weight",), ("bar.weight",)}
    assert all(c.evidence for c in question.candidates)
    assert found.unmatched_target == ("sigma.weight",)


def test_both_of_two_equal_projections_are_named_where_neither_is_called_the_gate() -> None:
    ours = {"mlp.fc1.weight": (24, 16), "mlp.fc2.weight": (24, 16), "mlp.fc3.weight": (16, 24)}
    theirs = {"mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24)}
    found = cs.suggest(block(ours, "h.", 3), block(theirs, "layers.", 3))
    named = {k for a in found.assumptions if a.kind == "gate" for k in a.keys}
    assert {"layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"} <= named


def test_a_suggestion_is_plain_data_too() -> None:
    found = cs.suggest(block(OURS, "h.", 2), block(THEIRS, "layers.", 2))
    data = json.loads(json.dumps(found.to_json()))
    assert loads(data["recipe"]).rules == found.recipe.rules
    assert data["coverage"] == 1.0
    assert {a["kind"] for a in data["assumptions"]} >= {"rows", "order"}


def length(recipe: cs.Recipe) -> int:
    """How many lines there are to read: rules, drops, ties, pairs of names, those of used recipes among them."""
    own = len(recipe.rules) + len(recipe.drop) + len(recipe.tie) + sum(map(len, recipe.names.values()))
    used = [cs.load_recipe(scope.use) for scope in recipe.scopes if scope.use]
    parts = [*recipe.stages, *(scope.recipe for scope in recipe.scopes), *used]
    return own + (recipe.rest not in ("error", "keep")) + sum(map(length, parts))


@pytest.mark.parametrize("name", PAIRS)
def test_a_suggested_recipe_is_hardly_longer_than_the_one_that_a_person_wrote(name: str) -> None:
    pair = load(name)
    found = cs.suggest(specs(pair["source"]), specs(pair["target"]))
    assert length(found.recipe) <= 1.5 * max(1, length(recipe_for(name)))


def test_a_subtree_that_moves_as_a_whole_is_one_rule() -> None:
    names = {"conv.weight": (8, 8), "norm.weight": (8,), "mlp.deep.weight": (3, 8)}
    source = {f"a.{t}.{k}": spec(*s) for t in ("one", "two") for k, s in names.items()} | {"head.weight": spec(5, 8)}
    moved = {k.replace("a.one.", "x.first.").replace("a.two.", "two."): s for k, s in source.items()}
    rules = {str(r) for r in cs.suggest(source, moved).recipe.rules} | {cs.suggest(source, moved).recipe.rest}
    assert len(rules) <= 3
