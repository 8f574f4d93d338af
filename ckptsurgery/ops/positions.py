"""Ops on position tables: `resize_pos_embed` for absolute embeddings, `resize_rel_pos_bias` for relative ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..specs import TensorSpec
from .base import Op, OpError, Specs, Tensors
from .numerics import narrow, specs_of, widen
from .operands import arithmetic_float, operands, pair
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ResizePosEmbed", "ResizeRelPosBias"]

_Pair = tuple[int, int]
_POSITION_MODES = ("timm", "plain", "dinov2", "torchvision", "big_vision")


@op
@dataclass(frozen=True)
class ResizePosEmbed(Op):
    """Resample absolute position embeddings to another grid of patches.

    >>> op = ResizePosEmbed((16, 24), prefix=1)
    >>> str(op), op.infer((TensorSpec([1, 197, 8], "F32"),))
    ('resize_pos_embed(grid=[16, 24], prefix=1)', (TensorSpec(shape=(1, 385, 8), dtype='F32'),))

    Takes [tokens, width] or [1, tokens, width]; the tokens are `prefix` others (class, registers), which stay as they
    are, then the grid row by row.

    Args:
        grid: the new grid, [rows, columns], or one number for a square.
        prefix: tokens in front that have no place in the grid.
        old_grid: the old grid; needed where it was no square.
        mode: whose rule. `timm` (1.0, `resample_abs_pos_embed`): bicubic with antialias. `plain` (transformers 5 and
            many scripts): bicubic without. `dinov2` (its `interpolate_offset=0.1`; with registers it trains with 0
            and antialias, which is `timm`): bicubic by the scale factor (new + 0.1) / old. `torchvision`
            (`interpolate_embeddings`): bicubic, corners aligned. `big_vision` (`resample_posemb`, scipy's zoom of
            order 1): bilinear, corners aligned.

    Computed in float32 (float64 for float64) and rounded once. An equal grid passes untouched; otherwise nothing brings
    the old values back.

    Raises:
        OpError: tokens that make no grid, with the arguments that would settle it.
    """

    name = "resize_pos_embed"
    grid: int | tuple[int, int]
    prefix: int = 0
    old_grid: int | tuple[int, int] | None = None
    mode: Literal["timm", "plain", "dinov2", "torchvision", "big_vision"] = "timm"

    def __post_init__(self) -> None:
        if self.mode not in _POSITION_MODES:
            raise OpError(f"{self.name}: mode is one of {', '.join(_POSITION_MODES)}, not {self.mode!r}")
        if self.prefix < 0:
            raise OpError(f"{self.name}: prefix is a number of tokens, not {self.prefix}")
        pair(self, self.grid, "grid")
        if self.old_grid is not None:
            pair(self, self.old_grid, "old_grid")

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        arithmetic_float(self, spec)
        if len(spec.shape) not in (2, 3) or (len(spec.shape) == 3 and spec.shape[0] != 1):
            raise OpError(f"{self.name} wants [tokens, width] or [1, tokens, width], not {spec}")
        self._old_grid(spec.shape[-2])
        rows, columns = pair(self, self.grid, "grid")
        return (TensorSpec((*spec.shape[:-2], self.prefix + rows * columns, spec.shape[-1]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (tensor,), (spec,) = tensors, self.infer(specs_of(tensors))
        old, new = self._old_grid(tensor.shape[-2]), pair(self, self.grid, "grid")
        if old == new:
            return tensors
        table = tensor.reshape(tensor.shape[-2:])
        image = widen(table[self.prefix :]).reshape(1, *old, table.shape[1]).permute(0, 3, 1, 2)
        resized = self._resample(image, old, new).permute(0, 2, 3, 1).reshape(new[0] * new[1], table.shape[1])
        rows = torch.cat([table[: self.prefix], narrow(resized, spec.dtype, str(self))])
        return (rows.reshape(spec.shape),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None or self._old_grid(inputs[0].shape[-2]) != pair(self, self.grid, "grid"):
            return None
        return self

    def _old_grid(self, tokens: int) -> _Pair:
        count = tokens - self.prefix
        text = f"{self.name}: {tokens} tokens less prefix={self.prefix} are {count}"
        if self.old_grid is not None:
            rows, columns = pair(self, self.old_grid, "old_grid")
            if rows * columns != count:
                raise OpError(f"{text}, not {rows} x {columns}")
            return rows, columns
        side = math.isqrt(max(count, 0))
        if side * side == count and side:
            return side, side
        hints = "".join(f"; prefix={p} leaves {n} x {n}" for p, n in _square_grids(tokens))
        raise OpError(f"{text}, no square; give old_grid=[rows, columns]{hints}")

    def _resample(self, image: Tensor, old: _Pair, new: _Pair) -> Tensor:
        from torch.nn.functional import interpolate

        if not image.numel():
            return image.new_empty(*image.shape[:2], *new)
        if self.mode == "timm":
            return interpolate(image, size=new, mode="bicubic", antialias=True)
        if self.mode == "plain":
            return interpolate(image, size=new, mode="bicubic")
        if self.mode == "dinov2":
            scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
            return interpolate(image, scale_factor=scale, mode="bicubic")
        mode = "bicubic" if self.mode == "torchvision" else "bilinear"
        return interpolate(image, size=new, mode=mode, align_corners=True)


@op
@dataclass(frozen=True)
class ResizeRelPosBias(Op):
    """Resample a table of relative position biases to another attention window.

    >>> op = ResizeRelPosBias(12, extra=3)
    >>> op.infer((TensorSpec([13 * 13 + 3, 4], "F32"),))[0].shape == (23 * 23 + 3, 4)
    True

    The table is [(2h-1)(2w-1) + extra, heads] for a window of h x w patches, offsets row by row.

    Args:
        window: the new window, [rows, columns], or one number for a square.
        mode: `bicubic` (timm's `resize_rel_pos_bias_table_simple`) treats the table as an image. `geometric`
            places the old offsets on a geometric progression, dense near 0, and interpolates
            with a cubic not-a-knot spline, in float64.
        extra: rows at the end that stand for no offset, and stay: 3 where a class token has its own.
        old_window: the old window; needed where it was no square.

    `bicubic` computes in float32 (float64 for float64). An equal window passes untouched; otherwise nothing brings
    the old values back. Drop the index buffer (`relative_position_index`) that belongs to the old window.

    Raises:
        OpError: a number of rows that makes no window.
    """

    name = "resize_rel_pos_bias"
    window: int | tuple[int, int]
    mode: Literal["bicubic", "geometric"] = "bicubic"
    extra: int = 0
    old_window: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("bicubic", "geometric"):
            raise OpError(f"{self.name}: mode is bicubic or geometric, not {self.mode!r}")
        if self.extra < 0:
            raise OpError(f"{self.name}: extra is a number of rows, not {self.extra}")
        pair(self, self.window, "window")
        if self.old_window is not None:
            pair(self, self.old_window, "old_window")

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        arithmetic_float(self, spec)
        if len(spec.shape) != 2:
            raise OpError(f"{self.name} wants [offsets, heads], not {spec}")
        old, new = self._old_table(spec.shape[0]), _table(pair(self, self.window, "window"))
        if self.mode == "geometric" and old != new and min(old) < 4:
            raise OpError(f"{self.name}: a cubic spline needs 4 offsets or more each way, and {spec} has {min(old)}")
        return (TensorSpec((new[0] * new[1] + self.extra, spec.shape[1]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (table,), (spec,) = tensors, self.infer(specs_of(tensors))
        old, new = self._old_table(table.shape[0]), _table(pair(self, self.window, "window"))
        if old == new:
            return tensors
        kept = old[0] * old[1]
        image = widen(table[:kept]).t().reshape(table.shape[1], *old)
        resized = _bicubic(image, new) if self.mode == "bicubic" else _geometric(image, old, new)
        offsets = resized.reshape(table.shape[1], new[0] * new[1]).t()
        return (torch.cat([narrow(offsets, spec.dtype, str(self)), table[kept:]]),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None or self._old_table(inputs[0].shape[0]) != _table(pair(self, self.window, "window")):
            return None
        return self

    def _old_table(self, rows: int) -> _Pair:
        count = rows - self.extra
        text = f"{self.name}: {rows} rows less extra={self.extra} are {count}"
        if self.old_window is not None:
            table = _table(pair(self, self.old_window, "old_window"))
            if table[0] * table[1] != count:
                raise OpError(f"{text}, not {table[0]} x {table[1]} offsets")
            return table
        side = math.isqrt(max(count, 0))
        if side * side != count or side % 2 == 0:
            hint = "give old_window=[rows, columns] or another extra (3 where a class token has its own rows)"
            raise OpError(f"{text}, not (2n-1)**2; {hint}")
        return side, side


def _square_grids(tokens: int) -> list[tuple[int, int]]:
    """(prefix, side) of the square grids that so many tokens could hold behind a few others."""
    sides = [(prefix, math.isqrt(tokens - prefix)) for prefix in range(min(tokens, 9))]
    return [(prefix, side) for prefix, side in sides if side * side == tokens - prefix]


def _table(window: _Pair) -> _Pair:
    return 2 * window[0] - 1, 2 * window[1] - 1


def _bicubic(image: Tensor, new: _Pair) -> Tensor:
    from torch.nn.functional import interpolate

    if not image.numel():
        return image.new_empty(image.shape[0], *new)
    return interpolate(image[None], size=new, mode="bicubic")[0]


def _geometric(image: Tensor, old: _Pair, new: _Pair) -> Tensor:
    rows, columns = (_spline_matrix(_progression(o, n), n // 2).to(image.device) for o, n in zip(old, new))
    resized: Tensor = rows @ image.double() @ columns.t()
    return resized


def _progression(old: int, new: int) -> list[float]:
    """Where the geometric grid puts the old offsets: 0, ±1, ±(1 + q), ±(1 + q + q²), ... up to new // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    steps = [sum(ratio**k for k in range(i + 1)) for i in range(old // 2)]
    return [-s for s in reversed(steps)] + [0.0] + steps


def _spline_matrix(at: list[float], reach: int) -> Tensor:
    """What takes values at the points `at` to those at -reach, ..., reach: a cubic spline with not-a-knot ends.

    The spline is given by its second derivatives m. Inner points say that its slope is continuous, the ends that the
    third derivative is so across the second point and the last but one.
    """
    import torch

    x = torch.tensor(at, dtype=torch.float64)
    n, h = len(at), x.diff()
    left, right = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i, i - 1 : i + 2] = 6 * torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    left[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    left[-1, -3:] = torch.stack([h[-1], -h[-2] - h[-1], h[-2]])
    seconds = torch.linalg.solve(left, right)
    # Past the ends the end's value holds, as in FITPACK, which the reference calls.
    points = torch.arange(-reach, reach + 1, dtype=torch.float64).clamp(x[0], x[-1])
    cell = (torch.searchsorted(x, points, right=True) - 1).clamp(0, n - 2)
    b = ((points - x[cell]) / h[cell])[:, None]
    a, square = 1 - b, (h[cell] ** 2 / 6)[:, None]
    unit = torch.eye(n, dtype=torch.float64)
    curved = (a**3 - a) * seconds[cell] + (b**3 - b) * seconds[cell + 1]
    matrix: Tensor = a * unit[cell] + b * unit[cell + 1] + square * curved
    return matrix
