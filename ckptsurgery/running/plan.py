"""The plan that a caller holds: what planning found out, together with the source it was found in, ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike, as_recipe, file_of, load_recipe
from ..collection import without_collection
from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, PlanError, Remedy, literal
from ..language.covering import exact_patterns
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..planning.costing import Cost, cost_of
from ..planning.plan import Plan, Target
from ..planning.planner import fitted
from ..planning.reversing import reversed_plan
from ..planning.settlement import DTYPE_POLICIES, LoadOptions
from ..planning.unread import Unreadable
from ..planning.wrapping import draft_unwrapped
from ..specs import DTYPES, TensorSpec, dtype_name
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open_checkpoint
from ..storage.sources.links import as_device
from .provenance import Asked, as_told, read_provenance
from .report import Report
from .saving import save_plan, state_dict_of
from .sharing import output_aliases, scattered_keys, unread_proofs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["RunnablePlan", "as_target", "plan", "plan_back", "save"]


@dataclass(frozen=True, repr=False)
class RunnablePlan(Plan):
    """A checked plan over one source: look at it, then save it, load it or take its state_dict.

    >>> import torch
    >>> p = plan({"a.w": torch.ones(2, 1)}, ["a.w [x y] -> w [y x]"])
    >>> p.cost.bytes_read, list(p.state_dict()), p.state_dict()["w"].shape
    (8, ['w'], torch.Size([1, 2]))
    """

    checkpoint: Checkpoint = field(default_factory=lambda: open_checkpoint({}), repr=False, compare=False)
    asked: Asked = field(default_factory=Asked, repr=False, compare=False)

    @property
    def cost(self) -> Cost:
        """What running it will take; tensors that are tied in the source are written once, and not compared."""
        checkpoint = self.checkpoint
        aliases, unread = output_aliases(self, checkpoint), unread_proofs(self, checkpoint)
        return cost_of(self, aliases, unread, scattered_keys(checkpoint))

    def save(
        self,
        path: str | os.PathLike[str],
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
        *,
        max_memory: int | str | None = None,
        companions: bool = False,
        check: bool = False,
        resume: bool = False,
        in_place: bool = False,
        sync: bool = True,
        provenance: bool = False,
        beside: str | Mapping[str, str] = "error",
        progress: bool | None = None,
    ) -> Report:
        """Stream the result into a file or a folder, which appears whole or not at all.

        Args:
            path: `x.safetensors`, `x.pt` (or `.pth`, `.bin`, `.ckpt`), or a folder, by its suffix.
            max_shard_size: bytes, or "5GB", "5GiB"; for folders.
            overwrite: replace what is there; the source itself may be it.
            max_memory: hold no more at once, beside the interpreter and torch; refused before starting where the
                largest step alone would.
            companions: config and tokenizer files go along into the folder.
            check: read the output back and prove that it is what the plan makes.
            resume: keep what is written when the run is interrupted, and go on from what an interrupted run of this
                very plan left; for safetensors.
            in_place: `path` is the one safetensors file that is read, and nothing but names and shapes changes: write a
                new header over the old one, which is saved beside it and `restore_header` puts back. Refused where more
                would change, where the header has no room, and where the file has other names on the disk.
            sync: wait until all of it is on the disk; without, a power failure may take the output or damage it, and a
                process that is killed still leaves all of it or nothing.
            provenance: write into the metadata what this was made from: the recipe, the source's headers and hashes (so
                it is read once more), the version; `plan_back` needs nothing else.
            beside: what becomes of trees beside the model that belong to tensors which the plan changes, such as an
                optimizer's state or an EMA copy: "error" names them, "drop" leaves them out, "keep" copies them as
                they are; or a word for each, `{"optimizer": "drop", "ema": "keep"}`, where `""` means all others.
            progress: True or False to insist on a bar or on none.
        """
        return save_plan(
            self,
            self.checkpoint,
            path,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            max_memory=max_memory,
            companions=companions,
            check=check,
            resume=resume,
            in_place=in_place,
            sync=sync,
            provenance=self.asked if provenance else None,
            beside=beside,
            progress=progress,
        )

    def state_dict(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The result in memory: contiguous tensors in the target's order, tied names sharing one.

        They lie on the CPU, or on `device`: what is only copied goes there from the files, with no copy on the host.
        """
        return state_dict_of(self, self.checkpoint, as_device(device) if device is not None else None)

    def load_into(
        self,
        model: nn.Module,
        *,
        assign: bool | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        check_values: bool = False,
        progress: bool | None = None,
    ) -> Report:
        """Put the result into a model, by copy or by assignment; ties are restored, nothing is left on the meta device.

        A plan that was made without a target is held against this model first.

        Args:
            assign: True puts new parameters in place of the old ones, False copies into them. By default a model with
                tensors on the meta device is assigned, and any other is copied into.
            device: where all of the model comes to be, with assignment; a copy stays where the model is.
            seed: of the initialisers.
            check_values: look for NaN and Inf first.
            progress: True or False to insist on a bar or on none.
        """
        from ..modeling.assigning import has_meta
        from .loading import load_plan, model_target

        where = as_device(device) if device is not None else None
        ready: RunnablePlan = self
        if self.target is None:
            if self.recipe is None:
                raise PlanError(
                    Diagnostic("no-target", "a reversed plan loads into no model", help="plan.state_dict() or .save()")
                )
            ready = _planned(self.checkpoint, self.recipe, model_target(model), None, "lossless", None)
        assigned = has_meta(model) if assign is None else assign
        options = LoadOptions(assign=assigned, device=where, check_values=check_values, seed=seed, progress=progress)
        return load_plan(ready, self.checkpoint, model, options)

    def inverse(self, converted: Any) -> RunnablePlan:
        """The plan that turns the converted checkpoint back, with this plan's keys and sizes.

        Args:
            converted: what this plan made: a path, a state_dict, a model.

        Raises:
            PlanError: what was converted is not what this plan makes, or a step loses something; each is listed.
        """
        checkpoint = open_checkpoint(converted)
        checkpoint.refuse_unreadable()
        return _runnable(
            reversed_plan(self, checkpoint.specs, {a for t in checkpoint.ties for a in t.names}), checkpoint
        )


