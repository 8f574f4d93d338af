"""Tensors of trees beside the model: their specs, their values, and tensors that are made when they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...planning.steps import Step
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Entry
from ...storage.mirrors import leaf_spec
from ..executor.programs import run_step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Leaves", "alike", "with_tensors"]


@dataclass(frozen=True)
class Leaves:
    """Reads and makes tensors of the trees beside one checkpoint's model."""

    checkpoint: Checkpoint

    def load(self, leaf: Any, name: str) -> Tensor:
        """Return the tensor of a leaf.

        Args:
            name: what messages call it.
        """
        if isinstance(leaf, Entry):
            return self.checkpoint.tensor_at(leaf, name)
        tensor: Tensor = leaf.detach()
        return tensor

    def copy(self, leaf: Any, name: str) -> Any:
        """Return a leaf of equal value with memory of its own; what is not a tensor is returned as it is.

        Optimizers count their steps in place, so that two parameters must not share one counter.
        """
        spec = leaf_spec(leaf)
        return leaf if spec is None else Entry(spec, tensor=_CopiedLeaf(self, leaf, name))

    def made(self, step: Step, leaves: dict[str, Any], name: str) -> Any:
        """Return the leaf that a step of one target makes; its values are computed when it is read.

        Args:
            leaves: key -> leaf, for each of the step's sources.
        """
        (spec,) = step.program.outputs
        if step.program.copies is not None and spec == step.program.inputs[step.program.copies[0]]:
            return leaves[step.sources[step.program.copies[0]]]
        return Entry(spec, tensor=_MovedLeaf(self, step, leaves, name))


@dataclass(frozen=True, eq=False)
class _CopiedLeaf:
    leaves: Leaves
    leaf: Any
    name: str

    def __call__(self) -> Tensor:
        return self.leaves.load(self.leaf, self.name).clone()


@dataclass(frozen=True, eq=False)
class _MovedLeaf:
    leaves: Leaves
    step: Step
    sources: dict[str, Any]
    name: str

    def __call__(self) -> Tensor:
        def load(key: str) -> Tensor:
            return self.leaves.load(self.sources[key], f"{self.name} of {key}")

        (made,) = run_step(self.step, load)
        return made.clone()


def alike(leaves: Leaves, values: list[Any]) -> bool:
    """Whether values are equal; tensors are compared by value."""
    first, *others = values
    if not others:
        return True
    if any(leaf_spec(value) is not None for value in values):
        if len({leaf_spec(value) for value in values}) > 1:
            return False
        import torch

        tensors = [leaves.load(value, "a value beside the model") for value in values]
        return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])
    return all(type(other) is type(first) and other == first for other in others)


def with_tensors(tree: Any, leaves: Leaves) -> Any:
    """Return a tree with torch tensors in the place of leaves that are read or made."""
    if leaf_spec(tree) is not None:
        return leaves.load(tree, "a tensor beside the model")
    if isinstance(tree, dict):
        return {key: with_tensors(part, leaves) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [with_tensors(part, leaves) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree
