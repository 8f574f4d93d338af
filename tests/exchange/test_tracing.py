"""Recipes read off code that was run on numbered tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs

State = dict[str, Tensor]


def specs(
    layers: int = 2, width: int = 16, heads: int = 4, groups: int = 2, experts: int = 3
) -> dict[str, cs.TensorSpec]:
    """A decoder with grouped queries and experts."""
    head = width // heads
    found = {"model.embed.weight": (20, width), "model.norm.weight": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {
            f"{at}attn.{p}_proj.weight": (n * head, width) for p, n in (("q", heads), ("k", groups), ("v", groups))
        }
        found |= {f"{at}attn.o_proj.weight": (width, width), f"{at}norm.weight": (width,)}
        found |= {f"{at}experts.{e}.{w}": (12, width) for e in range(experts) for w in ("w1", "w3")}
        found |= {f"{at}experts.{e}.w2": (width, 12) for e in range(experts)}
    return {key: cs.TensorSpec(shape, "F32") for key, shape in found.items()}


def stacked(state: State, keys: list[str]) -> Tensor:
    return torch.stack([state[key] for key in keys])


def fused(state: State) -> State:
    """As a converter is written by hand: loops, string surgery, cat, stack and transposes."""
    made: State = {}
    for key, tensor in state.items():
        if "attn.q_proj" in key:
            parts = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            made[key.replace("model.layers", "h").replace("q_proj", "qkv")] = torch.cat(parts)
        elif "o_proj" in key:
            made[key.replace("model.layers", "h").replace("o_proj", "out")] = tensor.T.contiguous()
        elif "experts.0.w2" in key:
            listed = [k for k in state if k.startswith(key.split("experts")[0]) and k.endswith("w2")]
            made[key.replace("model.layers", "h").replace("experts.0.w2", "down")] = stacked(state, listed)
            gates, ups = ([k.replace("w2", w) for k in listed] for w in ("w1", "w3"))
            joined = torch.cat([stacked(state, gates), stacked(state, ups)], 1)
            made[key.replace("model.layers", "h").replace("experts.0.w2", "gate_up")] = joined
        elif "experts" not in key and "attn" not in key:
            made[key.replace("model.layers", "h").replace("model.", "")] = tensor
    return made


def rotary(state: State) -> State:
    """Rows of queries and keys permuted, then all three joined: two things at once."""

    def permuted(w: Tensor, heads: int) -> Tensor:
        return w.view(heads, 2, w.shape[0] // heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    made: State = {}
    for i in range(2):
        at = f"model.layers.{i}.attn."
        q, k, v = (state[f"{at}{p}_proj.weight"] for p in "qkv")
        made[f"layers.{i}.wqkv.weight"] = torch.cat([permuted(q, 4), permuted(k, 2), v])
    return made


@pytest.mark.parametrize("function", [fused, rotary])
def test_code_becomes_a_recipe_that_does_the_same_with_real_values(function: Any) -> None:
    wanted = specs()
    recipe = cs.recipes.trace(function, wanted)
    state = {key: torch.randn(spec.shape) for key, spec in wanted.items()}
    expected = function({key: tensor.clone() for key, tensor in state.items()})
    target = {key: cs.TensorSpec(tuple(t.shape), "F32") for key, t in expected.items()}
    made = cs.plan(state, recipe, target=target).state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], tensor) for key, tensor in expected.items())


def test_a_recipe_holds_for_the_other_sizes_too() -> None:
    recipe = cs.recipes.trace(fused, specs(), others=[specs(layers=3, width=32, experts=5)])
    assert "experts.{e}.w2" in str(recipe)


def test_a_function_that_computes_is_refused() -> None:
    def halved(state: State) -> State:
        return {key: tensor / 2 for key, tensor in state.items()}

    with pytest.raises(cs.RecipeError, match="makes values of its own in 17 tensors"):
        cs.recipes.trace(halved, dict(list(specs().items())[:17]))


def test_a_function_that_makes_tensors_of_its_own_is_refused_by_their_names() -> None:
    def padded(state: State) -> State:
        return {**state, "inv_freq": torch.zeros(4)}

    with pytest.raises(cs.RecipeError, match=r"not-traceable(.|\n)*inv_freq"):
        cs.recipes.trace(padded, specs())


def test_a_function_that_raises_is_named_with_what_it_raised() -> None:
    with pytest.raises(cs.RecipeError, match="KeyError: 'nowhere'"):
        cs.recipes.trace(lambda state: {"x": state["nowhere"]}, specs())


def test_a_function_that_depends_on_sizes_is_caught_by_others() -> None:
    def only_two(state: State) -> State:
        return {k: v for k, v in state.items() if not k.startswith("model.layers.2")}

    with pytest.raises(cs.RecipeError, match="not-traceable"):
        cs.recipes.trace(only_two, specs(), others=[specs(layers=3)])


def levels(blocks: int, count: int = 3) -> dict[str, cs.TensorSpec]:
    """An encoder of levels that get wider, with a shortcut where the width changes."""
    found: dict[str, tuple[int, ...]] = {"net.conv_in.weight": (4, 3)}
    width = 4
    for level in range(count):
        for block in range(blocks):
            at, out = f"net.down.{level}.block.{block}", 4 + 2 * level
            found |= {f"{at}.norm1.weight": (width,), f"{at}.conv1.weight": (out, width)}
            found |= {f"{at}.norm2.weight": (out,), f"{at}.conv2.weight": (out, out)}
            if out != width:
                found[f"{at}.nin_shortcut.weight"] = (out, width)
            width = out
    found |= {f"net.mid.attn.{part}.weight": (width, width, 1, 1) for part in "qkv"}
    return {key: cs.TensorSpec(shape, "F32") for key, shape in found.items()}


def renamed(state: State) -> State:
    """The names of one codebase as those of another: by replacing texts, as converters of single files do."""
    texts = {"net.": "", "down.": "down_blocks.", "block.": "resnets.", "nin_shortcut": "conv_shortcut"}
    texts |= {f"attn.{part}.": f"attention.to_{part}." for part in "qkv"}
    made = {}
    for key, tensor in state.items():
        name = key
        for old, new in texts.items():
            name = name.replace(old, new)
        made[name] = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
    return made


def test_rules_by_the_numbers_in_keys_hold_for_other_numbers() -> None:
    recipe = cs.recipes.trace(renamed, levels(2), others=[levels(3), levels(2, count=4)])
    state = {key: torch.rand(spec.shape) for key, spec in levels(5).items()}
    made = cs.plan(state, recipe).state_dict()
    wanted = renamed(state)
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert len(recipe.rules) < 15


def test_the_namespace_offers_what_the_top_does() -> None:
    assert cs.recipes.list() == cs.list_recipes()
    name = cs.recipes.list()[0]
    assert cs.recipes.load(name) == cs.load_recipe(name)
    assert cs.recipes.match({"nobody.calls.it.so": torch.ones(1)}) == ()


@pytest.mark.parametrize("what", ["nothing.like.it", "transformers:", "no.such.module:function"])
def test_what_is_no_mapping_is_refused(what: str) -> None:
    with pytest.raises(cs.RecipeError):
        cs.recipes.import_mapping(what, specs=specs())


def test_a_function_is_imported_with_the_layout_that_it_takes() -> None:
    with pytest.raises(cs.RecipeError, match="no-specs"):
        cs.recipes.import_mapping("json:loads")
