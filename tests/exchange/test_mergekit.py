"""Configurations of mergekit become recipes: what they make is held against the formulas, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.exchange.mergekit import recipe_from_mergekit
from ckptsurgery.language.toml import loads
from ckptsurgery.ops import make_op

State = dict[str, Tensor]


def model(seed: int, layers: int = 4) -> State:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{n}.weight" for i in range(layers) for n in ("self_attn.q", "mlp.up", "norm")]
    return {name: torch.randn(3, 4, generator=generator) for name in names}


def merged(text: str, *models: State) -> State:
    recipe = recipe_from_mergekit(text)
    assert loads(recipe.dumps()) == recipe
    source = {f"m{n}/{k}": t for n, state in enumerate(models) for k, t in state.items()}
    return cs.plan(source, recipe).state_dict()


A, B, C = (model(n) for n in range(3))


def test_linear_weights_are_normed_unless_told() -> None:
    text = "{models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}], merge_method: linear}"
    made = merged(text, A, B)
    assert all(torch.allclose(made[k], 0.25 * A[k] + 0.75 * B[k]) for k in A)
    plain = merged(text[:-1] + ", parameters: {normalize: false}, dtype: bfloat16}", A, B)
    assert all(torch.equal(plain[k], (A[k] + 3 * B[k]).bfloat16()) for k in A)
    assert recipe_from_mergekit(text).summary == "linear of m0/ = a, m1/ = b"


SLERP = """
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1, 0]}
    - {value: 0.5}
dtype: float32
"""


def test_slerp_by_module_and_along_the_layers() -> None:
    made = merged(SLERP, A, B)

    def wanted(key: str, t: float) -> Tensor:
        return make_op("slerp", (t,)).run((A[key], B[key]))[0]

    for i, (attn, mlp) in enumerate(zip((0, 1 / 3, 2 / 3, 1), (1, 2 / 3, 1 / 3, 0))):
        for name, t in (("self_attn.q", attn), ("mlp.up", mlp), ("norm", 0.5)):
            key = f"model.layers.{i}.{name}.weight"
            assert torch.allclose(made[key], wanted(key, t), atol=1e-6), key
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.allclose(made[key], wanted(key, 0.5), atol=1e-6)


def test_the_first_entry_that_fits_counts() -> None:
    """An entry without a filter fits all, so what stands behind it says nothing; of a filter twice the first counts."""
    for entries, attn in (
        ("[{value: 0.5}, {filter: self_attn, value: 1}]", 0.5),
        ("[{filter: self_attn, value: 1}, {filter: self_attn, value: 0}, {value: 0.5}]", 1.0),
    ):
        text = SLERP[: SLERP.index("  t:")] + f"  t: {entries}\ndtype: float32\n"
        made = merged(text, A, B)
        for name, t in (("self_attn.q", attn), ("mlp.up", 0.5)):
            key = f"model.layers.0.{name}.weight"
            assert torch.allclose(made[key], make_op("slerp", (t,)).run((A[key], B[key]))[0], atol=1e-6), key


@pytest.mark.parametrize(
    ("method", "op", "given"),
    [
        ("task_arithmetic", "task_arithmetic", {"scale": 0.5, "w": (0.7, 0.3)}),
        ("ties", "ties", {"density": 0.5, "scale": 0.5, "w": (0.7, 0.3)}),
    ],
)
def test_methods_with_a_base(method: str, op: str, given: Any) -> None:
    text = f"""
models:
  - model: base
  - {{model: x, parameters: {{weight: 0.7, density: 0.5}}}}
  - {{model: y, parameters: {{weight: 0.3, density: 0.5}}}}
merge_method: {method}
base_model: base
parameters: {{lambda: 0.5}}
"""
    made = merged(text, A, B, C)
    run = make_op(op, (), given)
    assert all(torch.equal(made[k], run.run((A[k], B[k], C[k]))[0]) for k in A)
    dare = merged(text.replace(method, "dare_ties"), A, B, C)
    assert dare.keys() == A.keys()


def test_weights_along_the_layers() -> None:
    text = """
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: [1, 0]}}
      - {model: b, layer_range: [0, 4], parameters: {weight: [0, 1]}}
