"""A device of torch's own making: its memory is kept on a shelf of CPU tensors, which nothing but copies can reach.

`put_up` registers it as torch's private device, for the rest of the process, in Python alone. It knows no page-locked
memory, so plain copies must do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

SHELF: dict[int, torch.Tensor] = {}  # storage -> its bytes
KERNELS: list[library.Library] = []  # one, that lasts as long as the process
ROOM = 1 << 20  # bytes of a tensor at most
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def put_up() -> None:
    """From now on "shelf" is a device."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("shelf")
    KERNELS.append(library.Library("aten", "IMPL"))
    for name, kernel in {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_copy_from": _copy_from,
        "view": _shares(torch.ops.aten.view.default),
        "as_strided": _shares(torch.ops.aten.as_strided.default),
        "equal": lambda one, other: torch.equal(_bytes(one), _bytes(other)),
        "zero_": lambda tensor: (_bytes(tensor).zero_(), tensor)[1],
    }.items():
        KERNELS[0].impl(name, kernel, "PrivateUse1")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on the shelf for a tensor, as a CPU tensor."""
    whole = SHELF[tensor.untyped_storage()._cdata].view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    if torch.Size(size).numel() * dtype.itemsize > ROOM:
        raise RuntimeError("the shelf is full")
    made = torch._C._acc.create_empty_tensor(list(size), dtype)
    SHELF[made.untyped_storage()._cdata] = torch.zeros(made.numel() * made.element_size(), dtype=torch.uint8)
    return made


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return _empty(size, dtype=dtype)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    here = _bytes(source) if source.device.type == "shelf" else source
    (_bytes(target) if target.device.type == "shelf" else target).copy_(here)
    return target


def _shares(op: Any) -> Any:
    return lambda *args, **kwargs: op.redispatch(CPU, *args, **kwargs)  # views look at no memory
