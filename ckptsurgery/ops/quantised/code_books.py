"""From packed bytes and words to values: codes are unpacked along an axis, and a code book gives each its value."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from ...specs import DTYPES
from ..numerics import torch_dtype

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["E2M1", "exponents", "integers", "planes", "unpacked", "unpacked_rows", "values_of_bytes", "widened"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of 4-bit floats; source: Open Compute Project, "Microscaling Formats (MX)" 1.0, table 5."""

Book = tuple[float, ...]


@cache
def integers(bits: int, offset: int = 0) -> Book:
    """The code book of unsigned integers less an offset.

    >>> integers(2, 2)
    (-2.0, -1.0, 0.0, 1.0)
    """
    return tuple(float(n - offset) for n in range(1 << bits))


@cache
def _book_of_bytes(book: Book, bits: int, high_first: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the values of each byte, [256, values of a byte]."""
    import numpy as np

    shifts = range(0, 8, bits)
    places = reversed(shifts) if high_first else shifts
    codes = np.stack([(np.arange(256) >> shift) & ((1 << bits) - 1) for shift in places], -1)
    return np.ascontiguousarray(np.array(book, np.float32)[codes])


def values_of_bytes(packed: Tensor, book: Book, bits: int, high_first: bool = False) -> Tensor:
    """The float32 values of the codes in bytes, along the last axis.

    Args:
        packed: uint8 [..., n], each byte of 8 / bits codes.
        book: the value of each code, 2 ** bits of them.
        high_first: whether the first code of a byte is in its high bits.
    """
    import numpy as np
    import torch

    table = _book_of_bytes(book, bits, high_first)
    shape = (*packed.shape[:-1], packed.shape[-1] * table.shape[1])
    if packed.device.type != "cpu":
        return torch.from_numpy(table).to(packed.device)[packed.long()].reshape(shape)
    # A byte is looked up as one item of all of its values; with `wrap` numpy makes no copy of the indices as int64.
    items = table.view(np.dtype((np.void, table.shape[1] * 4)) if table.shape[1] > 4 else _ITEMS[table.shape[1]])
    found = items[:, 0].take(packed.contiguous().numpy(), mode="wrap")
    return torch.from_numpy(found.view(np.float32)).reshape(shape)


_ITEMS = {1: "f4", 2: "c8", 4: "c16"}


@cache
def _float8_book(dtype: str) -> Book:
    import torch

    return tuple(torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).float().tolist())


def widened(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor of numbers of at most 16 bits in float32, exactly; one of float32 or float64 as it is.

    Args:
        dtype: of the tensor, by its name here.
    """
    import torch

    if dtype in ("F32", "F64"):
        return tensor
    if DTYPES[dtype].kind == "float" and DTYPES[dtype].bits == 8 and tensor.device.type == "cpu" and tensor.dim():
        # torch converts float8 twenty times slower than a table of 256 floats is looked up.
        return values_of_bytes(tensor.contiguous().view(torch.uint8), _float8_book(dtype), 8)
    return tensor.to(torch.float32)


def exponents(tensor: Tensor) -> Tensor:
    """The powers of two that bytes stand for as E8M0 exponents: 2 ** (byte - 127), and NaN for 255; float32."""
    import torch

    return tensor.view(torch.float8_e8m0fnu).to(torch.float32)


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes packed without gaps along the last axis, the lowest bits first; a code may lie in two words.

    Args:
        words: integers of any width [rows, n].
        columns: how many codes there are in a row.

    Returns:
        uint8 [rows, columns].
    """
    import torch

    packed = words.contiguous().view(torch.uint8)
    rows, size = packed.shape
    # Codes repeat their places after so many bytes.
    period = math.lcm(bits, 8) // 8
    room = -(-size // period) * period
    if room > size:
        packed = torch.nn.functional.pad(packed, (0, room - size))
    groups = packed.view(rows, room // period, period)
    codes = torch.empty(rows, room // period, period * 8 // bits, dtype=torch.uint8, device=words.device)
    for number in range(period * 8 // bits):
        byte, shift = divmod(number * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code = code | (groups[..., byte + 1] << (8 - shift))
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., number])
    return codes.view(rows, -1)[:, :columns]


def unpacked_rows(words: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Codes packed along the first axis: row `order[n]` of the 32 / bits rows of a word is in its n-th bits.

    Args:
        words: int32 [n, columns].

    Returns:
        float32 [n * 32 / bits, columns].
    """
    import torch

    result = torch.empty(words.shape[0], len(order), words.shape[1], dtype=torch.float32, device=words.device)
    for place, row in enumerate(order):
        result[:, row] = (words >> (place * bits)) & ((1 << bits) - 1)
    return result.view(-1, words.shape[1])


def planes(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes of which a run of bytes holds first the lowest bits of all, then the next ones.

    >>> import torch
    >>> planes(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 2).tolist()
    [[1, 3, 2, 4]]

    Args:
        packed: uint8 [blocks, bytes].
        run: bytes that are taken together.

    Returns:
        uint8 [blocks, bytes * 8 / bits].
    """
    import torch

    blocks, size = packed.shape
    grouped = packed.reshape(blocks, size // run, run)
    codes = torch.empty(blocks, size // run, 8 // bits, run, dtype=torch.uint8, device=packed.device)
    for number in range(8 // bits):
        torch.bitwise_and(grouped >> (number * bits), (1 << bits) - 1, out=codes[:, :, number])
    return codes.view(blocks, -1)
