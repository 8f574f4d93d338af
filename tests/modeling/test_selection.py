"""Selections: the same names however they are said, values until told otherwise, exact when they change something."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from ckptsurgery.errors import LoadError, RecipeError
from ckptsurgery.modeling.selection import Selection, select


def nested() -> nn.Sequential:
    """Containers in containers, with a name that has a space."""
    blocks = nn.Sequential()
    for i in range(2):
        blocks.add_module(f"block {i}", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    return nn.Sequential(blocks, nn.BatchNorm1d(4), nn.Linear(4, 2))


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


def code(caught: pytest.ExceptionInfo[LoadError]) -> str:
    return caught.value.diagnostics[0].code


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("0.block 1.0.bias", ["0.block 1.0.bias"]),
        ("0.block 1", ["0.block 1.0.weight", "0.block 1.0.bias", "0.block 1.2.weight", "0.block 1.2.bias"]),
        ("2", ["2.weight", "2.bias"]),
        ("0.{block}.0.bias", ["0.block 0.0.bias", "0.block 1.0.bias"]),
        ("0.block {i:1..9}.2.{l}", ["0.block 1.2.weight", "0.block 1.2.bias"]),
        ("{i}.bias", ["1.bias", "2.bias"]),
        ("{r...}.bias", [n for n, _ in nested().named_parameters() if n.endswith(".bias")]),
        (nn.BatchNorm1d, ["1.weight", "1.bias"]),
        ((nn.BatchNorm1d, nn.Embedding), ["1.weight", "1.bias"]),
        (lambda name, p: p.shape == (2,), ["2.bias"]),
    ],
)  # fmt: skip
def test_names_paths_patterns_types_and_predicates_select(what: object, names: list[str]) -> None:
    assert list(select(nested(), what)) == names


def test_objects_of_the_model_select_themselves() -> None:
    model = nested()
    assert select(model, model[2]).names == ("2.weight", "2.bias")
    assert select(model, model[0][1][2].weight).names == ("0.block 1.2.weight",)
    assert select(model, select(model, "1")) == select(model, "1")
    assert select(tied(), nn.Embedding).names == ("0.weight",)
    model = tied()
    assert select(model, model[0].weight).names == ("0.weight", "1.weight")


def test_a_pattern_is_never_a_part_of_a_name() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "head_norm": nn.LayerNorm(2), "my_head": nn.Linear(2, 2)})
    assert select(model, "head").names == ("head.weight", "head.bias")


def test_several_words_are_united_in_the_order_of_the_model() -> None:
    model = nested()
    assert select(model, "2.bias", "0.block 0.0.weight").names == ("0.block 0.0.weight", "2.bias")
    assert len(select(model)) == len(list(model.parameters()))


def test_buffers_count_when_asked_for() -> None:
    model = nested()
    stats = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert (select(model, "1", buffers=True) - select(model, "1")).names == stats
    assert (~select(model, nn.Linear, buffers=True)).names == ("1.weight", "1.bias", *stats)
    with pytest.raises(LoadError, match="buffers only") as caught:
        select(model, "1.running_mean")
    assert caught.value.diagnostics[0].help == "buffers=True"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("0.block 1.0.bais", r"0\.block 1\.0\.bias"),
        ("blok", "close: 0.block 1"),
        ("xyz", "first"),
        ("", "no parameter"),
        ("0.{block}.0", r'"0\.\{block\}\.0\.\{rest\.\.\.\}" matches what the modules hold'),
        ("0.block 0.1", "holds no parameter"),
        (nn.Conv2d, "module types: BatchNorm1d, Linear"),
        ((nn.Conv2d, nn.Embedding), "Conv2d or Embedding"),
        (lambda name, p: False, "lambda"),
        (nn.Linear(1, 1), "Linear"),
        (2.5, "selects nothing"),
        (int, "selects nothing"),
        ((), "selects nothing"),
    ],
)  # fmt: skip
def test_nothing_selected_is_an_error_that_names_what_comes_close(what: object, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        select(nested(), what)


def test_all_words_that_select_nothing_are_named_at_once() -> None:
    with pytest.raises(LoadError) as caught:
        select(nested(), "heed", "1", "boddy")
    assert len(caught.value.diagnostics) == 2
    assert select(nested(), "heed", allow_empty=True).names == ()


def test_a_pattern_that_does_not_parse_says_where() -> None:
    with pytest.raises(RecipeError):
        select(nested(), "{a}{b}")
    with pytest.raises(LoadError, match=r"torch\.nn\.Module is needed"):
        select({"a": torch.zeros(1)}, "a")  # type: ignore[arg-type]


NAMES = [name for name, _ in nested().named_parameters()]
SUBSETS = st.frozensets(st.sampled_from(NAMES))


@given(SUBSETS, SUBSETS)
def test_selections_are_an_algebra_of_sets(left: frozenset[str], right: frozenset[str]) -> None:
    model = nested()
    a, b = (select(model, lambda n, p, s=s: n in s, allow_empty=True) for s in (left, right))
    everything = select(model)
    assert (a | ~a) == everything and not (a & ~a) and ~~a == a
    assert set(a | b) == left | right and set(a & b) == left & right
    assert set(a - b) == left - right and set(a ^ b) == left ^ right
    assert ~(a | b) == ~a & ~b and (a | b).names == tuple(n for n in NAMES if n in left | right)


@given(SUBSETS)
def test_freeze_then_unfreeze_restores_and_freezes_nothing_else(names: frozenset[str]) -> None:
    model = nested()
    sel = select(model, lambda n, p: n in names, allow_empty=True)
    assert sel.freeze() is sel
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == names
    sel.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


def test_a_selection_is_a_mapping_to_the_live_parameters() -> None:
    model = nested()
    sel = select(model, "2")
    assert isinstance(sel, Mapping) and sel["2.weight"] is model[2].weight and "1.weight" not in sel
    with pytest.raises(KeyError):
        sel["1.weight"]
    model[2].weight = nn.Parameter(torch.zeros(2, 4))
    assert sel["2.weight"] is model[2].weight
    model[2] = nn.Identity()
    with pytest.raises(LoadError, match=r"no parameter or buffer '2\.weight'"):
        sel["2.weight"]


def test_equal_selections_are_equal_and_hash_alike() -> None:
    model = nested()
    assert select(model, "2") == select(model, nn.Linear) & select(model, "2")
    assert len({select(model, "2"), select(model, "{i:2..2}.{l}")}) == 1
    assert select(model, "2") != select(nested(), "2")
    with pytest.raises(LoadError, match="different models"):
        select(model, "2") | select(nested(), "1")


def test_values_gradients_and_parameter_objects_are_apart() -> None:
    model = nested()
    model[2](torch.ones(1, 4)).sum().backward()
    sel = select(model, "2.bias", "1", buffers=True)
    assert list(sel.parameters()) == ["1.weight", "1.bias", "2.bias"]
    assert sel.parameters()["2.bias"] is model[2].bias
    assert not sel.data()["2.bias"].requires_grad and sel.data()["2.bias"].data_ptr() == model[2].bias.data_ptr()
    assert sel.grads()["1.weight"] is None and torch.equal(sel.grads()["2.bias"], torch.ones(2))


def test_shared_tensors_are_counted_once() -> None:
    sel = select(tied())
    assert len(sel) == 3 and sel.numel == 15 + 5 and sel.nbytes == 80
    assert select(nn.Linear(4, 4, dtype=torch.bfloat16)).nbytes == 40


def test_a_count_that_is_wrong_lists_the_names() -> None:
    sel = select(nested(), nn.Linear)
    assert sel.assert_count(10) is sel
    with pytest.raises(LoadError, match="9 tensors expected, 10 selected") as caught:
        sel.assert_count(9)
    assert "0.block {0,1}.{0,2}.weight" in caught.value.diagnostics[0].notes


def test_freezing_a_tied_parameter_freezes_all_its_names() -> None:
    model = tied()
    select(model, "1.weight").freeze()
    assert not model[0].weight.requires_grad and model[1].bias.requires_grad


def test_integers_cannot_be_unfrozen_and_then_nothing_is() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LoadError, match="1 parameter holds integers"):
        select(model).unfreeze()
    assert not model.bias.requires_grad


def test_statistics_are_those_of_the_finite_values() -> None:
    model = nn.ParameterDict(
        {"a": nn.Parameter(torch.tensor([[0.0, -3.0], [4.0, math.nan]])), "b": nn.Parameter(torch.zeros(0))}
    )
    a, b = select(model).stats()
    assert (a.min, a.max, a.norm, a.zeros, a.nonfinite) == (-3, 4, 5, 0.25, 1)
    assert a.mean == pytest.approx(1 / 3) and a.std == pytest.approx(math.sqrt(25 / 3 - 1 / 9))
    assert math.isnan(b.mean) and b.nonfinite == 0
    assert "F32 [2, 2]" in str(select(model).stats()) and select(model).stats()[:1].rows == (a,)
    assert a.to_json()["spec"] == "F32 [2, 2]"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_statistics_read_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("x", torch.tensor([0, 1, 1, 0]).to(dtype))
    (row,) = select(model, buffers=True).stats()
    assert (row.mean, row.std, row.zeros) == (0.5, 0.5, 0.5)


def test_statistics_of_large_tensors_do_not_lose_small_parts() -> None:
    model = nn.ParameterList([nn.Parameter(torch.full((3 << 20,), 1000.1))])
    (row,) = select(model).stats()
    assert row.mean == pytest.approx(float(torch.tensor(1000.1)), rel=1e-12) and row.std < 1e-6


def test_meta_tensors_have_no_statistics() -> None:
    with torch.device("meta"), pytest.raises(LoadError, match="meta"):
        select(nn.Linear(2, 2)).stats()


@pytest.mark.parametrize(
    ("name", "value", "index", "expected"),
    [
        ("weight", 0.5, (0, 1), [[0, 0.5], [0, 0]]),
        ("weight", 2, 1, [[0, 0], [2, 2]]),
        ("weight", torch.tensor([3.0, 4.0]), (slice(None), 0), [[3, 0], [4, 0]]),
        ("weight", torch.tensor(7.0, dtype=torch.bfloat16), (1, 1), [[0, 0], [0, 7]]),
        ("weight", 1.0, None, [[1, 1], [1, 1]]),
        ("weight", -1.0, torch.tensor([[True, False], [False, True]]), [[-1, 0], [0, -1]]),
        ("weight", torch.eye(2), ..., [[1, 0], [0, 1]]),
    ],
)
def test_single_entries_are_set_in_place(name: str, value: object, index: object, expected: list[list[float]]) -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    pointer = model.weight.data_ptr()
    select(model).assign_(name, value, index)  # type: ignore[arg-type]
    assert model.weight.tolist() == expected and model.weight.data_ptr() == pointer and model.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "value", "index", "expected"),
    [
        ("weight", torch.zeros(1), (0, 0), "shape-mismatch"),
        ("weight", torch.zeros(2), None, "shape-mismatch"),
        ("weight", 0.0, (5, 0), "bad-index"),
        ("weight", torch.zeros((), dtype=torch.float64), (0, 0), "lossy-cast"),
        ("weight", 1e39, (0, 0), "lossy-cast"),
        ("count", 0.5, None, "lossy-cast"),
        ("other", 0.5, None, "not-selected"),
    ],
)
def test_what_does_not_fit_an_entry_exactly_is_refused(name: str, value: object, index: object, expected: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor(3))
    before = model.weight.detach().clone()
    with pytest.raises(LoadError) as caught:
        select(model, buffers=True).assign_(name, value, index)  # type: ignore[arg-type]
    assert code(caught) == expected and torch.equal(before, model.weight) and model.count == 3


def test_init_fills_in_place_by_seed_and_keeps_ties() -> None:
    first, second = tied(), tied()
    for model in (first, second):
        sel = select(model, lambda n, p: p.ndim > 1)
        assert sel.init_("xavier_uniform", seed=3) is sel
    assert torch.equal(first[0].weight, second[0].weight) and first[0].weight is first[1].weight
    select(second, "{i}.weight").init_(lambda tensor, generator: tensor.fill_(2))
    assert (second[1].weight == 2).all()
    assert Selection(second, ()).init_("zeros").names == ()


def test_a_real_encoder_yields_its_parts() -> None:
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=8,
    )
    model = BertModel(config)
    assert len(select(model, "encoder.layer.{i}.attention.self.{p:query,key,value}.bias")) == 9
    assert select(model, "encoder").freeze().assert_count(48).numel == sum(
        p.numel() for p in model.encoder.parameters()
    )
    assert repr(select(model, "pooler")) == "Selection(2 tensors, 72 elements: pooler.dense.weight, pooler.dense.bias)"


def test_a_frozen_norm_that_still_changes_is_named_until_it_is_in_eval_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)
            )
            self.other = nn.BatchNorm1d(8, track_running_stats=False)
            self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.other(self.body(x)))

    model = Model().train()
    body = select(model, "body", "other")
    assert body.drifting == () and "note" not in repr(body)
    assert body.freeze().drifting == ("body.1", "body.3") and "body.3 (BatchNorm1d)" in repr(body)
    for path in body.drifting:
        model.get_submodule(path).eval()
    before = {n: b.clone() for n, b in model.body.named_buffers()}
    model(torch.randn(16, 4))
    assert all(torch.equal(before[n], b) for n, b in model.body.named_buffers())
    assert body.drifting == () and "note" not in repr(body)
    assert model.train() is model and body.drifting == ("body.1", "body.3")
    assert body.unfreeze().drifting == ()


def test_an_index_means_the_child_that_the_model_gives_for_it() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    for index in (0, 2, -1):
        assert select(net, index) == select(net, net[index])
    for index in (3, -4):
        with pytest.raises(LoadError, match="none with the index"):
            select(net, index)
    shared = nn.Linear(2, 2)
    assert select(nn.Sequential(shared, nn.ReLU(), shared), 2).names == ("2.weight", "2.bias")


def test_layers_without_a_bias_pass_and_a_misspelled_part_does_not() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
    select(net, nn.Linear).init_({"weight": "ones", "bias": "zeros"})
    assert all(bool((p == 1).all()) for p in net.parameters())
    with pytest.raises(LoadError, match="ends in 'biass'"):
        select(net, nn.Linear).init_({"weight": "ones", "biass": "zeros"})
    mixed = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 1))
    select(mixed).init_({"weight": "ones", "bias": "zeros"})
    assert mixed[1].bias.item() == 0
