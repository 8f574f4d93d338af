"""Where the named tensors of a model live: which module holds which, under which names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError, Diagnostic, LoadError, Remedy
from ..narrowing import present
from ..specs import TensorSpec
from ..storage.plain_memory import odd_tensors, oddity

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Place",
    "close_names",
    "named_tensors",
    "place_of",
    "places",
    "places_of",
    "require_module",
    "require_plain",
    "size_of",
    "spec_at",
]


@dataclass(frozen=True, eq=False)
class Place:
    """One name of one tensor: the module that holds it, and the name it has there.

    Args:
        name: the full name, as a state_dict spells it.
        owner: the module whose parameter or buffer it is.
        leaf: its name within `owner`.
        is_buffer: whether it is a buffer.
    """

    name: str
    owner: nn.Module
    leaf: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that lies there now."""
        found = (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.leaf]
        return present(found, f"the tensor {self.name!r}")

    @property
    def persistent(self) -> bool:
        """Whether a state_dict holds it."""
        return not (self.is_buffer and self.leaf in self.owner._non_persistent_buffers_set)

    def put(self, tensor: Tensor) -> None:
        """Register another tensor under this name."""
        # By setattr, not by writing the dict: some modules (RNNs) keep lists of their weights, and update them there.
        setattr(self.owner, self.leaf, tensor)


def require_module(model: object, help: str | None = None) -> None:
    """Refuse anything but an `nn.Module`.

    Args:
        help: how the caller's call takes its model. For a class the help is to build one.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        return
    found = type(model).__name__
    if isinstance(model, type) and issubclass(model, nn.Module):
        found, help = f"the class {model.__name__}", f"build one first: {model.__name__}(…)"
    raise LoadError(Diagnostic("not-a-model", f"a torch.nn.Module is needed, and this is {found}", help=help))


def places(model: nn.Module) -> Iterator[Place]:
    """Every name of every parameter and buffer, in state_dict order; a shared tensor comes under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(prefix + leaf, module, leaf, False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                yield Place(prefix + leaf, module, leaf, True)


def named_tensors(model: nn.Module, buffers: bool = True) -> dict[str, Tensor]:
    """Name -> parameter or buffer, in state_dict order, each shared tensor under each of its names."""
    return {p.name: p.tensor for p in places(model) if buffers or not p.is_buffer}


def size_of(place: Place) -> tuple[int, int]:
    """Elements and bytes; a lazy parameter has none yet, and a sharded one those of the whole.

    Raises:
        LoadError: the tensor does not hold its elements one by one (sparse, nested, quantised), so it has no such size.
    """
    from torch.nn.parameter import is_lazy

    if is_lazy(place.tensor):
        return 0, 0
    found = oddity(place.tensor)
    if found is not None and not found.sized:
        raise LoadError(odd_tensors([(place.name, place.tensor)]))
    spec = spec_at(place)
    return spec.numel, spec.nbytes


def spec_at(place: Place) -> TensorSpec:
    """The shape and dtype of the tensor at a place.

    Raises:
        LoadError: it has none, as a nested or a quantised tensor has none.
    """
    try:
        return TensorSpec(tuple(place.tensor.shape), place.tensor.dtype)
    except (CheckpointError, RuntimeError):
        problems = odd_tensors([(place.name, place.tensor)])
        if problems:
            raise LoadError(problems) from None
        raise


def require_plain(tensors: Iterable[tuple[str, Tensor]], help: str) -> None:
    """Check that tensors of a model are plain memory, before anything is written into them.

    Raises:
        LoadError: those that are not, each by its name.
    """
    from torch.nn.parameter import is_lazy

    problems = odd_tensors(((name, tensor) for name, tensor in tensors if not is_lazy(tensor)), help)
    if problems:
        raise LoadError(problems)


def places_of(model: nn.Module, tensor: Tensor) -> list[Place]:
    """The places where this very object lies."""
    return [p for p in places(model) if p.tensor is tensor]


def place_of(model: nn.Module, name: str) -> Place:
    """The place of one parameter or buffer.

    Raises:
        LoadError: there is none; a name that a parametrization computes is told apart from one that is misspelt.
    """
    path, _, leaf = name.rpartition(".")
    owner = _submodule(model, path)
    if owner is not None:
        if leaf in owner._parameters and owner._parameters[leaf] is not None:
            return Place(name, owner, leaf, False)
        if leaf in owner._buffers and owner._buffers[leaf] is not None:
            return Place(name, owner, leaf, True)
        computed = _computed(owner, path, leaf)
        if computed is not None:
            raise LoadError(computed)
    near = close_names(name, named_tensors(model))
    raise LoadError(
        Diagnostic(
            "unknown-tensor",
            f"the model has no parameter or buffer {name!r}",
            remedies=(Remedy("name", {name: near[:1]}, kind="instead"),) if near else (),
            advice=None if near else "select(model, …).names lists what there is",
        )
    )


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names most like this one, the nearest first; sharing the last segments counts as much as spelling."""
    candidates = list(known)
    near = difflib.get_close_matches(name, candidates, 4, 0.6)
    tail = [k for k in candidates if k.endswith("." + name)][:4]
    return list(dict.fromkeys([*near, *tail]))[:4]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        # by `in` and index: what TorchScript keeps there is no dict, and has no `get`
        module = module._modules[part] if module is not None and part in module._modules else None
    return module


def _computed(owner: nn.Module, path: str, leaf: str) -> Diagnostic | None:
    """Why `leaf` is an attribute but no tensor of its own: parametrised, normed or quantised."""
    prefix = path + "." if path else ""
    name = prefix + leaf
    lists = owner._modules.get("parametrizations")
    if lists is not None and leaf in lists._modules:
        entry = lists._modules[leaf]
        kinds = ", ".join(type(m).__name__ for m in entry.children()) if entry is not None else ""
        originals = ", ".join(
            f"{prefix}parametrizations.{leaf}.{n}" for n in (entry._parameters if entry is not None else ())
        )
        return Diagnostic(
            "parametrised",
            f"{name!r} is computed by a parametrization ({kinds}), it is no tensor of its own",
            help=f"name what it is computed from ({originals}), or remove the parametrization first",
        )
    parts = [n for n in (f"{leaf}_g", f"{leaf}_v", f"{leaf}_orig") if n in owner._parameters]
    if parts:
        return Diagnostic(
            "parametrised",
            f"{name!r} is computed from {' and '.join(prefix + n for n in parts)}, it is no tensor of its own",
            help="name these, or remove the norm first",
        )
    if callable(getattr(type(owner), leaf, None)) or leaf in vars(owner):
        return Diagnostic(
            "not-a-parameter",
            f"{name!r} is no parameter: {type(owner).__name__} keeps it in a form of its own (quantised or packed)",
            help="work on the model before it is quantised",
        )
    return None
