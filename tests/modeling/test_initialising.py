"""First values: by name alone, by the model's own hooks, and never a bit changed elsewhere."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from ckptsurgery.errors import LoadError, RecipeError
from ckptsurgery.modeling.init_checks import check_init
from ckptsurgery.modeling.initialising import initialise, materialise_buffers, read_initialiser
from ckptsurgery.modeling.places import named_tensors
from ckptsurgery.modeling.ties import find_ties, tie
from ckptsurgery.ops.initialisers import Initialiser
from ckptsurgery.ops.seeding import generator_for

ENCODER = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {n: t.detach().flatten().view(torch.uint8).numpy().tobytes() for n, t in named_tensors(model).items()}


def codes(caught: pytest.ExceptionInfo[LoadError]) -> list[str]:
    return [d.code for d in caught.value.diagnostics]


class Head(nn.Module):
    """Made as vision libraries make theirs: its hook draws what `reset_parameters` would not."""

    def __init__(self, hook: str = "_init_weights") -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 100)
        if hook == "_init_weights":
            self._init_weights = self.init_module
            self.apply(self._init_weights)
        elif hook == "init_weights":
            self.init_weights = self.init_all
            self.init_weights()

    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def init_all(self, mode: str = "") -> None:
        self.apply(self.init_module)
        nn.init.normal_(self.cls_token, std=1e-6)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.MultiheadAttention(4, 2))


def test_a_formula_draws_from_the_stream_of_its_seed_and_name() -> None:
    model = plain()
    (row,) = initialise(model, {"2.weight": "kaiming_normal(nonlinearity=relu)"}, seed=9)
    expected = torch.empty(3, 5)
    nn.init.kaiming_normal_(expected, nonlinearity="relu", generator=generator_for(9, "2.weight"))
    assert torch.equal(model[2].weight, expected)
    assert str(row) == "2.weight  F32 [3, 5]  kaiming_normal(nonlinearity=relu) (formula, seed 9)"


RULES = {"0": "default", "1": "default", "2.weight": "orthogonal", "2.bias": "normal(std=0.1)", "3": "default"}


@given(st.permutations(list(RULES)), st.integers(0, 3))
@settings(max_examples=25)
def test_order_and_company_do_not_change_what_is_drawn(order: list[str], seed: int) -> None:
    together, apart = plain(), plain()
    initialise(together, {key: RULES[key] for key in order}, seed)
    for key in reversed(order):
        for name in (n for n in named_tensors(apart) if n == key or n.startswith(key + ".")):
            initialise(apart, {name: RULES[key]}, seed)
    assert bits(together) == bits(apart)


@pytest.mark.parametrize("what", ["default", "xavier_uniform", "sparse(0.5)", lambda t: t.normal_()])
def test_the_global_generators_stay_as_they_were(what: object) -> None:
    model = Head()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    initialise(model, {"head.weight": what})  # type: ignore[dict-item]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tobytes())


@pytest.mark.parametrize("hook", ["_init_weights", "init_weights"])
def test_default_is_what_the_models_own_hook_draws(hook: str) -> None:
    model = Head(hook)
    nn.init.constant_(model.head.weight, 5)
    nn.init.constant_(model.head.bias, 5)
    rows = initialise(model, {"head": "default"})
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05) and not model.head.bias.any()
    assert [r.by for r in rows] == [f"Head.{hook}"] * 2


def test_default_is_the_layers_own_where_the_model_has_no_hook() -> None:
    model = Head("none")
    (row, _) = initialise(model, {"head": "default"})
    assert model.head.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert row.by == "Linear.reset_parameters"


def test_default_keeps_every_bit_of_what_was_not_named() -> None:
    for name in ("head.weight", "head.bias", "norm.weight"):
        model = Head("init_weights")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        before, objects = bits(model), dict(model.named_parameters())
        initialise(model, {name: "default"})
        after = bits(model)
        assert {n for n in before if before[n] != after[n]} == {name}
        assert all(p is objects[n] and p.requires_grad for n, p in model.named_parameters())


def test_a_bare_parameter_is_initialised_by_the_models_hook_or_refused_by_name() -> None:
    model = Head("init_weights")
    initialise(model, {"cls_token": "default"})
    assert 1e-7 < model.cls_token.std() < 1e-5
    for hook in ("_init_weights", "none"):
        model = Head(hook)
        before = bits(model)
        with pytest.raises(LoadError, match="'cls_token' has no default") as caught:
            initialise(model, {"cls_token": "default", "head": "default"})
        assert codes(caught) == ["no-default"] and bits(model) == before
        assert '"cls_token": "trunc_normal(std=0.02)"' in (caught.value.diagnostics[0].help or "")
        initialise(model, {"cls_token": "trunc_normal(std=0.02)"})


def test_norms_and_their_running_statistics_are_reset() -> None:
    model = plain()
    model[1](torch.randn(6, 5))
    assert model[1].num_batches_tracked == 1
    rows = initialise(model, {"1": "default"})
    assert [r.name for r in rows] == [
        f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    fresh = nn.BatchNorm1d(5)
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in model[1].state_dict().items())


def test_attention_gets_what_its_constructor_gives() -> None:
    model = nn.MultiheadAttention(64, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    rows = {
        r.name: r.by
        for r in initialise(model, {"in_proj_weight": "default", "in_proj_bias": "default", "out_proj": "default"})
    }
    bound = math.sqrt(6 / (64 + 192))
    assert bound * 0.98 < model.in_proj_weight.abs().max() <= bound and not model.in_proj_bias.any()
    assert not model.out_proj.bias.any() and 0 < model.out_proj.weight.abs().max() <= 1 / 8
    assert rows["out_proj.bias"] == "MultiheadAttention._reset_parameters"


def test_hooks_that_write_through_data_count_as_well() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, Old):
                module.scale.data.fill_(7)

    model = Old()
    (row,) = initialise(model, {"scale": "default"})
    assert model.scale.tolist() == [7, 7, 7] and row.by == "Old._init_weights"


def test_a_hook_that_replaces_the_parameter_replaces_its_values_only() -> None:
    class Replacing(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.full((2, 2), 0.5))

    model = Replacing(2, 2)
    weight = model.weight
    initialise(model, {"weight": "default"})
    assert model.weight is weight and (weight == 0.5).all()


def test_what_a_hook_registers_is_gone_afterwards() -> None:
    class Registering(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            self.register_buffer("fan", torch.ones(1), persistent=False)
            self.register_parameter("scale", nn.Parameter(torch.ones(1)))

    model = Registering(2, 2)
    del model.fan, model.scale
    initialise(model, {"weight": "default"})
    assert list(named_tensors(model)) == ["weight", "bias"] and not model._non_persistent_buffers_set


def test_a_hook_that_reads_its_neighbours_reads_their_values() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.zeros(2))

        def reset_parameters(self) -> None:
            nn.init.constant_(self.b, self.a.sum().item())

    model = Reading()
    initialise(model, {"b": "default"})
    assert model.b.tolist() == [6, 6] and model.a.tolist() == [3, 3]


def test_a_hook_that_raises_is_named_and_changes_nothing() -> None:
    class Broken(nn.Linear):
        def reset_parameters(self) -> None:
            if hasattr(self, "ready"):
                raise ZeroDivisionError("no luck")

    model = Broken(2, 2)
    for parameter in model.parameters():  # no hook has filled them, and memory may hold NaN
        nn.init.ones_(parameter)
    model.ready = True
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(LoadError, match="ZeroDivisionError: no luck") as caught:
        initialise(model, {"weight": "default"})
    assert codes(caught) == ["init-hook-failed"]
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_parametrised_weights_have_no_default_and_take_a_formula() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(LoadError, match=r"parametrizations\.weight\.original1' has no default"):
        initialise(model, {"parametrizations.weight.original1": "default"})
    initialise(model, {"parametrizations.weight.original1": "orthogonal"})


def test_own_leaves_what_was_built_and_says_so() -> None:
    model = plain()
    before = bits(model)
    assert {r.by for r in initialise(model, {"0": "own()", "1": "own"})} == {"as built"} and bits(model) == before
    with torch.device("meta"):
        model = plain()
    with pytest.raises(LoadError, match="nothing was built"):
        initialise(model, {"0": "own"})


def test_ties_survive_and_are_filled_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    tie(model, "1.weight", to="0.weight")
    rows = initialise(model, {"1.weight": "normal(std=2.0)"}, seed=1)
    assert [(r.name, r.by) for r in rows] == [("0.weight", "formula"), ("1.weight", "tied to 0.weight")]
    assert model[0].weight is model[1].weight
    once = model[0].weight.detach().clone()
    initialise(model, {"0.weight": "normal(std=2.0)"}, seed=1)
    assert torch.equal(once, model[1].weight)
    with pytest.raises(LoadError, match=r"zeros by '0' and ones by '1\.weight'") as caught:
        initialise(model, {"0": "zeros", "1.weight": "ones"})
    assert codes(caught) == ["initialised-twice"]


def test_tensors_of_a_meta_model_become_real_and_stay_tied() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=99, n_positions=8, bos_token_id=0, eos_token_id=0)
        )
    initialise(model, {"lm_head.weight": "default", "transformer.h.0.mlp.c_fc.weight": "lecun_normal"})
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert {n for n, t in named_tensors(model).items() if not t.is_meta} == {
        *("lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight")
    }


def test_every_problem_is_told_at_once_and_nothing_is_changed() -> None:
    model = plain()
    before = bits(model)
    with pytest.raises(LoadError) as caught:
        initialise(
            model,
            {"0": "xavier_uniform", "heed": "zeros", "2.weight": "xavir_normal", "1.weight": "zeros", "1": "ones"},
        )
    assert sorted(codes(caught)) == ["bad-initialiser", "cannot-initialise", "initialised-twice", "nothing-selected"]
    assert "xavier_uniform cannot fill '0.bias': xavier_uniform needs at least 2 dimensions" in str(caught.value)
    assert bits(model) == before


def test_initialisers_are_read_from_text_calls_and_callables() -> None:
    assert read_initialiser("normal(0, 0.5)") == Initialiser.of("normal", (0, 0.5))
    assert read_initialiser(nn.init.ones_).name == "ones_"
    with pytest.raises(RecipeError, match="bad-call"):
        read_initialiser("normal(")
    with pytest.raises(LoadError, match="did you mean 'std'"):
        read_initialiser("normal(stdd=1)")


def test_a_callable_that_raises_leaves_the_model_whole() -> None:
    def broken(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.fill_(9)
        raise KeyError("mine")

    model = plain()
    before = bits(model)
    with pytest.raises(KeyError):
        initialise(model, {"0.weight": "zeros", "2.weight": broken})
    assert bits(model) == before


def test_a_real_classifier_is_initialised_by_its_librarys_hook() -> None:
    model = BertForSequenceClassification(BertConfig(**ENCODER, num_labels=50, initializer_range=0.5))
    kept = bits(model)
    rows = initialise(model, {"classifier": "default"})
    assert model.classifier.weight.std().item() == pytest.approx(0.5, rel=0.05) and not model.classifier.bias.any()
    assert {r.by for r in rows} == {"BertForSequenceClassification._init_weights"}
    assert {n for n, b in bits(model).items() if b != kept[n]} == {"classifier.weight"}


def test_a_real_decoder_gets_the_scaled_projections_of_its_library() -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=99, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    rows = initialise(model, {"transformer": "default"})
    attention = model.transformer.h[1].attn
    assert attention.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert attention.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert len(find_ties(model)) == 1 and len(rows) == len(list(named_tensors(model)))


def test_bare_tokens_of_a_real_model_come_from_its_hook() -> None:
    model = ViTForImageClassification(ViTConfig(**ENCODER, image_size=32, patch_size=8))
    nn.init.zeros_(model.vit.embeddings.cls_token)
    (row,) = initialise(model, {"vit.embeddings.cls_token": "default"})
    assert model.vit.embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.4) and "_init_weights" in row.by


def test_what_was_loaded_before_does_not_keep_a_hook_from_drawing() -> None:
    model = BertForSequenceClassification(BertConfig(**ENCODER))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    nn.init.constant_(model.classifier.weight, 9)
    initialise(model, {"classifier.weight": "default"})
    assert model.classifier.weight.abs().max() < 1
    assert all(p._is_hf_initialized for p in model.parameters())


def test_buffers_that_no_file_holds_are_computed_by_hooks() -> None:
    decoder = LlamaConfig(**ENCODER, vocab_size=20)
    for build in (lambda: LlamaForCausalLM(decoder), lambda: BertForSequenceClassification(BertConfig(**ENCODER))):
        with torch.device("meta"):
            model = build()
        names = materialise_buffers(model)
        real = named_tensors(build())
        assert names and all(torch.equal(named_tensors(model)[n], real[n]) for n in names)
        assert all(p.is_meta for p in model.parameters()) and materialise_buffers(model) == ()


class Rotary(nn.Module):
    def __init__(self, hook: bool) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.register_buffer("kept", torch.arange(4.0))
        if hook:
            self.init_non_persistent_buffers = self.compute

    def compute(self) -> None:
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def test_buffers_that_nothing_computes_are_refused_by_name() -> None:
    with torch.device("meta"):
        model, lost = nn.ModuleDict({"a": Rotary(True)}), nn.ModuleDict({"a": Rotary(True), "b": Rotary(False)})
    assert materialise_buffers(model) == ("a.frequencies",)
    assert model["a"].frequencies.tolist() == [0, 1, 2, 3] and model["a"].kept.is_meta
    with pytest.raises(LoadError, match=r"'b\.frequencies'") as caught:
        materialise_buffers(lost)
    assert codes(caught) == ["meta-buffers"] and lost["a"].frequencies.is_meta
    assert "skeleton" in (caught.value.diagnostics[0].help or "")


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("zeros", "zero-weights"),
        ("constant(0.1)", "equal-weights"),
        ("normal(std=1e-7)", "vanishing-scale"),
        ("normal(std=100)", "exploding-scale"),
        ("xavier_uniform", ""),
        ("default", ""),
        ("trunc_normal(std=0.02)", ""),
    ],
)
def test_values_that_cannot_train_are_warned_of(what: str, code: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(3, 4, 3))
    initialise(model, {"{i}.weight": what})
    found = check_init(model)
    assert {d.code for d in found} == ({code} if code else set()) and len(found) in (0, 2)
    assert all(d.severity == "warning" for d in found)


def test_values_that_are_not_finite_are_warned_of_wherever_they_lie() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, math.inf)
    assert [d.headline for d in check_init(model)] == ["'bias' [2] holds 2 values that are not finite"]


def test_warnings_pass_over_what_is_frozen_meta_or_not_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model[0].requires_grad_(False)
    assert [d.headline for d in check_init(model)] == ["'1.weight' [4, 4] is all zeros"]
    assert check_init(model, names={"2.weight"}) == ()
    assert check_init(model.to("meta")) == ()


def test_lazy_modules_stand_aside() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    initialise(model, {"1": "default"})
    assert check_init(model) == () and find_ties(model) == ()
    with pytest.raises(LoadError, match="no shape yet"):
        initialise(model, {"0": "default"})


def test_one_mistake_is_told_once_for_all_tensors_it_concerns() -> None:
    with pytest.raises(LoadError) as caught:
        initialise(plain(), {"0.weight": "xavir_normal", "2.weight": "xavir_normal"})
    assert codes(caught) == ["bad-initialiser"]
