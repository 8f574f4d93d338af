"""Loads that raise nothing and go wrong in less common places: stacks, buffers, aliases, views of one storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

from .test_silent_failures import kinds, trained

State = dict[str, Tensor]


class Block(nn.Module):
    """Square projections, a stack of experts, a norm with statistics, and a scale of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(4, 16, 16) * 0.02)
        self.norm = nn.BatchNorm1d(16)
        self.scale = nn.Parameter(torch.ones(()))


class Decoder(nn.Module):
    """Two blocks between an embedding and a head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight


def loaded(change: Callable[[Decoder, State], None]) -> tuple[Decoder, State]:
    """A model that was loaded rightly, then changed by what the faulty loader does, and its source."""
    source = {k: v.clone() for k, v in trained(Decoder()).state_dict().items()}
    source["head.weight"] = source["embed.weight"]
    source["blocks.0.norm.num_batches_tracked"] += 5
    model = Decoder()
    model.load_state_dict(source)
    with torch.no_grad():
        change(model, source)
    return model, source


def rotary(rows: Tensor) -> Tensor:
    """Rows of 2 heads from pairs to halves."""
    return rows.view(2, 4, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


FAULTS: dict[str, tuple[Callable[[Decoder, State], object], dict[str, str]]] = {
    "a square matrix of one expert is transposed": (
        lambda m, s: m.blocks[0].experts[2].copy_(s["blocks.0.experts"][2].T),
        {"blocks.0.experts": "rearranged"},
    ),
    "the square matrices of all experts are transposed": (
        lambda m, s: m.blocks[1].experts.copy_(s["blocks.1.experts"].mT),
        {"blocks.1.experts": "rearranged"},
    ),
    "two layers are swapped in one tensor alone": (
        lambda m, s: [m.blocks[i].k.weight.copy_(s[f"blocks.{1 - i}.k.weight"]) for i in (0, 1)],
        {"blocks.0.k.weight": "holds-another", "blocks.1.k.weight": "holds-another"},
    ),
    "two experts are swapped": (
        lambda m, s: m.blocks[0].experts.copy_(s["blocks.0.experts"][[0, 2, 1, 3]]),
        {"blocks.0.experts": "rearranged"},
    ),
    "a stack went through bf16": (
        lambda m, s: m.blocks[0].experts.copy_(s["blocks.0.experts"].bfloat16()),
        {"blocks.0.experts": "rounded"},
    ),
    "one expert of a stack went through bf16": (
        lambda m, s: m.blocks[0].experts[3].copy_(s["blocks.0.experts"][3].bfloat16()),
        {"blocks.0.experts": "partly-loaded"},
    ),
    "statistics are as built": (
        lambda m, s: m.blocks[1].norm.reset_running_stats(),
        dict.fromkeys(("blocks.1.norm.running_mean", "blocks.1.norm.running_var"), "left-as-built"),
    ),
    "a counter is as built": (
        lambda m, s: m.blocks[0].norm.num_batches_tracked.zero_(),
        {"blocks.0.norm.num_batches_tracked": "other-values"},
    ),
    "one element is as built": (
        lambda m, s: m.blocks[0].scale.fill_(1.0),
        {"blocks.0.scale": "other-values"},
    ),
    "the head has equal bytes of its own": (
        lambda m, s: setattr(m.head, "weight", nn.Parameter(m.embed.weight.clone())),
        {"head.weight": "untied"},
    ),
    "one expert is as built": (
        lambda m, s: m.blocks[1].experts[1].normal_(std=0.02),
        {"blocks.1.experts": "partly-loaded"},
    ),
    "rows of a projection and its bias are in the rotary order of another codebase": (
        lambda m, s: [getattr(m.blocks[0].q, n).copy_(rotary(s[f"blocks.0.q.{n}"])) for n in ("weight", "bias")],
        {"blocks.0.q.weight": "rearranged", "blocks.0.q.bias": "rearranged"},
    ),
    "views of one storage begin an element late": (
        lambda m, s: setattr(m.blocks[0].k, "weight", nn.Parameter(flat(s)[257:513].view(16, 16))),
        {"blocks.0.k.weight": "other-values"},
    ),
    "an adapter is merged twice": (
        lambda m, s: m.blocks[0].q.weight.add_(torch.randn(16, 2) @ torch.randn(2, 16)),
        {"blocks.0.q.weight": "other-values"},
    ),
    "some columns are as built": (
        lambda m, s: m.blocks[0].q.weight[:, 8:].normal_(std=0.02),
        {"blocks.0.q.weight": "partly-loaded"},
    ),
    "signs are lost": (
        lambda m, s: m.blocks[0].k.weight.abs_(),
        {"blocks.0.k.weight": "partly-loaded"},
    ),
}


def flat(source: State) -> Tensor:
    """The projections of the first block in one run of memory."""
    return torch.cat([source["blocks.0.q.weight"].flatten(), source["blocks.0.k.weight"].flatten(), torch.zeros(1)])


@pytest.mark.parametrize("name", FAULTS)
def test_each_is_found_with_its_cause(name: str) -> None:
    change, wanted = FAULTS[name]
    model, source = loaded(change)  # type: ignore[arg-type]
    assert kinds(model, source) == wanted


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8])
def test_codes_of_integers_that_came_in_as_weights_are_found(codes: torch.dtype) -> None:
    model, source = loaded(lambda m, s: None)
    source["blocks.0.q.weight"] = torch.randint(0, 100, (16, 16)).to(codes)
    source["blocks.0.q.weight_scale"] = torch.rand(16, 1)
    model.load_state_dict(source, strict=False)
    assert kinds(model, source)["blocks.0.q.weight"] == "unscaled-codes"


def test_parameters_that_share_a_part_of_their_memory_are_found() -> None:
    model, source = loaded(lambda m, s: None)
    memory = torch.ones(48)
    for key, start in (("blocks.0.q", 0), ("blocks.1.q", 8)):
        source[f"{key}.bias"] = torch.ones(16)
        model.get_submodule(key).bias = nn.Parameter(memory[start : start + 16])
    assert kinds(model, source) == {"blocks.0.q.bias": "overlapping", "blocks.1.q.bias": "overlapping"}


def test_a_right_load_of_the_same_model_raises_nothing() -> None:
    model, source = loaded(lambda m, s: None)
    assert cs.check_loaded(model, source).coverage == 1
