"""What callers ask for, as objects: of a plan, of a save and of a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULTS", "DTYPE_POLICIES", "OWN", "LoadOptions", "PlanOptions", "SaveOptions"]

DTYPE_POLICIES = ("lossless", "error", "model", "source")
OWN = ("own", "own()")
"""Initialisers that leave a tensor as its module built it."""


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of a load asks for.

    Args:
        init: module path, key or pattern of the target -> initialiser.
        keep: paths that stay as constructed. drop: paths of the source to leave out.
        mismatch: of shapes: `"error"`, `"init"` or `"keep"`.
        dtype: one of `DTYPE_POLICIES`, or the dtype that every floating-point tensor gets.
        partial: whether tensors that do not fit are only listed.
        assign: whether parameters are replaced rather than copied into; None leaves it to the model.
        device: where the model comes to be, with assignment.
        check_values: whether NaN and Inf are looked for first.
        seed: of the initialisers.
        progress: whether a bar is shown; None where a terminal is there.
    """

    init: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    mismatch: str = "error"
    dtype: str = "lossless"
    partial: bool = False
    assign: bool | None = None
    device: torch.device | None = None
    check_values: bool = False
    seed: int = 0
    progress: bool | None = None


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What planning was asked for beside a source, a recipe and a target.

    Args:
        config: what `config.` meant. dims: sizes that went before the recipe's own. dtype: the policy.
        ties: groups of the source's keys that are one tensor. seed: of what is drawn.
    """

    config: Mapping[str, Any] | None = None
    dims: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "lossless"
    ties: Sequence[Sequence[str]] = ()
    seed: int = 0


DEFAULTS = PlanOptions()
"""What is asked of a plan where nothing is."""


@dataclass(frozen=True)
class SaveOptions:
    """What the caller of a save asks for.

    Args:
        max_shard_size: bytes, or text such as "5GB"; for folders.
        overwrite: whether what is there is replaced.
        max_memory: bytes to hold at most, beside the interpreter and torch.
        companions: whether config and tokenizer files go along.
        check: whether the output is read back and proved.
        resume: whether an interrupted run is gone on from.
        in_place: whether the header of the source is replaced, and nothing else.
        sync: whether it waits until all of it is on the disk.
        provenance: whether the output tells what it was made from.
        beside: what becomes of trees beside the model: a word for all, or by path.
        carry: which of these trees follow the plan, each with the keys of its parameters; None takes the recipe's.
        carry_lost: what becomes of state that cannot follow; None takes the recipe's.
        progress: whether a bar is shown; None where a terminal is there.
        dry_run: whether all is done but the writing.
        together: whether the ranks of the process group share the work.
        template: the key-value pairs of a GGUF output, or the GGUF file that they come from.
        format: `"dcp"`, or None for the one that the path asks for. ranks: into how many files `"dcp"` cuts tensors.
    """

    max_shard_size: int | str | None = None
    overwrite: bool = False
    max_memory: int | str | None = None
    companions: bool = False
    check: bool = False
    resume: bool = False
    in_place: bool = False
    sync: bool = True
    provenance: bool = False
    beside: str | Mapping[str, str] = "error"
    carry: Mapping[str, Sequence[str]] | None = None
    carry_lost: str | None = None
    progress: bool | None = None
    dry_run: bool = False
    together: bool = False
    format: str | None = None
    ranks: int = 1
    template: str | Mapping[str, Any] | None = None