merge_method: linear
"""
    made = merged(text, A, B)
    assert torch.equal(made["model.layers.0.mlp.up.weight"], A["model.layers.0.mlp.up.weight"])
    key = "model.layers.1.norm.weight"
    assert torch.allclose(made[key], 2 / 3 * A[key] + 1 / 3 * B[key])
    assert torch.equal(made["model.embed_tokens.weight"], A["model.embed_tokens.weight"])
    assert torch.equal(made["lm_head.weight"], A["lm_head.weight"])
    assert torch.equal(made["model.norm.weight"], A["model.norm.weight"])


@pytest.mark.parametrize(("first", "stop"), [(0, 4), (0, 2), (1, 3)])
def test_a_range_takes_its_layers_and_numbers_them_anew(first: int, stop: int) -> None:
    text = f"""
slices:
  - sources:
      - {{model: a, layer_range: [{first}, {stop}], parameters: {{weight: 1}}}}
      - {{model: b, layer_range: [{first}, {stop}], parameters: {{weight: 3}}}}
merge_method: linear
"""
    recipe = recipe_from_mergekit(text)
    source = {f"m{n}/{k}": t for n, state in enumerate((A, B)) for k, t in state.items()}
    if stop - first < 4:
        with pytest.raises(cs.PlanError, match="match no rule"):
            cs.plan(source, recipe)
    rest = {"rest": "drop"} if stop - first < 4 else {}
    made = cs.plan(source, recipe.replace(**rest)).state_dict()
    assert len(made) == 3 + 3 * (stop - first)
    for i in range(first, stop):
        old, new = f"model.layers.{i}.mlp.up.weight", f"model.layers.{i - first}.mlp.up.weight"
        assert torch.allclose(made[new], 0.25 * A[old] + 0.75 * B[old])
    assert torch.allclose(made["lm_head.weight"], 0.25 * A["lm_head.weight"] + 0.75 * B["lm_head.weight"])


def test_passthrough_stacks_runs_of_layers() -> None:
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: a, layer_range: [1, 4]}]
merge_method: passthrough
"""
    made = merged(text, A)
    assert sum("layers" in k for k in made) == 18
    for i, j in enumerate((0, 1, 2, 1, 2, 3)):
        assert torch.equal(made[f"model.layers.{i}.mlp.up.weight"], A[f"model.layers.{j}.mlp.up.weight"])
    two = merged(text.replace("model: a, layer_range: [1", "model: b, layer_range: [1"), A, B)
    assert torch.equal(two["model.layers.3.norm.weight"], B["model.layers.1.norm.weight"])
    assert torch.equal(two["model.embed_tokens.weight"], A["model.embed_tokens.weight"])
    assert torch.equal(two["lm_head.weight"], B["lm_head.weight"])
    assert torch.equal(two["model.norm.weight"], B["model.norm.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("a: 1", "not a merge configuration"),
        ("{models: [], merge_method: sce}", "'sce' has no recipe"),
        ("{models: [], merge_method: linear, tokenizer_source: union}", "tokenizer_source cannot be imported"),
        ("{models: [{model: a}], merge_method: slerp, base_model: b, parameters: {}}", "slerp needs t"),
        ("{models: [{model: a}, {model: b}], merge_method: linear}", "linear needs weight"),
        (
            "{models: [{model: a}], merge_method: slerp, base_model: b, parameters: {t: [0, 1]}}",
            "need their number",
        ),
        (
            "{slices: [{sources: [{model: a, layer_range: [1, 3], parameters: {weight: [0, 1]}}, "
            "{model: b, layer_range: [1, 3], parameters: {weight: 1}}]}], merge_method: linear}",
            "do not begin at 0",
        ),
    ],
)
def test_what_has_no_recipe_says_so(text: str, message: str) -> None:
    with pytest.raises(cs.RecipeError, match=message):
        recipe_from_mergekit(text)


def test_the_command_imports_a_file(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(SLERP)
    done = CliRunner().invoke(app, ["recipes", "import", str(tmp_path / "merge.yml")])
    assert done.exit_code == 0, done.output
    assert loads(done.stdout) == recipe_from_mergekit(SLERP)
