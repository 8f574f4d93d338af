"""Which scale an element has: one for the tensor, for its row, for its group along a row, for its block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...specs import TensorSpec
from ..base import Op, OpError
from ..operands import pair

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ScaleGrid", "add_grouped", "scale_grid", "times_grouped"]

_USUAL = 128


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Scales over a weight of rows [matrices · height, width].

    >>> scale_grid(Op(), TensorSpec([300, 256], "F8_E4M3"), TensorSpec([3, 2], "F32"), 128).size
    (128, 128)

    Args:
        size: rows and columns that one scale is for.
        height: rows of one matrix.
        shape: scales of one matrix, [down, across].
    """

    size: tuple[int, int]
    height: int
    shape: tuple[int, int]

    def rows(self, scales: Tensor, start: int, stop: int) -> Tensor:
        """Return the scales of the rows `start` to `stop` of the weight, of shape [stop - start, across].

        Args:
            scales: of all matrices, of shape [matrices · down, across].
        """
        import torch

        if self.size[0] == 1:
            return scales[start:stop]
        row = torch.arange(start, stop, device=scales.device)
        return scales[row // self.height * self.shape[0] + row % self.height // self.size[0]]

    def __str__(self) -> str:
        """The words that name it: `block 128 x 128`, `channel`, `group 32`, `tensor`."""
        if self.shape == (1, 1) and self.height > 1:
            return "tensor"
        if self.size[0] == 1:
            return "channel" if self.shape[1] == 1 else f"group {self.size[1]}"
        return f"block {self.size[0]} x {self.size[1]}"


def scale_grid(
    op: Op, weight: TensorSpec, scale: TensorSpec, block: int | tuple[int, int] | None, what: str = "scale"
) -> ScaleGrid:
    """The grid of a scale over a weight.

    Args:
        block: rows and columns of a block, or None: read off the scale's shape. One number is for the tensor, one for
            each row for the rows; else blocks of 128 x 128 where they fit, blocks that divide the weight, or powers
            of two.

    Raises:
        OpError: the scale's shape does not belong to the weight.
    """
    if len(weight.shape) < 2:
        raise OpError(f"{op.name} wants a weight of 2 dims or more, not {weight}")
    *leading, height, width = weight.shape
    if block is not None:
        rows, columns = pair(op, block, "block")
        down, across = -(-height // rows), -(-width // columns)
        wants = (*leading, down, across)
        if scale.shape != wants:
            blocks = f"blocks of {rows} x {columns} of weight {weight}"
            raise OpError(f"{op.name}: {blocks} have scales {list(wants)}, and {what} is {scale}")
        return ScaleGrid((rows, columns), height, (down, across))
    down, across = _shape(weight, scale)
    found = _sides(height, width, down, across)
    if found is None:
        raise OpError(f"{op.name}: {what} {scale} does not belong to weight {weight}; say block=[rows, columns]")
    return ScaleGrid(found, height, (down, across))


def _shape(weight: TensorSpec, scale: TensorSpec) -> tuple[int, int]:
    """Scales down and across one matrix; (0, 0) where they are others."""
    *leading, height, _ = weight.shape
    if scale.numel == 1 and not leading:
        return 1, 1
    if scale.shape in (tuple(leading), (*leading, 1)) and leading:
        return 1, 1
    if scale.shape == (*leading, height):
        return height, 1
    if len(scale.shape) == len(weight.shape) and scale.shape[:-2] == tuple(leading):
        return scale.shape[-2], scale.shape[-1]
    return 0, 0


def _sides(height: int, width: int, down: int, across: int) -> tuple[int, int] | None:
    """Rows and columns of a block of which `down` x `across` cover `height` x `width`."""
    if not down or not across:
        return (1, 1) if (down, across) == (height, width) else None
    if -(-height // _USUAL) == down > 1 and -(-width // _USUAL) == across:
        return _USUAL, _USUAL
    sides = (_side(height, down), _side(width, across))
    return None if None in sides else (sides[0] or 1, sides[1] or 1)


def _side(size: int, count: int) -> int | None:
    if size % count == 0:
        return max(size // count, 1)
    powers = (1 << n for n in range(size.bit_length(), 0, -1))
    return next((power for power in powers if -(-size // power) == count), None)


def times_grouped(values: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Multiply in place each run of `size` values along the last axis by its number.

    Args:
        numbers: [..., ceil(n / size)].
    """
    return _by_group(values, numbers, size, lambda part, number: part.mul_(number))


def add_grouped(values: Tensor, numbers: Tensor, size: int, alpha: float = 1) -> Tensor:
    """Add in place to each run of `size` values along the last axis its number, times `alpha`."""
    return _by_group(values, numbers, size, lambda part, number: part.add_(number, alpha=alpha))


def _by_group(values: Tensor, numbers: Tensor, size: int, change: Callable[[Tensor, Tensor], object]) -> Tensor:
    count = values.shape[-1] // size
    whole = count * size
    if count:
        change(values[..., :whole].view(*values.shape[:-1], count, size), numbers[..., :count, None])
    if whole < values.shape[-1]:
        change(values[..., whole:], numbers[..., count : count + 1])
    return values
