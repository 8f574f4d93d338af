"""1797 handwritten digits, 8 x 8 pixels, of 13 writers; see DIGITS.md for source and licence."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]

_COUNT = 1797


@dataclass(frozen=True)
class Digits:
    """Images and their labels.

    Args:
        images: `[n, 64]` float32, pixels from 0 to 1, row by row.
        labels: `[n]` int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, classes: range) -> Digits:
        """The images of some digits, labelled 0, 1, … in that order.

        >>> load_digits().of(range(6, 10)).labels.unique().tolist()
        [0, 1, 2, 3]
        """
        chosen = (self.labels >= classes.start) & (self.labels < classes.stop)
        return Digits(self.images[chosen], self.labels[chosen] - classes.start)

    def halves(self) -> tuple[Digits, Digits]:
        """Every other image: one half to train on, one to measure on."""
        return Digits(self.images[::2], self.labels[::2]), Digits(self.images[1::2], self.labels[1::2])

    def few(self, per_class: int, generator: torch.Generator) -> Digits:
        """`per_class` images of each class, drawn by `generator`."""
        order = torch.randperm(len(self), generator=generator)
        labels = self.labels[order]
        chosen = torch.cat([order[labels == label][:per_class] for label in range(int(labels.max()) + 1)])
        return Digits(self.images[chosen], self.labels[chosen])


def load_digits() -> Digits:
    """All of them.

    >>> digits = load_digits()
    >>> len(digits), digits.images.shape, digits.labels[:10].tolist()
    (1797, torch.Size([1797, 64]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    raw = gzip.decompress(files(__package__).joinpath("digits.gz").read_bytes())
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    images, labels = values[: _COUNT * 64], values[_COUNT * 64 :]
    return Digits(images.reshape(_COUNT, 64).float() / 16, labels.long())
