"""Stacks of layers: unequal depths, counts that coincide, towers of one width, trees beside trees."""

from __future__ import annotations

import pytest
import torch

import ckptsurgery as cs

Specs = dict[str, cs.TensorSpec]
LAYER = {"norm1": (8,), "norm2": (8,), "attn.q": (8, 8), "attn.k": (8, 8), "attn.v": (8, 8), "attn.out": (8, 8)}
FEED = {"mlp.up": (32, 8), "mlp.down": (8, 32)}
OURS = {"norm1": "ln_1", "norm2": "ln_2", "attn.q": "self_attention.query", "attn.k": "self_attention.key",
        "attn.v": "self_attention.value", "attn.out": "self_attention.output", "mlp.up": "ffn.fc1",
        "mlp.down": "ffn.fc2"}  # fmt: skip


def spec(*shape: int) -> cs.TensorSpec:
    return cs.TensorSpec(shape, "F32")


def stack(at: str, layers: int, renamed: bool = False) -> Specs:
    parts = LAYER | FEED
    return {
        f"{at}{i}.{OURS[m] if renamed else m}.weight": spec(*shape) for i in range(layers) for m, shape in parts.items()
    }


def made(found: cs.Suggestion, source: Specs) -> dict[str, tuple[str, ...]]:
    plan = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    return {k: tuple(step.sources) for step in plan.steps for k in step.targets}


@pytest.mark.parametrize(("ours", "theirs"), [(6, 12), (12, 24), (5, 8), (3, 5), (8, 5), (1, 3), (40, 24)])
def test_layers_of_stacks_of_unequal_depth_keep_their_numbers(ours: int, theirs: int) -> None:
    source = {"embed.weight": spec(50, 8), **stack("layers.", ours)}
    target = {"wte.weight": spec(50, 8), **stack("blocks.", theirs, renamed=True)}
    found = cs.suggest(source, target)
    pairs = made(found, source)
    both = min(ours, theirs)
    assert {k.split(".")[1] for k in pairs if k.startswith("blocks.")} == set(map(str, range(both)))
    assert all(v[0].split(".")[1] == k.split(".")[1] for k, v in pairs.items() if k.startswith("blocks."))
    assert len(pairs) == 1 + 8 * both
    assert any(a.kind == "depth" and "layers" in a.text for a in found.assumptions)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_an_index_that_both_sides_have_is_not_stacked(count: int) -> None:
    source, target = stack("layers.", count), stack("layers.", count)
    for i in range(count):
        for e in range(count):
            at = f"layers.{i}.moe.experts.{e}."
            source |= {at + "w1.weight": spec(24, 8), at + "w2.weight": spec(8, 24), at + "w3.weight": spec(24, 8)}
        target |= {
            f"layers.{i}.moe.experts.gate_up_proj": spec(count, 48, 8),
            f"layers.{i}.moe.experts.down_proj": spec(count, 8, 24),
        }
    found = cs.suggest(source, target)
    assert found.coverage == 1.0
    pairs = made(found, source)
    assert all({s.split(".")[1] for s in sources} == {k.split(".")[1]} for k, sources in pairs.items())


def test_towers_of_equal_width_are_told_apart_by_their_names() -> None:
    source = stack("text_model.layers.", 3) | stack("vision_model.layers.", 3)
    target = stack("visual.blocks.", 3, renamed=True) | stack("language.blocks.", 3, renamed=True)
    found = cs.suggest(source, target)
    pairs = made(found, source)
    assert len(pairs) == len(target)
    assert all(v[0].startswith("vision") == k.startswith("visual") for k, v in pairs.items())


def test_a_tower_that_reads_words_gives_nothing_to_one_that_reads_images() -> None:
    source = {"token_embedding.weight": spec(50, 8), **stack("layers.", 3)}
    target = {"patch_embed.proj.weight": spec(8, 3, 4, 4), **stack("blocks.", 3, renamed=True)}
    assert made(cs.suggest(source, target), source) == {}


