"""Tensors go in exactly: the right shape, the right class, under every name, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.assigning import hooked_modules, set_tensor, shared_places
from ckptsurgery.modeling.places import named_tensors, place_of


class Special(nn.Parameter):
    """A parameter class of its own, which wants an argument to be made."""

    def __new__(cls, data: torch.Tensor, wanted: str) -> Special:
        made = torch.Tensor._make_subclass(cls, data, True)
        made.wanted = wanted
        return made


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


def code(caught: pytest.ExceptionInfo[LoadError]) -> str:
    return caught.value.diagnostics[0].code


def test_names_come_in_the_order_of_the_state_dict_and_under_every_name() -> None:
    model = nn.ModuleDict({"a": tied(), "n": nn.BatchNorm1d(2)})
    model["again"] = model["a"]
    assert list(named_tensors(model)) == list(model.state_dict())


def test_a_copy_keeps_storage_dtype_and_ties() -> None:
    model = tied()
    pointer = model[0].weight.data_ptr()
    set_tensor(model, "1.weight", torch.ones(5, 3, dtype=torch.float64))
    assert model[0].weight is model[1].weight and pointer == model[0].weight.data_ptr()
    assert model[0].weight.dtype == torch.float32 and (model[0].weight == 1).all()


@pytest.mark.parametrize("shape", [(1,), (1, 3), (3, 5), (15,), ()])
@pytest.mark.parametrize("assign", [False, True])
def test_no_shape_but_its_own_is_taken(shape: tuple[int, ...], assign: bool) -> None:
    model = tied()
    before = model[0].weight.clone()
    with pytest.raises(LoadError, match=r"\[5, 3\]") as caught:
        set_tensor(model, "0.weight", torch.zeros(shape), assign)
    assert code(caught) == "shape-mismatch" and torch.equal(before, model[0].weight)


def test_one_element_is_no_scalar() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(LoadError):
        set_tensor(model, "scale", torch.tensor([3.0]))
    assert model.scale.item() == 2


def test_an_assigned_tensor_lies_under_every_name_of_the_old_one() -> None:
    model = nn.ModuleDict({"a": tied()})
    model["again"] = model["a"]
    model["a"][0].weight.requires_grad_(False)
    new = torch.ones(5, 3, dtype=torch.bfloat16)
    set_tensor(model, "again.1.weight", new, assign=True)
    weight = model["a"][0].weight
    assert weight is model["a"][1].weight is model["again"][1].weight
    assert weight.data_ptr() == new.data_ptr() and weight.dtype == torch.bfloat16 and not weight.requires_grad


def test_partners_found_once_serve_many_assignments() -> None:
    model = tied()
    known = shared_places(model)
    for name in list(known):
        set_tensor(model, name, torch.ones_like(known[name][0].tensor), True, known[name])
    assert model[0].weight is model[1].weight


def test_the_class_and_the_attributes_of_a_parameter_survive_assignment() -> None:
    model = nn.Module()
    model.w = Special(torch.zeros(2), "yes")
    model.w.lr_scale = 0.5
    set_tensor(model, "w", torch.ones(2), assign=True)
    assert type(model.w) is Special and model.w.wanted == "yes" and model.w.lr_scale == 0.5


def test_a_meta_model_takes_tensors_by_assignment_only() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(2)
    with pytest.raises(LoadError) as caught:
        set_tensor(model, "weight", torch.ones(2))
    assert code(caught) == "meta-target"
    for name, tensor in nn.BatchNorm1d(2).state_dict().items():
        set_tensor(model, name, tensor, assign=True)
    assert not any(t.is_meta for t in named_tensors(model).values())
    assert "num_batches_tracked" in model.state_dict() and not isinstance(model.running_mean, nn.Parameter)


def test_weights_of_a_recurrent_net_are_the_ones_it_computes_with_after_assignment() -> None:
    torch.manual_seed(0)
    source, x = nn.LSTM(3, 4), torch.randn(2, 1, 3)
    with torch.device("meta"):
        target = nn.LSTM(3, 4)
    for name, tensor in source.state_dict().items():
        set_tensor(target, name, tensor, assign=True)
    assert torch.equal(source(x)[0], target(x)[0])


def test_integers_cannot_train() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(LoadError, match="trainable") as caught:
        set_tensor(model, "weight", torch.zeros(2, 2, dtype=torch.int8), assign=True)
    assert code(caught) == "integer-parameter"


def test_a_lazy_parameter_has_no_place_yet() -> None:
    model = nn.LazyLinear(2)
    with pytest.raises(LoadError, match="no shape yet"):
        set_tensor(model, "weight", torch.zeros(2, 2), assign=True)
    assert hooked_modules(model) == ("",)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(LoadError, match=r"did you mean '1\.bias'"):
        place_of(tied(), "1.biass")


def test_computed_weights_are_named_with_what_they_are_computed_from() -> None:
    new = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(LoadError, match=r"parametrizations\.weight\.original0") as caught:
        place_of(nn.Sequential(new), "0.weight")
    assert code(caught) == "parametrised"
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    with pytest.raises(LoadError, match="weight_g and weight_v"):
        place_of(old, "weight")


def test_modules_that_load_in_their_own_way_are_named() -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: object) -> None:
            super()._load_from_state_dict(*args)  # type: ignore[arg-type]

    model = nn.ModuleDict(
        {
            "plain": nn.Sequential(
                nn.Linear(2, 2), nn.BatchNorm2d(2), nn.InstanceNorm1d(2, affine=True), nn.LSTM(2, 2)
            ),
            "own": Own(2, 2),
            "normed": parametrizations.weight_norm(nn.Linear(2, 2)),
            "before": nn.Linear(1, 1),
            "after": nn.Linear(1, 1),
        }
    )
    model["before"].register_load_state_dict_pre_hook(lambda *args: None)
    model["after"].register_load_state_dict_post_hook(lambda *args: None)
    assert hooked_modules(model) == ("own", "normed", "before", "after")
