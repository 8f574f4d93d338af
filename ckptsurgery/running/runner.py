"""`plan`, `inverse` and `save`: plans that know their source."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike, as_recipe, file_of, load_recipe
from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, PlanError, Remedy, literal
from ..language.covering import exact_patterns
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..many_objects import gc_pause
from ..planning.drawing import with_draws
from ..planning.options import DTYPE_POLICIES, LoadOptions, PlanOptions, SaveOptions
from ..planning.plan import Plan, retargeted
from ..planning.planner import draft_plan, fitted
from ..planning.record import Target
from ..planning.report import Report
from ..planning.sharing import parted_ties
from ..planning.unread import Unreadable
from ..planning.wrapping import draft_unwrapped
from ..sharding.peers import peers
from ..sharding.shards import has_shards
from ..sharding.stand_ins import holds_shards
from ..sharding.twins import twin_of
from ..specs import DTYPES, TensorSpec, dtype_name
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..storage.sources.links import as_device
from . import beside
from .carry.asking import Carrying
from .provenance import headers_as_recorded, read_provenance
from .saving import save_plan, state_dict_of
from .source_notes import notes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["CheckpointRunner", "as_target", "inverse", "plan", "save"]


@dataclass(frozen=True)
class CheckpointRunner:
    """Carries plans over one checkpoint out: into files, into memory, into models, and back."""

    checkpoint: Checkpoint

    def save(self, plan: Plan, path: str | os.PathLike[str], options: SaveOptions) -> Report:
        """As `Plan.save`."""
        return save_plan(with_draws(plan, plan.options.seed), self.checkpoint, path, options)

    def state_dict(self, plan: Plan, device: torch.device | str | None) -> dict[str, Tensor]:
        """As `Plan.state_dict`."""
        ready = with_draws(plan, plan.options.seed)
        return state_dict_of(ready, self.checkpoint, as_device(device) if device is not None else None)

    def carried(self, plan: Plan, carry: Mapping[str, Sequence[str]] | None, lost: str | None) -> dict[str, Any]:
        """As `Plan.carried`."""
        asking = Carrying.of(plan, carry, lost)
        return beside.carried(with_draws(plan, plan.options.seed), self.checkpoint, asking)

    def load_into(
        self, plan: Plan, model: nn.Module, options: LoadOptions, device: torch.device | str | None
    ) -> Report:
        """As `Plan.load_into`."""
        from ..modeling.assigning import has_meta
        from .model_loading import load_plan

        if plan.target is None:
            if plan.recipe is None:
                text = "a reversed plan loads into no model"
                raise PlanError(Diagnostic("no-target", text, help="plan.state_dict() or .save()"))
            again = replace(plan.options, dtype="lossless")
            plan = _planned(self.checkpoint, plan.recipe, as_target(model), again)
        inside = {saved: name for name, saved in _saved_names(model).items()}
        plan = retargeted(plan, inside) if inside else plan
        assign = has_meta(model) if options.assign is None else options.assign
        where = as_device(device) if device is not None else None
        return load_plan(plan, self.checkpoint, model, replace(options, assign=assign, device=where))

    def inverse(self, plan: Plan, converted: Any) -> Plan:
        """As `Plan.inverse`."""
        from ..planning.reversing import reversed_plan

        checkpoint = open_checkpoint(converted)
        checkpoint.refuse_unreadable()
        back = reversed_plan(plan, checkpoint.specs, {a for t in checkpoint.ties for a in t.names})
        return replace(back, options=PlanOptions(), runner=CheckpointRunner(checkpoint))


@gc_pause()
def _planned(checkpoint: Checkpoint, recipe: Recipe, target: Target | None, options: PlanOptions) -> Plan:
    try:
        lost = Unreadable(checkpoint.unreadable) if checkpoint.unreadable else None
        draft = draft_unwrapped if target is not None else draft_plan  # the target shows what is a wrapper
        drafted, stage = draft(
            checkpoint.specs, recipe, load_recipe, target, options, unreadable=lost, told_of=notes_of(checkpoint)
        )
        uncast, remarks = _kept_packed(checkpoint, drafted, options.dtype)
        found = fitted(drafted, stage, target, options.dtype, uncast=uncast)
    except CkptSurgeryError as error:
        error.rewrite(lambda problem: problem.within(file_of(recipe)))
        raise
    parted = parted_ties(found, checkpoint) if target is None and checkpoint.ties else ()  # a target ties what it ties
    warnings = (*found.warnings, *parted, *remarks)
    return replace(found, options=options, warnings=warnings, runner=CheckpointRunner(checkpoint))


def _kept_packed(checkpoint: Checkpoint, drafted: Plan, dtype: str) -> tuple[Collection[str], Sequence[Diagnostic]]:
    if dtype in DTYPE_POLICIES:
        return (), ()
    from .dequantising import kept_packed  # ops of packed weights, for those who cast

    return kept_packed(checkpoint, drafted)


def plan(
    source: Any,
    recipe: RecipeLike,
    target: Any = None,
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str = "lossless",
    dims: Mapping[str, DimValue] | None = None,
    subtree: str | None = None,
    seed: int = 0,
) -> Plan:
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
        seed: of what is drawn: by `[init]` into files and state dicts, and by ops that ask for it. The numbers depend
            on seed and key alone.

    Raises:
        RecipeError, CheckpointError, PlanError: with all problems at once.
    """
    _check_dtype(dtype)
    checkpoint = open_checkpoint(source, subtree=subtree)
    known = config if config is not None else checkpoint.config
    options = PlanOptions(known, dims or {}, dtype, [tie.names for tie in checkpoint.ties], seed)
    return _planned(checkpoint, as_recipe(recipe), as_target(target), options)


