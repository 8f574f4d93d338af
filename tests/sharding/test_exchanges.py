"""Boxes that go from rank to rank: any layout and dtype, and errors of one rank that all of them raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group

import ckptsurgery as cs
from ckptsurgery.sharding.exchanges import Exchange
from ckptsurgery.sharding.peers import peers

TENSORS = {
    "scalar": torch.tensor(3.5),
    "complex": torch.arange(21).reshape(7, 3) * (1 + 2j),
    "bytes longer than a buffer": torch.arange(5 << 20).to(torch.uint8),
    "rows longer than a buffer": torch.arange(2 * (5 << 20)).to(torch.uint8).reshape(2, -1),
    "turned": torch.arange(3.0 * 500_000).reshape(500_000, 3).t(),
    "every other": torch.arange(3_000_000).to(torch.bfloat16)[::2],
    "flags": torch.arange(12).reshape(3, 4)[:, 1:3] % 2 == 0,
}


def sent(names: list[str], turned: bool) -> list[str]:
    """What arrives otherwise than it was sent, on the second rank."""
    ranks: Any = peers()
    exchange, wrong = Exchange.begun(ranks, lambda error: error), []
    for name in names:
        tensor = TENSORS[name]
        if ranks.rank == 0:
            exchange.send(tensor, [0, 1])
            continue
        made = torch.zeros_like(tensor)
        made = made.t().contiguous().t() if turned and made.dim() == 2 else made
        exchange.receive(made, 0)
        wrong += [] if torch.equal(made, tensor) else [name]
    exchange.check()
    return wrong


@pytest.mark.parametrize("turned", [False, True])
def test_elements_arrive_whatever_their_layout(turned: bool, two: Group) -> None:
    assert two(sent, [*TENSORS], turned) == [[], []]


def failing(sender: int, work: int) -> Any:
    """Fail on one rank before the second of three tensors; then use the group again."""
    ranks: Any = peers()
    exchange = Exchange.begun(ranks, lambda error: error)
    text = ""

    def fail() -> None:
        raise MemoryError("no memory for it")

    try:
        for number in range(3):
            if number == 1 and ranks.rank == work:
                exchange.attempt(fail)
            tensor = torch.ones(4, 3).t() * number
            if ranks.rank == sender:
                exchange.send(tensor, [other for other in range(ranks.size) if other != sender])
            else:
                exchange.receive(tensor, sender)
        exchange.check()
    except cs.CkptSurgeryError as error:
        text = str(error)
    flags = torch.ones(1)
    dist.all_reduce(flags)
    return text, flags.item()


@pytest.mark.parametrize(("sender", "work"), [(0, 0), (0, 1), (1, 0)])
def test_an_error_of_one_rank_is_raised_on_all_and_leaves_the_group_whole(sender: int, work: int, two: Group) -> None:
    answers = two(failing, sender, work)
    assert answers[0] == answers[1]
    assert f"rank {work} failed: MemoryError: no memory for it" in answers[0][0]
    assert answers[0][1] == 2


def test_more_than_two_ranks(four: Group) -> None:
    answers = four(failing, 2, 3)
    assert len(set(answers)) == 1
    assert "rank 3 failed" in answers[0][0]
