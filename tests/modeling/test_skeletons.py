"""Skeletons weigh nothing and become whole by assignment alone; the facts of a model are those of its state_dict."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.assigning import set_tensor
from ckptsurgery.modeling.facts import target_of
from ckptsurgery.modeling.places import places
from ckptsurgery.modeling.skeletons import skeleton
from ckptsurgery.modeling.ties import find_ties
from ckptsurgery.specs import TensorSpec

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, **TOKENS))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=6))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    "factory", [gpt2, bert, llama, lambda: nn.LSTM(3, 4, 2), lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True)]
)
def test_a_skeleton_has_meta_parameters_real_buffers_and_all_ties(factory: object) -> None:
    real, bones = factory(), skeleton(factory)  # type: ignore[operator,arg-type]
    assert all(p.is_meta for p in bones.parameters())
    for mine, theirs in zip(places(bones), places(real), strict=True):
        assert mine.name == theirs.name and mine.tensor.shape == theirs.tensor.shape
        assert not mine.is_buffer or torch.equal(mine.tensor, theirs.tensor)
    assert find_ties(bones) == find_ties(real)


@pytest.mark.parametrize("factory", [gpt2, bert, llama])
def test_a_skeleton_filled_by_assignment_computes_what_its_source_computes(factory: object) -> None:
    real, bones = factory().eval(), skeleton(factory).eval()  # type: ignore[operator,arg-type]
    for name, tensor in real.state_dict().items():
        set_tensor(bones, name, tensor, assign=True)
    assert not any(p.tensor.is_meta for p in places(bones)) and find_ties(bones) == find_ties(real)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(real(ids).logits, bones(ids).logits)


def test_a_parameter_lives_no_longer_than_its_registration() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abc":
                parameter = nn.Parameter(torch.zeros(2))
                seen.append(weakref.ref(parameter))
                setattr(self, name, parameter)
                del parameter
                gc.collect()
                assert sum(ref() is not None for ref in seen) == 0

    assert all(p.is_meta for p in skeleton(Watched).parameters())


def test_one_parameter_registered_twice_is_one_meta_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Parameter(torch.ones(2), requires_grad=False)
            self.a, self.b = shared, shared
            self._parameters["c"] = shared

    model = skeleton(Twice)
    assert model.a is model.b and model.a.is_meta and not model.a.requires_grad
    assert model.c.is_meta


def test_only_the_thread_that_builds_gets_meta_parameters() -> None:
    elsewhere: list[nn.Module] = []

    def factory() -> nn.Module:
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(1, 1)))
        thread.start()
        thread.join()
        return nn.Linear(1, 1)

    assert skeleton(factory).weight.is_meta and not elsewhere[0].weight.is_meta
    assert not nn.Linear(1, 1).weight.is_meta


def test_the_global_generators_and_torch_stay_as_they_were() -> None:
    before = torch.get_rng_state()
    skeleton(lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 3)))
    with pytest.raises(ZeroDivisionError):
        skeleton(lambda: nn.Linear(1 // 0, 1))
    assert torch.equal(before, torch.get_rng_state()) and not nn.Linear(1, 1).weight.is_meta


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.total = self.weight.sum().item()


class Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", self.weight.detach() * 2)


@pytest.mark.parametrize(
    ("factory", "says"), [(Arithmetic, "computes with values"), (Derived, "scale"), (lambda: 3, "returned int")]
)
def test_a_constructor_that_needs_values_is_told_apart(factory: object, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        skeleton(factory)  # type: ignore[arg-type]


def test_an_error_of_the_constructors_own_passes_through() -> None:
    with pytest.raises(RuntimeError, match="Trying to create tensor with negative dimension"):
        skeleton(lambda: nn.Linear(-1, 2))


@pytest.mark.parametrize("factory", [gpt2, bert, llama, lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))])
def test_the_specs_of_a_model_are_those_of_its_state_dict_in_order(factory: object) -> None:
    model = factory()  # type: ignore[operator]
    facts = target_of(model)
    expected = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    assert facts.specs == expected and list(facts.specs) == list(expected)
    assert facts.parameters | facts.buffers == set(expected) and not facts.parameters & facts.buffers
    assert facts.ties == find_ties(model) and not facts.meta and not facts.lazy and not facts.extra_state


def test_what_stands_apart_in_a_model_is_told() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"step": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    model = nn.ModuleDict(
        {
            "extra": Extra(2, 2),
            "normed": parametrizations.weight_norm(nn.Linear(2, 2)),
            "lazy": nn.LazyLinear(2),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
            "meta": nn.Linear(2, 2, device="meta"),
        }
    )
    model["frozen"].register_buffer("mask", torch.ones(2), persistent=False)
    facts = target_of(model)
    assert facts.extra_state == ("extra._extra_state",) and facts.hooked == ("normed", "lazy")
    assert facts.lazy == ("lazy.weight", "lazy.bias") and "lazy.weight" not in facts.specs
    assert facts.non_persistent == ("frozen.mask",) and facts.meta == {"meta.weight", "meta.bias"}
    assert facts.parameters - facts.trainable == {"frozen.weight", "frozen.bias"}
    assert "normed.parametrizations.weight.original0" in facts.specs
