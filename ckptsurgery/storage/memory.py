"""Tensors in memory as a checkpoint: a state_dict, a training checkpoint around one, or a live module."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic
from ..specs import TensorSpec, dtype_name
from .contents import Contents, Entry
from .plain_memory import bare, odd_tensors, oddity
from .sources.byte_source import MEMORY
from .unpickling.inert import Ordered, Storage, Tensor
from .unpickling.nesting import find_model, flatten, settle
from .unpickling.nodes import is_state

if TYPE_CHECKING:
    import torch

__all__ = ["is_module", "placed_entry", "read_mapping", "read_module"]


def is_module(source: object) -> bool:
    """Whether an object is an `nn.Module`; imports nothing, since a module cannot be there before torch is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def read_mapping(source: Mapping[Any, Any], subtree: str | None = None) -> Contents:
    """A state_dict, or a training checkpoint around one; `nesting` finds the model's tensors, the rest goes to extras.

    Raises:
        CheckpointError: no tensors, several state_dicts side by side, or tensors that are not plain memory or of a
            dtype that no file format holds; each of them is named.
    """
    if not source and not subtree:
        return Contents({})
    mirror = _RecordingCopy()
    tree = mirror.of(source)
    mirror.refuse()
    found = find_model(tree, subtree, "state_dict")
    entries = {key: mirror.entry(leaf) for key, leaf in found.leaves.items()}
    extras = settle(found.extras, lambda leaf: mirror.entry(leaf).tensor)
    return Contents(entries, extras=extras, frame=found.frame)


def read_module(module: torch.nn.Module) -> Contents:
    """A module's state_dict; parameters that are one object stay one tensor, `config.to_dict()` becomes the config.

    Raises:
        CheckpointError: as for `read_mapping`.
    """
    state = module.state_dict(keep_vars=True)
    mirror = _RecordingCopy()
    tree = mirror.of({key: value for key, value in state.items() if not is_state(key)})
    mirror.refuse()
    # Some modules put tensors in tuples (quantised ones do): these get keys as a file of the same state_dict has them.
    leaves, rest = flatten(tree, type(module).__name__)
    contents = Contents({key: mirror.entry(leaf) for key, leaf in leaves.items()})
    contents.extras = {key: state.get(key, value) for key, value in rest.items()}
    contents.extras.update((key, value) for key, value in state.items() if is_state(key))
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        contents.extras["_metadata"] = metadata
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    contents.config = config if isinstance(config, dict) else None
    return contents


def placed_entry(entry: Entry) -> Entry:
    """Return the entry as a run of bytes of this process's memory; as it is where its tensor is not one.

    Whatever is not plain, contiguous and there stays as it is: to load it explains why it cannot be read.
    """
    tensor = entry.tensor
    if not _is_tensor(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return entry
    if tensor.is_conj() or tensor.is_neg():
        return entry
    spec, address = entry.spec, tensor.data_ptr()
    nbytes = spec.nbytes
    # a storage that was freed since the checkpoint was opened
    if nbytes and (
        not address or tensor.untyped_storage().nbytes() < tensor.storage_offset() * tensor.element_size() + nbytes
    ):
        return entry
    return tuple.__new__(Entry, (spec, MEMORY, address, None, False, tensor))


class _RecordingCopy:
    """Copies a tree with a record in the place of each tensor, as the readers of files make it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.odd: dict[str, torch.Tensor] = {}
        self.problems: list[Diagnostic] = []
        self.arrays: dict[int, Any] = {}

    def entry(self, leaf: Any) -> Entry:
        """The entry of the tensor that a record stands for."""
        return self.entries[int(leaf.storage.key)]

    def refuse(self) -> None:
        """Raise one error for all tensors that cannot be read."""
        if self.odd or self.problems:
            raise CheckpointError([*odd_tensors(self.odd.items()), *self.problems])

    def of(self, value: Any, path: str = "", above: tuple[int, ...] = ()) -> Any:
        """The mirror of a tree, or of a part of it."""
        if _is_tensor(value):
            return self.record(value, path or "the tensor")
        if _is_array(value):
            return self.record_array(value, path or "the array")
        if not isinstance(value, Mapping | list | tuple) or is_state(path):
            return value  # the extra state of a module is handed back to one as the caller's own object
        if id(value) in above:
            raise CheckpointError(Diagnostic("nested-too-deep", "the state_dict contains itself"))
        inner = (*above, id(value))
        start = f"{path}." if path else ""
        if not isinstance(value, Mapping):
            items = [self.of(item, f"{start}{n}", inner) for n, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        mirrored: dict[Any, Any] = Ordered() if isinstance(value, OrderedDict) else {}
        mirrored.update((key, self.of(item, f"{start}{key}", inner)) for key, item in value.items())
        metadata = getattr(value, "_metadata", None)
        if metadata is not None and isinstance(mirrored, Ordered):
            mirrored.attributes = {"_metadata": metadata}
        return mirrored

    def record(self, tensor: torch.Tensor, key: str) -> Any:
        """The record of a tensor; one that cannot be read is noted."""
        from .tensors import spec_of

        if oddity(tensor) is not None:
            self.odd[key] = tensor
            return None
        plain = bare(tensor)
        try:
            spec = spec_of(plain)
        except CheckpointError as error:
            self.problems += [replace(d, headline=f"{key!r}: {d.headline}", place=key) for d in error.diagnostics]
            return None
        return self._noted(Entry(spec, tensor=plain))

    def record_array(self, array: Any, key: str) -> Any:
        """The record of a numpy array, which becomes a tensor when it is asked for; one object stays one tensor."""
        try:
            spec = TensorSpec(array.shape, dtype_name(array.dtype.newbyteorder("=").name))
        except CheckpointError:
            text = f"{key!r} is a numpy array of {array.dtype}, which no tensor can hold"
            self.problems.append(Diagnostic("unknown-dtype", text, key, help=f"leave {key!r} out"))
            return None
        built = self.arrays.setdefault(id(array), partial(_tensor_of, array))
        return self._noted(Entry(spec, tensor=built))

    def _noted(self, entry: Entry) -> Any:
        self.entries.append(entry)
        spec = entry.spec
        return Tensor(Storage(str(len(self.entries) - 1), spec.dtype, spec.numel), 0, spec.shape, (), spec.dtype)


def _tensor_of(array: Any) -> torch.Tensor:
    """A tensor of an array's values, in the machine's byte order and in C order."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _is_array(value: object) -> bool:
    """Whether it is a numpy array and nothing more: a masked array's values mean less than they show."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) in (numpy.ndarray, numpy.memmap)


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
