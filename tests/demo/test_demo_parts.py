from __future__ import annotations

import torch

from ckptsurgery.demo.data import load_digits
from ckptsurgery.demo.models import Pretrained, Student
from ckptsurgery.demo.training import accuracy, seeded, train


def test_the_digits_are_the_published_ones() -> None:
    digits = load_digits()
    assert torch.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.images.min().item(), digits.images.max().item()) == (0.0, 1.0)


def test_halves_share_no_image_and_lose_none() -> None:
    digits = load_digits()
    one, other = digits.halves()
    assert len(one) + len(other) == len(digits)
    assert torch.equal(torch.stack([one.images[0], other.images[0]]), digits.images[:2])


def test_few_draws_that_many_of_each_class_and_the_seed_alone_decides() -> None:
    digits = load_digits().of(range(6, 10))
    draws = [digits.few(5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.bincount(draws[0].labels).tolist() == [5, 5, 5, 5]
    assert torch.equal(draws[0].images, draws[1].images)
    assert not torch.equal(draws[0].images, draws[2].images)


def test_the_two_architectures_have_as_many_numbers_and_no_name_in_common() -> None:
    old, new = Pretrained(6).state_dict(), Student(6).state_dict()
    assert sum(t.numel() for t in old.values()) == sum(t.numel() for t in new.values())
    assert not old.keys() & new.keys()


def test_building_from_a_seed_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = seeded(lambda: Student(4), 1), seeded(lambda: Student(4), 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.classifier.weight, other.classifier.weight)


def test_training_learns() -> None:
    train_set, test_set = load_digits().of(range(2)).halves()
    model = seeded(lambda: Pretrained(2), 0)
    train(model, train_set, 40, seed=0)
    assert accuracy(model, test_set) > 0.9
