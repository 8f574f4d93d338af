"""What a rank holds of one side: the tensors of a live model or state dict, and which part of each.

Engines keep their parameters in place, and trainers sometimes replace them. So a holding remembers where each tensor is
registered, and finds its memory again at each call; a tensor that has not moved costs less than a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..boxes import Box
from ..errors import CheckpointError, Diagnostic, LoadError
from ..modeling.places import require_plain
from ..running.model_loading import ODD_TARGET, model_target
from ..sharding.shards import LocalShard, is_on_mesh, is_sharded, shard_of
from ..sharding.stand_ins import StandIns
from ..sharding.twins import Owner, twin_of
from ..specs import DTYPES, TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.header_sources import is_headers
from ..storage.memory import is_module, read_mapping
from ..storage.places.mounts import is_mounts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Held", "Holding", "holding_of", "united"]


@dataclass(frozen=True)
class Held:
    """The description of its side that a rank sends to the others.

    Args:
        specs: key -> spec of the whole tensor.
        boxes: key -> the part that the rank holds; none where it holds nothing of the tensor.
        ties: groups of keys that are one tensor.
        name: what messages call the side.
        config: the model's configuration, where it has one.
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    boxes: Mapping[str, Box] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    name: str = ""
    config: Mapping[str, Any] | None = None

    def below(self, prefix: str) -> Held:
        """The same with a prefix before all keys."""
        if not prefix:
            return self
        return replace(
            self,
            specs={prefix + key: spec for key, spec in self.specs.items()},
            boxes={prefix + key: box for key, box in self.boxes.items()},
            ties=tuple(tuple(prefix + key for key in names) for names in self.ties),
        )


@dataclass(slots=True)
class _FoundMemory:
    """The memory of one tensor, as it was found last."""

    tensor: Tensor
    inner: Tensor
    local: Tensor
    address: int


@dataclass
class Holding:
    """The tensors of one side on this rank.

    Args:
        told: what the other ranks need to know.
        owners: key -> where a model registers the tensor. tensors: key -> the tensor itself, of a state dict.
        roots: the models.
    """

    told: Held = field(default_factory=Held)
    owners: dict[str, Owner] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    roots: tuple[Any, ...] = ()
    _found: dict[str, _FoundMemory] = field(default_factory=dict)

    @property
    def is_meta(self) -> bool:
        """Whether there is a tensor without memory."""
        return any(map(self._is_meta, self.told.boxes))

    def _is_meta(self, key: str) -> bool:
        return (key not in self.owners and key not in self.tensors) or self._tensor(key).is_meta

    def _tensor(self, key: str) -> Tensor:
        owner = self.owners.get(key)
        return owner.tensor if owner is not None else self.tensors[key]

    def device(self, key: str) -> torch.device | None:
        """Return where a tensor is; None where it has no memory."""
        return None if self._is_meta(key) else _inner(self._tensor(key)).device

    def memory(self, key: str) -> Tensor:
        """Return the elements that this rank holds of a tensor, as they were found last."""
        return self._found[key].local

    def refresh(self, keys: Sequence[str]) -> bool:
        """Find the memory of tensors again, and return whether it is where it was.

        Raises:
            LoadError: a tensor has another shape, dtype or placement than when the exchange was planned.
        """
        moved = [key for key in keys if not self._is_where_it_was(key)]
        if not moved:
            return True
        try:
            self._find(moved)
        except LoadError:
            for root in self.roots:
                _reshard(root)  # after a forward pass a module may still have its parameters gathered
            self._find(moved)
        return False

    def _is_where_it_was(self, key: str) -> bool:
        known, tensor = self._found.get(key), self._tensor(key)
        if known is None or tensor is not known.tensor or _inner(tensor) is not known.inner:
            return False
        return known.inner.data_ptr() == known.address

    def _find(self, keys: Sequence[str]) -> None:
        for key in keys:
            tensor = self._tensor(key)
            shard = shard_of(tensor, key)
            spec, box = self.told.specs[key], self.told.boxes[key]
            if shard.box != box or _spec(tensor) != spec:
                text = f"{key!r} is {_spec(tensor)} at {list(shard.box.low)} now; {spec} at {list(box.low)} was planned"
                raise LoadError(Diagnostic("layout-changed", text, key, help="call reshard() again"))
            inner = _inner(tensor)
            self._found[key] = _FoundMemory(tensor, inner, shard.memory, inner.data_ptr())


