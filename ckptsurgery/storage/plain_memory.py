"""The rule for tensors in memory: plain strided memory of this process is read and written, all else is refused.

A torch tensor may have a shape and a dtype without holding its elements: a `DTensor` holds one rank's share, a wrapper
subclass holds other tensors, a fake tensor holds nothing. Their `numel()` says how many bytes to expect, and their
address leads nowhere. Each reader and each writer of tensors asks `oddity` or `plain` before it uses an address.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError, Diagnostic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Oddity", "bare", "odd_tensors", "oddity", "plain"]


class Oddity(NamedTuple):
    """Why a tensor is not plain memory.

    Args:
        kind: a noun phrase, such as "a sparse tensor (torch.sparse_coo)".
        remedy: how to get a plain tensor.
        sized: whether its shape and dtype tell the size of the whole tensor.
    """

    kind: str
    remedy: str
    sized: bool = False


_CLASSES = {
    "DTensor": Oddity(
        "a DTensor, of which this rank holds a part", "tensor.full_tensor(), called on all ranks, gives the whole", True
    ),
    "FakeTensor": Oddity(
        "a FakeTensor, which has no data", "use tensors that were made outside of FakeTensorMode", True
    ),
    "FunctionalTensor": Oddity("a tensor that a function transform wraps", "call this outside of the transform"),
    "NestedTensor": Oddity("a nested tensor (jagged)", "tensor.to_padded_tensor(0.0), or its parts one by one"),
}


def oddity(tensor: Tensor) -> Oddity | None:
    """Return why a tensor is not plain strided memory of this process, or None where it is.

    A meta tensor is not odd: its shape and dtype are known, and only its values are missing.

    >>> import torch
    >>> oddity(torch.ones(2)), oddity(torch.eye(2).to_sparse()).kind
    (None, 'a sparse tensor (torch.sparse_coo)')
    """
    import torch

    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        found = _by_transform(tensor) or _by_form(tensor)
        return found or (_by_storage(tensor) if tensor.is_cpu or tensor.is_cuda else None)
    # A subclass may answer questions about itself through `__torch_function__`; here the tensor itself is asked.
    with torch._C.DisableTorchFunctionSubclass():
        return _by_class(tensor) or _by_form(tensor) or _by_storage(tensor)


def _by_class(tensor: Tensor) -> Oddity | None:
    import torch
    from torch.nn.parameter import is_lazy

    kind = type(tensor)
    if is_lazy(tensor):
        return Oddity("an uninitialised parameter, which has no shape yet", "run the model on one batch first")
    if (found := _by_transform(tensor)) is not None:
        return found
    if kind in (torch.Tensor, torch.nn.Parameter) or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return None  # whatever a plain subclass adds, its elements are in its storage
    for base in kind.__mro__:
        if base.__name__ in _CLASSES and base.__module__.partition(".")[0] == "torch":
            return _CLASSES[base.__name__]
    return Oddity(
        f"a {kind.__module__}.{kind.__qualname__}, which keeps its data in a form of its own (__torch_dispatch__)",
        "convert it to a plain tensor first, such as tensor.dequantize()",
    )


def _by_transform(tensor: Tensor) -> Oddity | None:
    import torch

    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)
    return _CLASSES["FunctionalTensor"] if wrapped else None


def _by_form(tensor: Tensor) -> Oddity | None:
    import torch

    if tensor.is_nested:
        return Oddity("a nested tensor", "tensor.to_padded_tensor(0.0), or its parts one by one")
    if tensor.layout is not torch.strided:
        what = "an mkldnn" if tensor.is_mkldnn else "a sparse"
        return Oddity(f"{what} tensor ({tensor.layout})", "make it dense: tensor.to_dense()")
    if tensor.is_quantized:
        return Oddity(f"a quantised tensor ({tensor.dtype})", "tensor.dequantize()")
    return None


def _by_storage(tensor: Tensor) -> Oddity | None:
    # Other backends may keep their memory where no address tells of it; torch copies from there by itself.
    if tensor.device.type not in ("cpu", "cuda") or not tensor.numel():
        return None
    try:
        storage = tensor.untyped_storage()
        held, address = storage.nbytes(), storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        return Oddity("a tensor without a storage", "tensor.clone() may give it one")
    if tensor.is_contiguous():
        reach = tensor.numel()
    else:
        reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    if address == 0 or (tensor.storage_offset() + reach) * tensor.element_size() > held:
        return Oddity(
            f"a tensor whose storage was freed ({held:,} bytes are left)",
            "gather the parameters first, such as by FSDP.summon_full_params(model)",
        )
    return None


def plain(tensor: Tensor, key: str) -> Tensor:
    """Return a plain `torch.Tensor` over the same memory, detached.

    >>> import torch
    >>> plain(torch.nn.Parameter(torch.ones(2)), "w")
    tensor([1., 1.])

    Args:
        key: the tensor's name in the error.

    Raises:
        CheckpointError: it is not plain memory.
    """
    problems = odd_tensors([(key, tensor)])
    if problems:
        raise CheckpointError(problems)
    return bare(tensor)


def bare(tensor: Tensor) -> Tensor:
    """Return a plain `torch.Tensor` over the same memory, detached, of a tensor that is not odd."""
    import torch

    with torch._C.DisableTorchFunctionSubclass():
        made = tensor.detach()
        if type(made) is not torch.Tensor:
            made = made.as_subclass(torch.Tensor)
        # older versions of torch name dimensions, and then refuse views
        unnamed: Any = getattr(made, "rename", None)
        return unnamed(None) if unnamed is not None and any(getattr(made, "names", ())) else made


def odd_tensors(tensors: Iterable[tuple[str, Tensor]], help: str | None = None) -> list[Diagnostic]:
    """Return one diagnostic for each kind of tensor that is not plain memory; it names each tensor of the kind.

    >>> import torch
    >>> print(*odd_tensors([("a", torch.ones(2)), ("b", torch.eye(2).to_sparse()), ("c", torch.eye(3).to_sparse())]))
    error[not-plain-memory]: 'b' and 1 more are not plain memory: a sparse tensor (torch.sparse_coo)
       b
       c
     = help: make it dense: tensor.to_dense()

    Args:
        help: what to do; how to get a plain tensor, by default.
    """
    kinds: dict[Oddity, list[str]] = {}
    for key, tensor in tensors:
        found = oddity(tensor)
        if found is not None:
            kinds.setdefault(found, []).append(key)
    return [_refusal(keys, found, help) for found, keys in kinds.items()]


def _refusal(keys: Sequence[str], found: Oddity, help: str | None) -> Diagnostic:
    more = f"{keys[0]!r} and {len(keys) - 1:,} more are not plain memory: {found.kind}"
    headline = more if len(keys) > 1 else f"{keys[0]!r} is not plain memory: {found.kind}"
    notes = tuple(keys) if len(keys) > 1 else ()
    place = None if notes else keys[0]
    return Diagnostic("not-plain-memory", headline, place, notes=notes, help=help or found.remedy)
