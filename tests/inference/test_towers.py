"""Networks of two towers of equal width, of which one is missing on one side."""

from __future__ import annotations

import pytest

import ckptsurgery as cs
from ckptsurgery.planning.planner import make_plan

Specs = dict[str, cs.TensorSpec]
LEAVES = {"ln_1": (8,), "ln_2": (8,), "attn.out": (8, 8), "mlp.up": (32, 8), "mlp.down": (8, 32)}


def side(text: str, image: str, layers: str, table: str, patches: str) -> Specs:
    """Both towers, each with what reads its input."""
    shapes: dict[str, tuple[int, ...]] = {f"{text}{table}.weight": (50, 8), f"{image}{patches}.weight": (8, 3, 4, 4)}
    for tower in (text, image):
        shapes |= {f"{tower}{layers}.{i}.{leaf}.weight": s for i in range(3) for leaf, s in LEAVES.items()}
        shapes |= {f"{tower}final_norm.weight": (8,)}
    return {k: cs.TensorSpec(s, "F32") for k, s in shapes.items()}


SIDES = {
    "called by their inputs": side("text_model.", "vision_model.", "layers", "token_embedding", "patch_embedding"),
    "one without a name": side("", "visual.", "blocks", "token_embedding", "conv1"),
    "short": side("txt.", "img.", "layers", "embedding", "patch_embed"),
}


@pytest.mark.parametrize("rest", [False, True], ids=["whole", "layers"])
@pytest.mark.parametrize("cut", ["text", "image"])
@pytest.mark.parametrize("source", SIDES)
@pytest.mark.parametrize("target", SIDES)
def test_a_missing_tower_is_not_made_of_the_other(source: str, target: str, cut: str, rest: bool) -> None:
    def of(name: str, key: str) -> str:
        return "image" if key.startswith(("vision_model.", "visual.", "img.")) else "text"

    def gone(name: str, key: str) -> bool:
        return of(name, key) == cut and (not rest or any(f".{i}." in key for i in range(3)))

    specs = {k: s for k, s in SIDES[source].items() if not gone(source, k)}
    found = cs.suggest(specs, SIDES[target])
    plan = make_plan(specs, found.recipe, lambda name: found.recipe)
    layers = [k for k in SIDES[target] if any(f".{i}." in k for i in range(3))]
    assert {k for k in layers if k in plan.specs} == {k for k in layers if of(target, k) != cut}
