"""An adapter in eight layouts, from each to each: the merged weights are those that PEFT makes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

DATA = Path(__file__).parent.parent / "data" / "adapters" / "decoder"
Tensors = dict[str, Tensor]

STACKED = Recipe(
    [
        "layers.{i}.experts.{e}.{m:gate,up}.weight [f d] -> layers.{i}.experts.gate_up [e (m f) d]",
        "layers.{i}.experts.{e}.down.weight [d f] -> layers.{i}.experts.down [e d f]",
    ],
    rest="keep",
    dims={"e": 3},
)
PLAIN = Recipe(rest="keep")
FUSED = Recipe(
    ["layers.{i}.attn.{p:q,k,v}.{l} [rows:p ...] -> h.{i}.qkv.{l} [(p rows:p) ...]"],
    rest="keep",
    dims={"rows": {"q": 8, "k": 4, "v": 4}},
)
GROUPED = Recipe(
    ["layers.{i}.attn.{p:q,k,v}.{l} [(g rows:p) ...] -> D.{i}.linear_qkv.{l} [(g p rows:p) ...]"],
    rest="keep",
    dims={"g": 2, "rows": {"q": 4, "k": 2, "v": 2}},
)


def peft(pairs: Tensors, base: Tensors, folder: Path) -> Path:
    return Path(cs.adapters.convert(pairs, base, folder / "peft", "peft"))


def peft_before_019(pairs: Tensors, base: Tensors, folder: Path) -> Path:
    """Stacked experts [e, out, in] as PEFT stored them before 0.19: it took the first side for the inputs."""
    place = peft(pairs, base, folder)
    state = load_file(place / "adapter_model.safetensors")
    config = json.loads((place / "adapter_config.json").read_text())
    for key in [key for key in state if ".experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        a, b = state[key], state[other]
        rank = a.shape[0] // 3
        state[key] = b.reshape(len(b), rank, 3).permute(2, 1, 0).reshape(-1, len(b)).contiguous()
        state[other] = a.reshape(3, rank, -1).permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(state, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    return place


def three_dims(pairs: Tensors, base: Tensors, folder: Path) -> Path:
    """Stacked pairs apart by expert, as vLLM holds them."""
    recipe = Recipe(
        [
            "{k...}.experts.{m}.lora_A.weight [(e r) d] -> {k...}.experts.{m}.lora_A.weight [e r d]",
            "{k...}.experts.{m}.lora_B.weight [o (r e)] -> {k...}.experts.{m}.lora_B.weight [e o r]",
        ],
        rest="keep",
        dims={"e": 3},
    )
    cs.plan(pairs, recipe).save(folder / "x.safetensors")
    return folder / "x.safetensors"


def two_dims(place: Path, base: Tensors, folder: Path) -> Tensors:
    recipe = Recipe(
        [
            "{k...}.experts.{m}.lora_A.weight [e r d] -> {k...}.experts.{m}.lora_A.weight [(e r) d]",
            "{k...}.experts.{m}.lora_B.weight [e o r] -> {k...}.experts.{m}.lora_B.weight [o (r e)]",
        ],
        rest="keep",
        dims={"e": 3},
    )
    return cs.plan(place, recipe).state_dict()


def kohya(pairs: Tensors, base: Tensors, folder: Path) -> Path:
    return Path(cs.adapters.convert(pairs, base, folder / "k.safetensors", "kohya"))


def diffusers(pairs: Tensors, base: Tensors, folder: Path) -> Path:
    return Path(cs.adapters.convert(pairs, base, folder / "d.safetensors", "diffusers"))


def bare(place: Path, base: Tensors, folder: Path) -> Tensors:
    """Pairs under the names of the base, with no scale."""
    return cs.open(cs.adapters.convert(place, base, folder / "bare.safetensors", "diffusers")).state_dict()


@dataclass(frozen=True)
class Layout:
    """A layout of weights, and of an adapter for these.

    Args:
        recipe: from single projections and experts to the layout.
        write: pairs with the names of the weights -> the adapter. read: the way back.
    """

    recipe: Recipe
    write: Callable[[Tensors, Tensors, Path], Path]
    read: Callable[[Path, Tensors, Path], Tensors] = bare


LAYOUTS = {
    "peft": Layout(STACKED, peft),
    "peft before 0.19": Layout(STACKED, peft_before_019),
    "peft, per expert": Layout(PLAIN, peft),
    "vllm, 3-D": Layout(STACKED, three_dims, two_dims),
    "kohya": Layout(PLAIN, kohya),
    "diffusers": Layout(PLAIN, diffusers),
    "litgpt": Layout(FUSED, diffusers),
    "megatron": Layout(GROUPED, peft),
}


def single(name: str) -> Tensors:
    """A model of the data, with experts one by one; parameters in the order of the module."""
    state = load_file(DATA / name)
    return cs.plan(dict(reversed(state.items())), STACKED.inverse()).state_dict()


def in_layout(layout: Layout, state: Tensors) -> Tensors:
    return cs.plan(state, layout.recipe).state_dict()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapter of PEFT in each layout."""
    folder, stacked = tmp_path_factory.mktemp("adapters"), in_layout(LAYOUTS["peft"], single("base.safetensors"))
    pairs = bare(DATA / "adapter", stacked, folder)
    alone = cs.plan(pairs, STACKED.inverse().adapters(prefix="")).state_dict()
    found = {"peft": DATA / "adapter"}
    for name, layout in list(LAYOUTS.items())[1:]:
        (folder / name).mkdir()
        base = in_layout(layout, single("base.safetensors"))
        found[name] = layout.write(cs.plan(alone, layout.recipe.adapters(prefix="")).state_dict(), base, folder / name)
    return found