def test_a_feed_forward_does_not_go_into_a_mixture_of_experts() -> None:
    source = stack("layers.", 4)
    target = {k: s for k, s in stack("layers.", 4).items() if ".mlp." not in k}
    for i in range(4):
        target |= {f"layers.{i}.moe.up": spec(4, 32, 8), f"layers.{i}.moe.down": spec(4, 8, 32)}
    pairs = made(cs.suggest(source, target), source)
    assert not any("moe" in k for k in pairs)
    assert len(pairs) == 4 * len(LAYER)


@pytest.mark.parametrize("names", [("model.", "ema."), ("ema.", "model.")])
def test_of_weights_and_their_averages_the_weights_are_used_and_that_is_said(names: tuple[str, str]) -> None:
    source = stack(f"{names[0]}layers.", 3) | stack(f"{names[1]}layers.", 3)
    target = stack("blocks.", 3, renamed=True)
    found = cs.suggest(source, target)
    assert all(v[0].startswith("model.") for v in made(found, source).values())
    (tree,) = [a for a in found.assumptions if a.kind == "tree"]
    assert set(tree.keys) == set(target)


def test_one_table_serves_every_layer() -> None:
    source = stack("block.", 3) | {"block.0.attn.relative_attention_bias.weight": spec(16, 4)}
    target = stack("layer.", 3, renamed=True)
    target |= {f"layer.{i}.self_attention.relative_attention_bias": spec(16, 4) for i in range(3)}
    found = cs.suggest(source, target)
    assert found.coverage == 1.0
    assert len([a for a in found.assumptions if a.kind == "tied"]) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_unequal_depths_do_not_depend_on_the_order_of_the_keys(seed: int) -> None:
    import random

    draw = random.Random(seed)
    source, target = stack("layers.", 5), stack("blocks.", 8, renamed=True)
    mixed = [{k: side[k] for k in draw.sample(list(side), len(side))} for side in (source, target)]
    ordered = [dict(sorted(side.items())) for side in (source, target)]
    assert str(cs.suggest(*mixed).recipe) == str(cs.suggest(*ordered).recipe)


def unet(flat: bool, widths: tuple[int, ...] = (8, 16, 24)) -> Specs:
    """A network that narrows and widens: blocks counted through, or by stage and place."""
    found: Specs = {}

    def add(ours: str, theirs: str, *shape: int) -> None:
        found[(ours if flat else theirs) + ".weight"] = spec(*shape)

    def block(ours: str, theirs: str, before: int, after: int) -> None:
        add(ours + ".0.in_layers.0", theirs.format("resnets") + ".norm1", before)
        add(ours + ".0.in_layers.2", theirs.format("resnets") + ".conv1", after, before, 3, 3)
        add(ours + ".0.out_layers.0", theirs.format("resnets") + ".norm2", after)
        add(ours + ".0.out_layers.3", theirs.format("resnets") + ".conv2", after, after, 3, 3)
        add(ours + ".1.norm", theirs.format("attentions") + ".group_norm", after)
        for part in "qkv":
            add(f"{ours}.1.{part}", f"{theirs.format('attentions')}.to_{part}", after, after)

    width, number, skips = widths[0], 0, []
    for stage, wide in enumerate(widths):
        for place in range(2):
            block(f"input_blocks.{number}", f"down_blocks.{stage}.{{}}.{place}", width, wide)
            width, number = wide, number + 1
            skips.append(width)
    number = 0
    for stage, wide in enumerate(reversed(widths)):
        for place in range(2):
            block(f"output_blocks.{number}", f"up_blocks.{stage}.{{}}.{place}", width + skips.pop(), wide)
            width, number = wide, number + 1
    return found


def test_blocks_that_are_counted_through_go_to_stages_and_places() -> None:
    source, target = unet(True), unet(False)
    pairs = made(cs.suggest(source, target), source)
    assert pairs == {theirs: (ours,) for ours, theirs in zip(source, target)}
