"""What tells equal tensors apart, what is named because nothing does, and what is too much to be looked at at once."""

from __future__ import annotations

import tracemalloc
from math import prod

import pytest
import torch
from blocks import OURS, THEIRS, block, spec

import ckptsurgery as cs


def pairs_of(found: cs.Suggestion, source: dict[str, cs.TensorSpec]) -> dict[str, str]:
    made = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, found.recipe)
    return {step.targets[0]: step.sources[0] for step in made.steps}


def test_what_only_some_layers_have_belongs_to_what_as_many_have() -> None:
    def side(block: str, convs: list[str], extra: str) -> dict[str, cs.TensorSpec]:
        found = {}
        for s in range(3):
            for b in range(3):
                names = [*convs, *([extra] if b == 0 else [])]
                for name in sorted(names) if block == "s" else names:
                    found |= {f"{block}{s}.b{b}.{name}.{l}": spec(8 << s, *d) for l, d in (("w", (4, 1)), ("b", ()))}
        return found

    source, target = side("s", ["f1", "f2"], "a"), side("stage", ["conv1", "conv2"], "side")
    pairs = pairs_of(cs.suggest(source, target), source)
    assert all(pairs.get(k, ".a.").split(".")[2] == "a" for k in target if ".side." in k)
    assert not any(".a." in v for k, v in pairs.items() if ".side." not in k)


def test_a_depthwise_kernel_keeps_height_before_width() -> None:
    source = {f"c.{i}.{n}": spec(*s) for i in range(3) for n, s in (("dw.kernel", (3, 3, 8, 1)), ("dw.bias", (8,)))}
    target = {f"l.{i}.{n}": spec(*s) for i in range(3) for n, s in (("dw.weight", (8, 1, 3, 3)), ("dw.bias", (8,)))}
    tensors = {k: torch.arange(prod(s.shape)).reshape(s.shape) for k, s in source.items()}
    made = cs.plan(tensors, cs.suggest(source, target).recipe)
    assert (made.state_dict()["l.1.dw.weight"] == torch.arange(72).reshape(3, 3, 8, 1).permute(2, 3, 0, 1)).all()


def test_queries_keys_values_and_a_feed_forward_beside_them_may_be_one() -> None:
    source = block({"norm.weight": (8,), "linear1.weight": (56, 8), "linear2.weight": (8, 40)}, "h.", 3)
    parts = {f"attn.to_{p}.weight": (8, 8) for p in "qkv"}
    target = block({"norm.weight": (8,), **parts, "proj_mlp.weight": (32, 8), "out.weight": (8, 40)}, "layers.", 3)
    found = cs.suggest(source, target)
    assert found.coverage == 1.0
    assert any("[(p rows:p) b] ->" in str(r) for r in found.recipe.rules)
    assert any(a.kind == "order" and "layers.1.proj_mlp.weight" in a.keys for a in found.assumptions)


def test_what_shifts_and_scales_is_assumed_to_keep_its_order() -> None:
    names = {"modulation.weight": (48, 8), "modulation.bias": (48,), "fc.weight": (32, 8)}
    found = cs.suggest(block(names, "h.", 3), block(names, "layers.", 3))
    assert {k for a in found.assumptions if a.kind == "chunks" for k in a.keys} == {
        f"layers.{i}.modulation.{l}" for i in range(3) for l in ("weight", "bias")
    }


def test_many_layers_of_single_tensors_under_a_number_are_all_claimed() -> None:
    spread = {f"boxes.{i}.weight": spec(4, 8) for i in range(6)}
    source = {**block({"norm.weight": (8,), "fc.weight": (32, 8)}, "h.", 6), **spread}
    target = {**block({"norm.weight": (8,), "fc.weight": (32, 8)}, "layers.", 6), **spread}
    found = cs.suggest(source, target)
    assert found.coverage == 1.0 and not found.problems


def test_what_is_too_much_to_be_looked_at_together_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = block(OURS, "h.", 4), block(THEIRS, "layers.", 4)
    whole = cs.suggest(source, target)
    monkeypatch.setattr("ckptsurgery.inference.matches._LARGEST", 300)
    parts = cs.suggest(source, target)
    assert parts.coverage > 0.5
    one, two = pairs_of(whole, source), pairs_of(parts, source)
    assert all(one[k] == v for k, v in two.items())
    monkeypatch.setattr("ckptsurgery.inference.matches._LARGEST", 3)
    assert cs.suggest(source, target).coverage == 0.0


def test_a_tensor_of_one_size_in_thousands_of_modules_fills_no_memory() -> None:
    names = ("".join(chr(97 + n // 26**k % 26) for k in range(3)) for n in range(3000))
    source = {f"{name}.scale": spec(8) for name in names}
    tracemalloc.start()
    cs.suggest(source, {k.replace(".scale", ".gain"): s for k, s in source.items()})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500 << 20


def test_norms_whose_names_do_not_tell_their_place_are_named_and_others_are_not() -> None:
    ours = {"ln_a.weight": (8,), "ln_b.weight": (8,), "fc.weight": (32, 8)}
    theirs = {"norm_x.weight": (8,), "norm_y.weight": (8,), "fc.weight": (32, 8)}
    found = cs.suggest(block(ours, "h.", 3), block(theirs, "layers.", 3))
    assert any(a.kind == "norms" and "layers.1.norm_y.weight" in a.keys for a in found.assumptions)
    told = {"norm1.weight": (8,), "norm2.weight": (8,), "fc.weight": (32, 8)}
    for other in (told, {"ln_1.weight": (8,), "ln_2.weight": (8,), "fc.weight": (32, 8)}):
        found = cs.suggest(block(told, "h.", 3), block(other, "layers.", 3))
        assert not any(a.kind == "norms" for a in found.assumptions)