def _runnable(found: Plan, checkpoint: Checkpoint, asked: Asked | None = None) -> RunnablePlan:
    known = {f.name: getattr(found, f.name) for f in fields(Plan)}
    return RunnablePlan(**known, checkpoint=checkpoint, asked=asked or Asked())


@without_collection()
def _planned(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target | None,
    config: Mapping[str, Any] | None,
    dtype: str,
    dims: Mapping[str, DimValue] | None,
    ties: Sequence[Sequence[str]] | None = None,
) -> RunnablePlan:
    known = [tie.names for tie in checkpoint.ties] if ties is None else ties
    asked = Asked(config if config is not None else checkpoint.config, dims or {}, dtype, known)
    try:
        drafted, stage = draft_unwrapped(
            checkpoint.specs,
            recipe,
            load_recipe,
            target=target,
            config=asked.config,
            dims=dims,
            ties=known,
            unreadable=Unreadable(checkpoint.unreadable),
        )
        found = fitted(drafted, stage, target, dtype)
    except CkptSurgeryError as error:
        error.rewrite(lambda problem: problem.within(file_of(recipe)))
        raise
    return _runnable(found, checkpoint, asked)


def plan(
    source: Any,
    recipe: RecipeLike,
    target: Any = None,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str = "lossless",
    dims: Mapping[str, DimValue] | None = None,
    subtree: str | None = None,
) -> RunnablePlan:
    """Plan what a recipe makes of a source, from headers alone.

    >>> import torch
    >>> print(plan({"h.0.w": torch.ones(2), "h.1.w": torch.ones(2)}, "h.{i}.w -> layers.{i}.w"))
    plan: 2 source keys -> 2 target keys (2 copy)
      h.{i}.w -> layers.{i}.w
        2 -> 2 copy  h.0.w -> layers.0.w F32 [2]
      cost: reads 16 B, writes 16 B, holds at most 8 B; 2 copies, 0 moves, 0 computed

    Args:
        source: whatever `open` takes.
        recipe: a `Recipe`, its name or path, or rules.
        target: what is to be filled: a model, a checkpoint or its path, or `{key: TensorSpec}`.
        config: what `config.` means in dims; the source's own by default.
        dtype: what a difference to the target's dtype means: "lossless" (cast where no bit is lost, else an error),
            "error", "model" (always cast) or "source" (leave it); or a dtype such as "bf16", which every floating-point
            tensor is cast to.
        dims: sizes that go before the recipe's own.
        subtree: where in a training checkpoint the tensors are.

    Raises:
        RecipeError, CheckpointError, PlanError: with all problems at once.
    """
    _check_dtype(dtype)
    checkpoint = open_checkpoint(source, subtree=subtree)
    return _planned(checkpoint, as_recipe(recipe), as_target(target), config, dtype, dims)


