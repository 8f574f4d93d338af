"""Parts that only one side has stay open: an attention, a norm, copies of the weights, another network."""

from __future__ import annotations

import pytest
import torch
from blocks import spec

import ckptsurgery as cs

D, I, V = 16, 40, 21
LAYERS = range(3)
Specs = dict[str, cs.TensorSpec]


def dense(at: str, rows: int, columns: int, bias: bool = True) -> Specs:
    return {f"{at}.weight": spec(rows, columns)} | ({f"{at}.bias": spec(rows)} if bias else {})


def decoder(cross: bool = True) -> Specs:
    found: Specs = {}
    for i in LAYERS:
        at = f"decoder.layers.{i}."
        for name in ("self_attn", "encoder_attn") if cross else ("self_attn",):
            for m in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= dense(f"{at}{name}.{m}", D, D)
            found |= {f"{at}{name}_layer_norm.weight": spec(D), f"{at}{name}_layer_norm.bias": spec(D)}
        found |= dense(f"{at}fc1", I, D) | dense(f"{at}fc2", D, I)
        found |= {f"{at}final_layer_norm.weight": spec(D), f"{at}final_layer_norm.bias": spec(D)}
    return found


def engine() -> Specs:
    """The same decoder where the second attention is called nothing but that."""
    found: Specs = {}
    for i in LAYERS:
        at = f"dec/layer_{i}/"
        for name in ("self_attention", "attention", "ffn"):
            found |= {f"{at}{name}/layer_norm/gamma": spec(D), f"{at}{name}/layer_norm/beta": spec(D)}
        for name, shapes in (("self_attention", ((3 * D, D), (D, D))), ("attention", ((D, D), (2 * D, D), (D, D)))):
            for n, shape in enumerate(shapes):
                found |= {f"{at}{name}/linear_{n}/weight": spec(*shape), f"{at}{name}/linear_{n}/bias": spec(shape[0])}
        for n, shape in enumerate(((I, D), (D, I))):
            found |= {f"{at}ffn/linear_{n}/weight": spec(*shape), f"{at}ffn/linear_{n}/bias": spec(shape[0])}
    return found


def made(source: Specs, target: Specs) -> dict[str, set[str]]:
    plan = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, cs.suggest(source, target).recipe)
    return {k: set(step.sources) for step in plan.steps for k in step.targets}


def test_an_attention_beside_a_self_attention_is_the_cross_attention() -> None:
    pairs = made(decoder(), engine())
    assert set(pairs) == set(engine())
    for key, sources in pairs.items():
        if "attention" in key:
            assert all(("encoder_attn" in s) != ("/self_attention/" in key) for s in sources)


def test_a_missing_cross_attention_takes_nothing_of_the_self_attention() -> None:
    pairs = made(decoder(cross=False), engine())
    assert set(pairs) == {k for k in engine() if "/attention/" not in k}


@pytest.mark.parametrize("lost", ["self_attn", "encoder_attn", "final"])
def test_a_missing_norm_is_not_replaced_by_another(lost: str) -> None:
    source = {k: s for k, s in decoder().items() if f"{lost}_layer_norm" not in k}
    target = {
        k.replace("self_attn_layer", "self").replace("encoder_attn_layer", "cross").replace("final_layer", "ffn"): s
        for k, s in decoder().items()
    }
    gone = {"self_attn": "self_norm", "encoder_attn": "cross_norm", "final": "ffn_norm"}[lost]
    assert set(made(source, target)) == {k for k in target if gone not in k}


@pytest.mark.parametrize("copy", ["ema.{}", "{}/ExponentialMovingAverage", "{}/adam_m"])
def test_copies_of_the_weights_are_left_out_and_said(copy: str) -> None:
    slashed = "/" in copy
    network = {k.replace(".", "/") if slashed else k: s for k, s in decoder().items()}
    source = network | {copy.format(k): s for k, s in network.items()}
    target = {k.replace("decoder.", "dec.").replace("fc", "linear"): s for k, s in decoder().items()}
    found = cs.suggest(source, target)
    pairs = made(source, target)
    assert set(pairs) == set(target)
    assert not {s for sources in pairs.values() for s in sources} - set(network)
    assert [set(a.keys) for a in found.assumptions if a.kind == "tree"] == [set(target)]


def test_modules_that_own_other_tensors_are_no_common_ground() -> None:
    source = {"tokens.weight": spec(V, D)}
    target = {"embed.weight": spec(V, D), "lm_head.weight": spec(V, D)}
    for i in LAYERS:
        for ours, theirs in (("attention.query", "attn.q"), ("attention.out", "attn.o"), ("norm", "norm")):
            shape = (D,) if ours == "norm" else (D, D)
            source[f"h.{i}.{ours}.weight"] = target[f"layers.{i}.{theirs}.weight"] = spec(*shape)
            target[f"layers.{i}.{theirs}.bias"] = spec(D)
    assert made(source, target) == {}


def test_first_and_second_count() -> None:
    source: Specs = {}
    target: Specs = {}
    for i in LAYERS:
        for n, word in enumerate(("first", "second"), 1):
            for m, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out")):
                source |= dense(f"h.{i}.{word}_attention.{m}", D, D)
                target |= dense(f"b.{i}.attn{n}.{theirs}", D, D)
            source |= {f"h.{i}.{word}_norm.weight": spec(D)}
            target |= {f"b.{i}.norm{n}.weight": spec(D)}
        source |= dense(f"h.{i}.fc_in", I, D) | dense(f"h.{i}.fc_out", D, I)
        target |= dense(f"b.{i}.ff.0", I, D) | dense(f"b.{i}.ff.2", D, I)
    pairs = made(dict(sorted(source.items())), target)
    assert set(pairs) == set(target)
    named = {k: next(iter(v)) for k, v in pairs.items() if "attn" in k or "norm" in k}
    assert all(("attn1" in k or "norm1" in k) == ("first" in v) for k, v in named.items())


def test_up_and_down_are_told_by_their_words_in_any_order() -> None:
    ours = {f"h.{i}.mlp.{m}.weight": spec(*s) for i in LAYERS for m, s in (("down_proj", (D, I)), ("up_proj", (I, D)))}
    theirs = {f"b.{i}.ff.{m}.kernel": spec(*s) for i in LAYERS for m, s in (("up", (D, I)), ("down", (I, D)))}
    pairs = made(ours, theirs)
    assert set(pairs) == set(theirs)
    assert all(("up_proj" in next(iter(v))) == ("ff.up" in k) for k, v in pairs.items())
