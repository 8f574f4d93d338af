"""Ties are one concept: found however they were made, lost by nothing, proved with `is`."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.assigning import set_tensor
from ckptsurgery.modeling.ties import find_ties, restore_ties, tie, untie
from ckptsurgery.specs import Tie

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 6}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 11}
BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 11,
    "max_position_embeddings": 6,
}


def pair(device: str = "cpu") -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))


def code(caught: pytest.ExceptionInfo[LoadError]) -> str:
    return caught.value.diagnostics[0].code


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_object_under_two_names_is_a_tie(device: str) -> None:
    model = pair(device)
    assert find_ties(model) == ()
    model[1].weight = model[0].weight
    assert find_ties(model) == (Tie(("0.weight", "1.weight"), "object"),)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_parameters_over_the_same_bytes_are_a_tie(device: str) -> None:
    model = pair(device)
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert find_ties(model) == (Tie(("0.weight", "1.weight"), "storage"),)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_that_differ_in_offset_shape_or_stride_are_no_ties(device: str) -> None:
    flat = torch.zeros(12, device=device)
    model = nn.ParameterDict(
        {
            "whole": nn.Parameter(flat),
            "first": nn.Parameter(flat[:4]),
            "second": nn.Parameter(flat[4:8]),
            "matrix": nn.Parameter(flat.view(3, 4)),
            "transposed": nn.Parameter(flat.view(4, 3).t()),
        }
    )
    assert find_ties(model) == ()


def test_empty_tensors_are_tied_to_nothing() -> None:
    assert find_ties(nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))])) == ()


def test_shared_modules_and_shared_buffers_are_ties() -> None:
    layer = nn.BatchNorm1d(2, affine=False)
    groups = find_ties(nn.ModuleList([layer, layer]))
    assert [g.names for g in groups] == [
        (f"0.{n}", f"1.{n}") for n in ("running_mean", "running_var", "num_batches_tracked")
    ]


def test_real_models_are_tied_exactly_when_their_config_says_so() -> None:
    names = ("transformer.wte.weight", "lm_head.weight")
    assert find_ties(GPT2LMHeadModel(GPT2Config(**GPT2))) == (Tie(names, "object"),)
    apart = GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False))
    assert apart._tied_weights_keys and find_ties(apart) == ()
    (group,) = find_ties(T5ForConditionalGeneration(T5Config(**T5)))
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= set(group.names)
    assert {g.names[-1] for g in find_ties(BertForMaskedLM(BertConfig(**BERT)))} == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }


def test_what_is_declared_and_in_force_counts_after_the_tie_is_lost() -> None:
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert find_ties(model) == (Tie(("transformer.wte.weight", "lm_head.weight"), "declared"),)
    restore_ties(model, find_ties(model))
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    "make", [lambda: T5ForConditionalGeneration(T5Config(**T5)), lambda: BertForMaskedLM(BertConfig(**BERT))]
)
def test_declarations_expand_as_the_library_that_wrote_them_expands_them(make: object) -> None:
    model = make()  # type: ignore[operator]
    expected = {frozenset(g.names) for g in find_ties(model)}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.detach().clone())
    groups = find_ties(model)
    assert {frozenset(g.names) for g in groups} == expected and {g.kind for g in groups} == {"declared"}


def test_a_declaration_that_lists_aliases_means_the_input_embedding() -> None:
    class Listed(nn.Module):
        _tied_weights_keys = ["head.weight", r"blocks\.\d+\.out\.weight"]

        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.blocks = nn.ModuleList([nn.ModuleDict({"out": nn.Linear(3, 5)}) for _ in range(2)])
            self.config = types.SimpleNamespace(tie_word_embeddings=tied)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    assert find_ties(Listed(False)) == ()
    names = ("body.embed.weight", "body.head.weight", "body.blocks.0.out.weight", "body.blocks.1.out.weight")
    assert find_ties(nn.ModuleDict({"body": Listed(True)})) == (Tie(names, "declared"),)


def test_tie_then_untie_leaves_equal_values_apart() -> None:
    model = pair()
    before = model[0].weight.detach().clone()
    assert tie(model, "1.weight", to="0.weight").names == ("0.weight", "1.weight")
    assert model[0].weight is model[1].weight
    untie(model, "1.weight")
    assert find_ties(model) == () and torch.equal(model[1].weight, before) and torch.equal(model[0].weight, before)
    assert isinstance(model[1].weight, nn.Parameter) and model[1].weight.requires_grad


def test_untie_takes_one_name_out_of_three() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    tie(model, "1.weight", to="0.weight")
    tie(model, "2.weight", to="0.weight")
    untie(model, "0.weight")
    assert find_ties(model) == (Tie(("1.weight", "2.weight"), "object"),)


def test_untie_of_a_shared_storage_gives_bytes_of_its_own() -> None:
    model = pair()
    model[1].weight = nn.Parameter(model[0].weight.detach())
    untie(model, "1.weight")
    assert find_ties(model) == () and model[0].weight.data_ptr() != model[1].weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("1.weight", "2.weight", "cannot-tie"),
        ("1.wieght", "0.weight", "unknown-tensor"),
        ("1.weight", "3.running_mean", "cannot-tie"),
        ("4.weight", "0.weight", "parametrised"),
        ("0.weight", "4.weight", "parametrised"),
        ("5.weight", "0.weight", "cannot-tie"),
    ],
)
def test_what_cannot_be_tied_is_refused_by_name_and_nothing_changes(name: str, to: str, expected: str) -> None:
    model = nn.Sequential(
        nn.Embedding(5, 3),
        nn.Linear(3, 5),
        nn.Linear(5, 3),
        nn.BatchNorm1d(5),
        parametrizations.weight_norm(nn.Linear(3, 5)),
        nn.Linear(3, 5, dtype=torch.float16),
    )
    before = [id(p) for p in model.parameters()]
    with pytest.raises(LoadError) as caught:
        tie(model, name, to=to)
    assert code(caught) == expected and before == [id(p) for p in model.parameters()]


def test_untie_refuses_what_is_not_tied_and_what_is_a_shared_module() -> None:
    with pytest.raises(LoadError) as caught:
        untie(pair(), "0.weight")
    assert code(caught) == "not-tied"
    layer = nn.Linear(2, 2)
    with pytest.raises(LoadError, match="deepcopy") as caught:
        untie(nn.Sequential(layer, layer), "1.weight")
    assert code(caught) == "shared-module"


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_a_quantised_weight_is_refused_by_name() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Module()
            self.head.weight = torch.zeros(5, 3, dtype=torch.int8)

    with pytest.raises(LoadError, match="quantised") as caught:
        tie(Packed(), "head.weight", to="embed.weight")
    assert code(caught) == "not-a-parameter"


def test_ties_of_a_meta_model_survive_to_empty_and_assignment() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**GPT2))
    groups = find_ties(model)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.transformer.wte.weight
    restore_ties(model, groups, check_values=False)
    assert model.lm_head.weight is model.transformer.wte.weight

    state = {n: t.clone() for n, t in GPT2LMHeadModel(GPT2Config(**GPT2)).state_dict().items()}
    del state["lm_head.weight"]
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**GPT2))
    groups = find_ties(model)
    model.load_state_dict(state, strict=False, assign=True)
    assert model.lm_head.weight.is_meta
    restore_ties(model, groups)
    assert model.lm_head.weight is model.transformer.wte.weight and not model.lm_head.weight.is_meta


def test_storage_ties_come_back_as_storage_ties() -> None:
    model = pair()
    model[1].weight = nn.Parameter(model[0].weight.detach(), requires_grad=False)
    groups = find_ties(model)
    set_tensor(model, "1.weight", torch.ones(5, 3), assign=True)
    assert find_ties(model) == ()
    restore_ties(model, groups, prefer={"1.weight"})
    assert find_ties(model) == groups and (model[0].weight == 1).all()
    assert model[0].weight.requires_grad and not model[1].weight.requires_grad


def test_tied_names_with_different_bytes_are_an_error_until_one_is_preferred() -> None:
    model, groups = pair(), (Tie(("0.weight", "1.weight"), "object"),)
    kept = model[1].weight
    with pytest.raises(LoadError) as caught:
        restore_ties(model, groups)
    assert code(caught) == "tied-values-differ" and model[1].weight is kept
    restore_ties(model, groups, prefer={"1.weight"})
    assert model[0].weight is kept


def test_equal_bytes_are_equal_even_where_they_are_not_numbers() -> None:
    model, groups = pair(), (Tie(("0.weight", "1.weight"), "object"),)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
        model[1].weight.fill_(torch.nan)
    restore_ties(model, groups)
    assert model[0].weight is model[1].weight


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_after_parametrisation_a_tie_is_preserved_or_refused() -> None:
    model = pair()
    groups = (tie(model, "1.weight", to="0.weight"),)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    (group,) = restore_ties(model, groups)
    assert group.names == ("0.weight", "1.parametrizations.weight.original")
    assert model[1].parametrizations.weight.original is model[0].weight
    parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)

    parametrizations.weight_norm(model[1])
    with pytest.raises(LoadError, match=r"'1\.weight' is computed by a parametrization \(_WeightNorm\)"):
        restore_ties(model, groups)


def test_all_groups_that_cannot_be_restored_are_named_at_once() -> None:
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    groups = (Tie(("0.weight", "1.weight"), "object"), Tie(("0.bias", "2.bias"), "object"))
    with pytest.raises(LoadError) as caught:
        restore_ties(model, groups)
    assert [d.code for d in caught.value.diagnostics] == ["tied-values-differ", "unknown-tensor"]