def inverse(converted: Any, made_by: Plan | None = None) -> Plan:
    """Plan the exact way back from an output, by the plan that made it or by the provenance that it was saved with.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     there = plan({"a": torch.arange(6.0).view(2, 3)}, "a [x y] -> b [y x]")
    ...     report = there.save(folder + "/b.safetensors", provenance=True)
    ...     inverse(folder + "/b.safetensors").state_dict()["a"].tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]

    Args:
        converted: whatever `open` takes.
        made_by: the plan that made it; without, what the output's metadata says.

    Raises:
        CheckpointError: there is no provenance in it, or one that was edited. PlanError: it is not what was made then,
            or a step loses something; each is listed.
    """
    if made_by is not None:
        return made_by.inverse(converted)
    checkpoint = open_checkpoint(converted)
    headers, recipe, target, options = read_provenance(checkpoint)
    with headers_as_recorded(checkpoint):
        there = _planned(open_checkpoint(headers or {}), recipe, target, options)
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
    format: str | None = None,
    together: bool = False,
) -> Report:
    """Write a state_dict, a model or a checkpoint to a file or a folder; tied tensors are stored once, and stay tied.

    >>> import tempfile, torch
    >>> w = torch.ones(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = save({"embed.weight": w, "head.weight": w}, folder + "/model.safetensors")
    ...     open_checkpoint(report.files[0]).ties[0].names, report.bytes_written
    (('embed.weight', 'head.weight'), 16)

    Args:
        source: whatever `open` takes. A model or state dict with `DTensor`s is saved by all ranks together, each of
            which writes what it holds.
        path: `x.safetensors`, `x.pt` (or `.pth`, `.bin`, `.ckpt`), or a folder, by its suffix.
        max_shard_size: bytes, or "5GB", "5GiB"; for folders.
        overwrite: replace what is there.
        check: read the output back and prove that it is the source.
        sync: wait until all of it is on the disk; without, a power failure may take the output or damage it.
        format: "dcp" writes a new folder of `torch.distributed.checkpoint`, to which each rank adds what it holds.
        together: all ranks save one checkpoint, also where none has a `DTensor`: the stages of a pipeline, each with
            some of the keys.

    Raises:
        CheckpointError: the source cannot be read, or the output not be written; nothing is left half-written.
    """
    if together or holds_shards(source):
        return _save_together(source, path, max_shard_size, overwrite, check, sync, progress, format, together)
    checkpoint = open_checkpoint(source)
    lost = checkpoint.unreadable
    if lost:
        drops = literal(exact_patterns(lost, [*checkpoint, *lost]))
        help = f'cs.plan(source, cs.Recipe(rest="keep", drop={drops})).save(path) leaves them out'
        checkpoint.refuse_unreadable(help)
    whole = plan(checkpoint, Recipe(rest="keep"))
    return whole.save(path, max_shard_size, overwrite, check=check, sync=sync, progress=progress, format=format)


