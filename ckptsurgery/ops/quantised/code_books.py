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

    Bytes = np.ndarray[Any, Any]

__all__ = [
    "E2M1",
    "exponents",
    "fill_rows",
    "integers",
    "pairs_of_bytes",
    "planes",
    "unpacked",
    "values_of_bytes",
    "widened",
]

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


def values_of_bytes(
    packed: Tensor, book: Book, bits: int, high_first: bool = False, out: Tensor | None = None
) -> Tensor:
    """The float32 values of the codes in bytes, along the last axis.

    Args:
        packed: uint8 [..., n], each byte of 8 / bits codes.
        book: the value of each code, 2 ** bits of them.
        high_first: whether the first code of a byte is in its high bits.
        out: contiguous memory for them.
    """
    import numpy as np
    import torch

    table = _book_of_bytes(book, bits, high_first)
    shape = (*packed.shape[:-1], packed.shape[-1] * table.shape[1])
    if packed.device.type != "cpu":
        found = torch.from_numpy(table).to(packed.device)[packed.long()].reshape(shape)
        return found if out is None else out.copy_(found)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32)
    # A byte is looked up as one item of all of its values; with `wrap` numpy makes no copy of the indices as int64.
    kind = np.dtype((np.void, table.shape[1] * 4) if table.shape[1] > 4 else _ITEMS[table.shape[1]])
    table.view(kind)[:, 0].take(packed.contiguous().numpy(), mode="wrap", out=out.numpy().view(kind))
    return out


@cache
def _pairs(book: tuple[int, ...]) -> Bytes:
    """Return for each byte the entries of its low and its high code, in the low and the high byte of a word."""
    import numpy as np

    codes, entries = np.arange(256), np.array(book, "i1").view("u1")
    made: Bytes = entries[codes & 15].astype("u2") | entries[codes >> 4].astype("u2") << 8
    return made.view("i2")


def pairs_of_bytes(packed: Bytes, book: tuple[int, ...]) -> Bytes:
    """Look both 4-bit codes of bytes up at once, in a code book of 16 integers of 8 bits.

    Returns:
        As many words: the first code's entry in the low byte, the second's in the high one.
    """
    return _pairs(book).take(packed, mode="wrap")


_ITEMS = {1: "f4", 2: "c8", 4: "c16"}


@cache
def _float8_book(dtype: str) -> Book:
    import torch

    return tuple(torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).float().tolist())


def widened(tensor: Tensor, dtype: str, out: Tensor | None = None) -> Tensor:
    """A tensor of numbers of at most 16 bits in float32, exactly; one of float32 or float64 as it is.

    Args:
        dtype: of the tensor, by its name here.
        out: contiguous memory of the result's dtype.
    """
    import torch

    if out is None:
        if dtype in ("F32", "F64"):
            return tensor
        out = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    if DTYPES[dtype].kind != "float" or DTYPES[dtype].bits != 8 or out.dtype != torch.float32 or not tensor.dim():
        return out.copy_(tensor)
    # torch converts float8 twenty times slower than this.
    raw = tensor.contiguous()
    if dtype == "F8_E5M2":
        return out.copy_((raw.view(torch.uint8).to(torch.int16) << 8).view(torch.float16))
    if dtype == "F8_E4M3" and not _has_nan(raw):
        # Seven bits to the left they are a float16 whose exponent is too small by 8; the sign is doubled meanwhile.
        halves = raw.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        return out.copy_(halves.view(torch.float16)).mul_(256)
    return values_of_bytes(raw.view(torch.uint8), _float8_book(dtype), 8, out=out)


def _has_nan(raw: Tensor) -> bool:
    """Whether F8_E4M3 values hold a NaN, which is all ones below the sign."""
    import torch

    return bool(raw.numel()) and int((raw.view(torch.uint8) & 127).amax()) == 127


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


def fill_rows(out: Tensor | None, words: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Codes packed along the first axis without gaps: the n-th one of as many as fill whole words is row `order[n]`.

    Args:
        out: contiguous memory for them; new float32 where there is none.
        words: int32 [n, columns].

    Returns:
        [n * 32 / bits, columns].
    """
    import torch

    period = len(order) * bits // 32
    grouped = words.view(-1, period, words.shape[1])
    shape = grouped.shape[0], len(order), words.shape[1]
    apart = torch.empty(shape, dtype=torch.float32, device=words.device) if out is None else out.view(shape)
    for place, row in enumerate(order):
        word, shift = divmod(place * bits, 32)
        code = grouped[:, word] >> shift
        if shift + bits > 32:
            # The shift to the right fills up with the sign, which the other word's bits must not meet.
            code = (code & ((1 << (32 - shift)) - 1)) | (grouped[:, word + 1] << (32 - shift))
        apart[:, row] = code & ((1 << bits) - 1)
    return apart.view(-1, words.shape[1])


def planes(packed: Bytes, bits: int, run: int) -> Bytes:
    """Codes of which a run of bytes holds first the lowest bits of all, then the next ones.

    >>> import numpy as np
    >>> planes(np.array([[0x21, 0x43]], "u1"), 4, 2).tolist()
    [[1, 3, 2, 4]]

    Args:
        packed: contiguous [blocks, bytes].
        run: bytes that are taken together.

    Returns:
        [blocks, bytes * 8 / bits].
    """
    import numpy as np

    blocks, size = packed.shape
    # Words are shifted and masked, and runs copied as items, both in fewer steps than bytes.
    words, mask = (packed.view("<u8"), _EACH_BYTE) if size % 8 == 0 else (packed, 1)
    item = np.dtype(("V", run))
    codes = np.empty((blocks, size // run, 8 // bits, run), "u1")
    for number in range(8 // bits):
        code = (words >> number * bits) & words.dtype.type(mask * ((1 << bits) - 1))
        codes.view(item)[:, :, number, 0] = code.view("u1").view(item)
    return codes.reshape(blocks, -1)


_EACH_BYTE = 0x0101010101010101
