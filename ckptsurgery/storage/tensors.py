"""Between bytes and torch tensors; the one place of this room that imports torch to read."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic
from ..specs import DTYPES, TensorSpec, dtype_name
from .plain_memory import plain

if TYPE_CHECKING:
    import torch

__all__ = [
    "dense_bytes",
    "memory_place",
    "refuse_meta",
    "span",
    "spec_of",
    "swap_bytes",
    "tensor_from",
    "torch_dtype",
    "torch_shape",
]


def torch_dtype(name: str, key: str) -> torch.dtype:
    """torch's dtype of a safetensors name.

    Raises:
        CheckpointError: torch, or this version of it, has no such dtype.
    """
    import torch

    found = getattr(torch, DTYPES[name].torch or "", None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            Diagnostic(
                "dtype-not-in-torch",
                f"torch {torch.__version__} has no dtype for {name}",
                key,
                help="read() gives its bytes",
            )
        )
    return found


def torch_shape(spec: TensorSpec, key: str) -> tuple[int, ...]:
    """The shape as torch counts it: two F4 values share one element."""
    if DTYPES[spec.dtype].bits != 4 or not spec.shape:
        return spec.shape
    if spec.shape[-1] % 2:
        raise CheckpointError(
            Diagnostic(
                "odd-packed-shape",
                f"torch packs two {spec.dtype} values into one element; {spec} has an odd last axis",
                key,
                help="read() gives its bytes; convert to safetensors copies them",
            )
        )
    return (*spec.shape[:-1], spec.shape[-1] // 2)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a torch tensor, packed dtypes with their logical shape.

    Raises:
        CheckpointError: it is of a dtype that has no name.
    """
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    if DTYPES[dtype].bits == 4 and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    return TensorSpec(shape, dtype)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements between the first and the last that a strided tensor touches, both included.

    >>> span((2, 3), (1, 2)), span((2, 3), (0, 1)), span((0, 3), (3, 1))
    (6, 3, 0)
    """
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides))


def tensor_from(
    buffer: Any, start: int, spec: TensorSpec, key: str, strides: tuple[int, ...] | None = None
) -> torch.Tensor:
    """A tensor over a writable buffer's bytes from `start` on; a strided one comes out contiguous, as a copy."""
    import torch

    dtype, shape = torch_dtype(spec.dtype, key), torch_shape(spec, key)
    if spec.numel == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    count = math.prod(shape) if strides is None else span(shape, strides)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=start).view(dtype)
    if strides is None:
        return flat.reshape(shape)
    return flat.as_strided(shape, strides).clone(memory_format=torch.contiguous_format)


def swap_bytes(buffer: bytearray, dtype: str) -> bytearray:
    """The buffer's elements with their bytes in the other order."""
    width = DTYPES[dtype].itemsize // (2 if DTYPES[dtype].kind == "complex" else 1)
    if width == 1:
        return buffer
    swapped = bytearray(len(buffer))
    for i in range(width):
        swapped[i::width] = buffer[width - 1 - i :: width]
    return swapped


def dense_bytes(tensor: torch.Tensor, key: str) -> memoryview:
    """A tensor's elements as bytes, C-contiguous; without a copy where it is so already on the CPU.

    Raises:
        CheckpointError: the tensor is not plain memory, or has no data (meta device).
    """
    tensor = plain(tensor, key)
    refuse_meta(tensor, key)
    dense = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
    nbytes = dense.numel() * dense.element_size()
    if nbytes == 0:
        return memoryview(b"")
    # A ctypes view needs no numpy, and knows every dtype because it knows none.
    raw = (ctypes.c_ubyte * nbytes).from_address(dense.data_ptr())
    raw._owner = dense  # type: ignore[attr-defined]
    return memoryview(raw).cast("B")


def refuse_meta(tensor: torch.Tensor, key: str) -> None:
    """Raises where a tensor has a shape but no data."""
    if tensor.is_meta:
        raise CheckpointError(
            Diagnostic(
                "meta-tensor",
                f"{key!r} is on the meta device and has no data",
                key,
                help="load a checkpoint into the model first",
            )
        )


def memory_place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two plain tensors exactly when they are the same elements of the same storage."""
    # The storage's own address tells meta tensors apart, whose data pointers are all 0.
    strides = None if tensor.is_contiguous() else tensor.stride()
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), strides, tensor.is_conj(), tensor.is_neg()
