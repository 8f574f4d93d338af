"""Which part of a tensor this rank holds, as torch's distributed checkpoints ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..boxes import Box
from ..errors import Diagnostic, LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "LocalShard",
    "empty_shard",
    "has_shards",
    "home_of",
    "is_on_mesh",
    "is_sharded",
    "mesh_of",
    "offloaded",
    "shard_of",
]


class LocalShard(NamedTuple):
    """The part of a tensor that this rank holds.

    Args:
        box: which part.
        memory: its elements, a plain tensor.
    """

    box: Box
    memory: Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which each rank holds a part."""
    return any(base.__name__ == "DTensor" and base.__module__.startswith("torch.") for base in type(tensor).__mro__)


def is_on_mesh(tensor: Tensor) -> bool:
    """Whether this rank is one of those that hold a tensor; every rank holds a plain one."""
    held: Any = tensor
    return not is_sharded(tensor) or held.device_mesh.get_coordinate() is not None


def mesh_of(tensor: Tensor, rank: int) -> tuple[int, ...]:
    """The ranks that hold a tensor together; only this one where it is plain.

    Args:
        rank: of this process.
    """
    held: Any = tensor
    return tuple(sorted(held.device_mesh.mesh.flatten().tolist())) if is_sharded(tensor) else (rank,)


def has_shards(model: nn.Module) -> bool:
    """Whether a model has a parameter or buffer of which each rank holds a part.

    >>> import torch
    >>> has_shards(torch.nn.Linear(2, 3))
    False
    """
    return any(map(is_sharded, model.parameters())) or any(map(is_sharded, model.buffers()))


def home_of(model: nn.Module) -> torch.device:
    """Where the tensors of a model are that were on the meta device: where its mesh is, or the CPU without one."""
    import torch

    meshes = (held.device_mesh for held in map(_as_any, model.parameters()) if is_sharded(held))
    mesh = next(meshes, None)
    return torch.device(mesh.device_type if mesh is not None else "cpu")


def offloaded(model: nn.Module) -> set[int]:
    """The ids of the parameters that FSDP2 keeps on the CPU (`CPUOffloadPolicy`)."""
    found = set()
    for module in map(_as_any, model.modules()):
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for held in getattr(group, "fsdp_params", ()):
                if getattr(held, "offload_to_cpu", False):
                    found.add(id(held.sharded_param))
    return found


def shard_of(tensor: Tensor, key: str) -> LocalShard:
    """The part of a tensor that this rank holds; a plain tensor is held whole.

    Any placement is covered (shards along any dimensions, strided and uneven ones, replicas): torch computes the box.

    Args:
        key: the tensor's name in the error.

    Raises:
        LoadError: its values are partial sums, or it is held in several parts.
    """
    import torch

    if not is_sharded(tensor):
        return LocalShard(Box.whole(tuple(tensor.shape)), tensor.detach())
    sharded: Any = tensor
    if any(placement.is_partial() for placement in sharded.placements):
        text = f"{key!r} is a DTensor of partial sums, which has no elements to load"
        raise LoadError(Diagnostic("partial-sums", text, key, help="redistribute it to shards or replicas first"))
    with torch.no_grad():  # with gradients, each part would be a node of the graph, 10 times as slow
        local = sharded.to_local().detach()
    boxes = _boxes(sharded, local)
    empty = not local.numel() and not any(box.numel for box in boxes)  # FSDP2 makes such a part 0 x 0, not 5 x 0
    if len(boxes) != 1 or not (empty or boxes[0].extent == tuple(local.shape)):
        text = f"this rank holds {key!r} in {len(boxes)} parts, which are not covered"
        raise LoadError(Diagnostic("several-parts", text, key, help="save it by torch.distributed.checkpoint"))
    return LocalShard(boxes[0], local)


def _boxes(sharded: Any, local: Any) -> list[Box]:
    """The boxes of a `DTensor` on this rank.

    `__create_chunk_list__` gives the same and imports torch's checkpoint library first, 70 modules in some 0.3 s.
    """
    if hasattr(local, "__create_chunk_list__"):
        chunks = sharded.__create_chunk_list__()
        return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    extent, low = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return [Box(tuple(low), tuple(extent))]


def empty_shard(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that is distributed as another is, with memory that is not filled yet.

    Args:
        device: where it comes to be.
    """
    import torch

    if not is_sharded(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor.detach()
    local = torch.empty(sharded.to_local().shape, dtype=tensor.dtype, device=device)
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


def _as_any(value: Any) -> Any:
    return value