def check(layout: Layout, adapter: Path) -> None:
    made = cs.adapters.merge(in_layout(layout, single("base.safetensors")), adapter).state_dict()
    wanted = in_layout(layout, single("merged.safetensors"))
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_merges_as_peft_does(name: str, adapters: dict[str, Path]) -> None:
    check(LAYOUTS[name], adapters[name])


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_becomes_every_other(source: str, target: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    old, new, base = LAYOUTS[source], LAYOUTS[target], single("base.safetensors")
    pairs = old.read(adapters[source], in_layout(old, base), tmp_path)
    alone = cs.plan(pairs, old.recipe.inverse().adapters(prefix="")).state_dict()
    made = cs.plan(alone, new.recipe.adapters(prefix="")).state_dict()
    check(new, new.write(made, in_layout(new, base), tmp_path))


def test_ranks_that_grow_are_named() -> None:
    assert "ranks and alpha grow: h.{i}.qkv.{l} 3 x" in FUSED.adapters().summary
    assert "experts.gate_up 2 x" in STACKED.adapters().summary
    assert "grow" not in FUSED.inverse().adapters().summary


@pytest.mark.parametrize("name", ["litgpt", "megatron"])
@pytest.mark.parametrize("parts", [("q",), ("q", "v"), ("k",)])
def test_an_adapter_of_some_parts_is_merged_into_a_fused_base(name: str, parts: tuple[str, ...]) -> None:
    layout, base = LAYOUTS[name], single("base.safetensors")
    tensors = load_file(DATA / "adapter" / "adapter_model.safetensors")
    some = {key: tensor for key, tensor in tensors.items() if any(f".attn.{part}." in key for part in parts)}
    wanted = in_layout(layout, cs.adapters.merge(base, some).state_dict())
    made = cs.adapters.merge(in_layout(layout, base), some, recipe=layout.recipe)
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, wanted[key])
    assert sum(step.kind == "compute" for step in made.steps) == 1
    with pytest.raises(cs.CkptSurgeryError) as caught:
        cs.adapters.merge(in_layout(layout, base), some)
    assert caught.value.diagnostics[0].code == "adapter-unmatched"


@pytest.mark.parametrize("trained", ["qkv", "qv", "kv", "q", "k"])
@pytest.mark.parametrize("groups", [2, 4])
def test_pairs_of_a_fused_layer_in_one_a_and_one_b_are_taken_apart(trained: str, groups: int) -> None:
    """LitGPT keeps the pairs of a fused layer below each other, those of its trained parts, and pads by zeros."""
    rank, width, heads, alpha = 3, 8, 4, 6.0
    rows = {"q": heads * 2, "k": groups * 2, "v": groups * 2}
    generator = torch.Generator().manual_seed(groups)
    base = {"h.0.qkv.weight": torch.randn(sum(rows.values()), width, generator=generator), "norm": torch.ones(width)}
    a = torch.randn(rank * len(trained), width, generator=generator)
    b = torch.randn(sum(rows[part] for part in trained), rank, generator=generator)
    parts = ",".join(trained)
    pairs = cs.plan(
        {"h.0.qkv.lora_A": a, "h.0.qkv.lora_B": b},
        cs.Recipe(
            [
                f"h.{{i}}.qkv.lora_A [(p r) d] -> h.{{i}}.{{p:{parts}}}.lora_A.weight [r d]",
                f"h.{{i}}.qkv.lora_B [(p o:p) r] -> h.{{i}}.{{p:{parts}}}.lora_B.weight [o:p r]",
            ],
            dims={"o": {part: rows[part] for part in trained}},
        ),
    ).state_dict()
    apart = cs.Recipe(["h.{i}.{p:q,k,v}.weight [o:p d] -> h.{i}.qkv.weight [(p o:p) d]"], rest="keep", dims={"o": rows})
    merged = cs.adapters.merge(base, pairs, recipe=apart, weights=[alpha / rank]).state_dict()

    starts = {"q": 0, "k": rows["q"], "v": rows["q"] + rows["k"]}
    want, at = base["h.0.qkv.weight"].clone(), 0
    for number, part in enumerate(trained):
        update = b[at : at + rows[part]] @ a[number * rank : (number + 1) * rank]
        want[starts[part] : starts[part] + rows[part]] += alpha / rank * update
        at += rows[part]
    torch.testing.assert_close(merged["h.0.qkv.weight"], want, rtol=0, atol=1e-6)
    assert torch.equal(merged["norm"], base["norm"])