def holding_of(side: Any) -> Holding:
    """Return what this rank holds of a model, a state dict, specs, or several of them under prefixes.

    Raises:
        LoadError: tensors that are not plain memory, lazy parameters, partial sums. CheckpointError: not a model.
    """
    if side is None:
        return Holding()
    if is_module(side):
        return _of_module(side)
    if isinstance(side, Mapping) and is_headers(side):
        boxes = {key: Box.whole(spec.shape) for key, spec in side.items()}
        return Holding(Held(dict(side), boxes, name="specs"))
    if isinstance(side, Mapping) and is_mounts(side):
        return _joined({prefix: holding_of(one) for prefix, one in side.items()})
    if isinstance(side, Mapping):
        return _of_mapping(side)
    text = f"a {type(side).__name__} is not a live model"
    help = "a model, a state dict, {key: TensorSpec}, or None on a rank that holds nothing of it"
    raise CheckpointError(Diagnostic("bad-source", text, help=help))


def _of_module(model: Any) -> Holding:
    twin = twin_of(model)
    target = model_target(twin.module)
    owners = {key: twin.owners[key] for key in target.specs}
    require_plain(((key, _plainly(owner.tensor)) for key, owner in owners.items()), ODD_TARGET)
    config = getattr(getattr(model, "config", None), "to_dict", None)
    found = config() if callable(config) else None
    held = Held(
        target.specs,
        {key: box for key, owner in owners.items() if (box := _box(owner.tensor, key)) is not None},
        tuple(tuple(names) for names in target.ties),
        type(model).__name__,
        found if isinstance(found, dict) else None,
    )
    return Holding(_packed_refused(held), owners, roots=(model,))


def _of_mapping(state: Mapping[str, Any]) -> Holding:
    stand_ins = StandIns(state)
    contents = read_mapping(stand_ins.tree)
    tensors = {key: stand_ins.original(entry.tensor) for key, entry in contents.entries.items()}
    held = Held(
        {key: entry.spec for key, entry in contents.entries.items()},
        {key: box for key, tensor in tensors.items() if (box := _box(tensor, key)) is not None},
        tuple(tie.names for tie in Checkpoint(contents, "state_dict").ties),
        "state_dict",
    )
    return Holding(_packed_refused(held), tensors=tensors)


def _joined(parts: Mapping[str, Holding]) -> Holding:
    """Several holdings, each under a prefix of its own."""
    told = [part.told.below(prefix) for prefix, part in parts.items()]
    keys = [key for one in told for key in one.specs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        help = "give each source a prefix of its own"
        raise CheckpointError(Diagnostic("duplicate-key", f"two mounts hold {twice!r}", "mounts", help=help))
    held = Held(
        {key: spec for one in told for key, spec in one.specs.items()},
        {key: box for one in told for key, box in one.boxes.items()},
        tuple(names for one in told for names in one.ties),
        "mounts",
        next((one.config for one in told if one.config is not None), None),
    )
    return Holding(
        held,
        {prefix + key: owner for prefix, part in parts.items() for key, owner in part.owners.items()},
        {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.tensors.items()},
        tuple(root for part in parts.values() for root in part.roots),
    )


def united(by_rank: Sequence[Held]) -> Held:
    """Return one side as all ranks hold it together; its boxes are left out.

    Raises:
        LoadError: two ranks hold tensors of one name that differ in shape or dtype.
    """
    specs: dict[str, TensorSpec] = {}
    for rank, held in enumerate(by_rank):
        for key, spec in held.specs.items():
            if specs.setdefault(key, spec) != spec:
                text = f"{key!r} is {spec} on rank {rank}, and {specs[key]} on another"
                raise LoadError(
                    Diagnostic("ranks-differ", text, key, help='mount what ranks hold apart: {f"rank{rank}/": model}')
                )
    ties = dict.fromkeys(names for held in by_rank for names in held.ties)
    name = next((held.name for held in by_rank if held.name), "")
    config = next((held.config for held in by_rank if held.config is not None), None)
    return Held(specs, {}, tuple(ties), name, config)


def _box(tensor: Tensor, key: str) -> Box | None:
    """The part of a tensor that this rank holds; None where it is not in the tensor's mesh."""
    if not is_on_mesh(tensor):
        return None
    shard: LocalShard = shard_of(tensor, key)
    return shard.box


def _inner(tensor: Tensor) -> Tensor:
    """The tensor whose memory is looked at: asking a DTensor for its local part by its method takes microseconds."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _plainly(tensor: Tensor) -> Tensor:
    """What is looked at to see whether a tensor is plain memory: the local part of one that is sharded."""
    held: Any = tensor.detach()
    return held.to_local() if is_sharded(tensor) else tensor


def _packed_refused(held: Held) -> Held:
    packed = [key for key, spec in held.specs.items() if DTYPES[spec.dtype].bits % 8]
    if packed:
        text = f"{packed[0]!r} is {held.specs[packed[0]].dtype}, whose elements are not whole bytes"
        raise LoadError(Diagnostic("packed-chunks", text, packed[0], help="view it as U8 on both sides"))
    return held


def _reshard(root: Any) -> None:
    for module in root.modules():
        if type(module).__name__.startswith("FSDP") and callable(getattr(module, "reshard", None)):
            module.reshard()