def _save_together(
    source: Any,
    path: str | os.PathLike[str],
    max_shard_size: int | str | None,
    overwrite: bool,
    check: bool,
    sync: bool,
    progress: bool | None,
    format: str | None,
    together: bool,
) -> Report:
    """Save what several ranks hold together."""
    from .sharded_saving import Shards, save_shards

    ranks = peers()
    if ranks is None:
        text = "there is no process group to save shards with"
        raise CheckpointError(Diagnostic("not-by-ranks", text, str(path), help="do without it"))
    try:
        if check:
            text = "check= reads the output of one process back"
            raise CheckpointError(Diagnostic("not-by-ranks", text, str(path), help="do without it"))
        ranks.agree(None, (os.fspath(path), max_shard_size, overwrite, sync, format, together))
        shards = Shards.of(source).joined(ranks, together)
        whole = plan(shards.checkpoint, Recipe(rest="keep"))
        if format is not None:
            return shards.save_as_dcp(whole, path, ranks, format, overwrite or max_shard_size is not None)
        return save_shards(
            whole, shards, path, ranks, max_shard_size=max_shard_size, overwrite=overwrite, sync=sync, progress=progress
        )
    except Exception as error:
        ranks.fail(error)
        raise


def _check_dtype(dtype: str) -> None:
    if dtype in DTYPE_POLICIES:
        return
    try:
        wanted = DTYPES[dtype_name(dtype)]
    except CheckpointError:
        wanted = None
    if wanted is None or wanted.kind != "float":
        near = get_close_matches(dtype, (*DTYPE_POLICIES, "bf16", "fp16", "fp32", "fp64", "float16", "float32"), 1)
        raise PlanError(
            Diagnostic(
                "bad-argument",
                f"dtype={dtype!r} is neither a policy nor a floating-point dtype",
                remedies=(Remedy("dtype", {dtype: near}, kind="instead"),) if near else (),
                advice="one of " + ", ".join(map(repr, DTYPE_POLICIES)) + ', or a dtype such as "bf16"',
            )
        )


def as_target(target: Any) -> Target | None:
    """What is to be filled, from a model, a checkpoint or its path, or specs.

    A model's keys are those of its `state_dict()`, from which some wrappers leave their own names out.
    """
    if target is None or isinstance(target, Target):
        return target
    if hasattr(target, "state_dict") and hasattr(target, "named_parameters"):
        from .model_loading import model_target

        return model_target(target).renamed(_saved_names(target))
    if isinstance(target, Mapping) and target and all(isinstance(v, TensorSpec) for v in target.values()):
        return Target(dict(target))
    checkpoint = open_checkpoint(target)
    checkpoint.refuse_unreadable()
    return Target(checkpoint.specs, [t.names for t in checkpoint.ties])


def _saved_names(model: nn.Module) -> dict[str, str]:
    """Each name of a tensor that a state dict has under another one, and that one."""
    from ..modeling.places import places
    from ..modeling.saved_names import saved_names

    if not has_shards(model):
        return saved_names(model)
    twin = twin_of(model)  # a copy of a sharded module cannot be made
    saved: dict[tuple[int, str], list[str]] = {}  # a module may be in several places
    for name, owner in twin.owners.items():
        saved.setdefault((id(owner.module), owner.leaf), []).append(name)
    found = {place.name: saved[id(place.owner), place.leaf].pop(0) for place in places(model)}
    return {name: other for name, other in found.items() if name != other}