def plan_back(source: Any) -> RunnablePlan:
    """Plan the exact way back from an output that was saved with its provenance, and from nothing else.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     there = plan({"a": torch.arange(6.0).view(2, 3)}, "a [x y] -> b [y x]")
    ...     report = there.save(folder + "/b.safetensors", provenance=True)
    ...     plan_back(folder + "/b.safetensors").state_dict()["a"].tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]

    Args:
        source: whatever `open` takes.

    Raises:
        CheckpointError: there is no provenance in it, or one that was edited. PlanError: it is not what was made then,
            or a step loses something; each is listed.
    """
    checkpoint = open_checkpoint(source)
    headers, recipe, target, asked = read_provenance(checkpoint)
    with as_told(checkpoint):
        source = open_checkpoint(headers or {})
        there = _planned(source, recipe, target, asked.config, asked.dtype, asked.dims, asked.ties)
    return there.inverse(checkpoint)


def save(
    source: Any,
    path: str | os.PathLike[str],
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    *,
    check: bool = False,
    sync: bool = True,
    progress: bool | None = None,
) -> Report:
    """Write a state_dict, a model or a checkpoint to a file or a folder; tied tensors are stored once, and stay tied.

    >>> import tempfile, torch
    >>> w = torch.ones(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = save({"embed.weight": w, "head.weight": w}, folder + "/model.safetensors")
    ...     open_checkpoint(report.files[0]).ties[0].names, report.bytes_written
    (('embed.weight', 'head.weight'), 16)

    Args:
        source: whatever `open` takes.
        path: `x.safetensors`, `x.pt` (or `.pth`, `.bin`, `.ckpt`), or a folder, by its suffix.
        max_shard_size: bytes, or "5GB", "5GiB"; for folders.
        overwrite: replace what is there.
        check: read the output back and prove that it is the source.
        sync: wait until all of it is on the disk; without, a power failure may take the output or damage it.

    Raises:
        CheckpointError: the source cannot be read, or the output not be written; nothing is left half-written.
    """
    checkpoint = open_checkpoint(source)
    lost = checkpoint.unreadable
    if lost:
        drops = literal(exact_patterns(lost, [*checkpoint, *lost]))
        help = f'cs.plan(source, cs.Recipe(rest="keep", drop={drops})).save(path) leaves them out'
        checkpoint.refuse_unreadable(help)
    whole = plan(checkpoint, Recipe(rest="keep"))
    return whole.save(path, max_shard_size, overwrite, check=check, sync=sync, progress=progress)


def _check_dtype(dtype: str) -> None:
    if dtype in DTYPE_POLICIES:
        return
    try:
        wanted = DTYPES[dtype_name(dtype)]
    except CheckpointError:
        wanted = None
    if wanted is None or wanted.kind != "float":
        near = get_close_matches(dtype, (*DTYPE_POLICIES, "bf16", "f16", "f32", "f64"), 1)
        raise PlanError(
            Diagnostic(
                "bad-argument",
                f"dtype={dtype!r} is neither a policy nor a floating-point dtype",
                remedies=(Remedy("dtype", {dtype: near}, kind="instead"),) if near else (),
                advice="one of " + ", ".join(map(repr, DTYPE_POLICIES)) + ', or a dtype such as "bf16"',
            )
        )


def as_target(target: Any) -> Target | None:
    """What is to be filled, from a model, a checkpoint or its path, or specs."""
    if target is None or isinstance(target, Target):
        return target
    if hasattr(target, "state_dict") and hasattr(target, "named_parameters"):
        from .loading import model_target

        return model_target(target)
    if isinstance(target, Mapping) and target and all(isinstance(v, TensorSpec) for v in target.values()):
        return Target(dict(target))
    checkpoint = open_checkpoint(target)
    checkpoint.refuse_unreadable()
    return Target(checkpoint.specs, [t.names for t in checkpoint.ties])
