"""Putting a plan's result into a model: by copy or by assignment, ties and buffers whole, with a ledger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic, LoadError, Remedy, literal
from ..modeling.assigning import move_to, set_tensor
from ..modeling.facts import target_of
from ..modeling.initialising import FirstValues, computed_buffers, materialise_buffers
from ..modeling.places import named_tensors, require_plain
from ..modeling.ties import find_ties, restore_ties
from ..planning.options import OWN, LoadOptions
from ..planning.plan import Plan
from ..planning.record import Target
from ..planning.report import Report, ReportEntry
from ..specs import TensorSpec, Tie
from ..storage.checkpoint import Checkpoint
from ..wording import counted
from .executor.programs import run_step
from .progress import ByteBar
from .proving import prove
from .proving_overlaps import prove_overlaps
from .saving import ledger
from .sinks.existing_tensors import CopySink, apart_from
from .sinks.new_tensors import AssignSink, TensorSink, fill

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Tensors = Mapping[str, Tensor]

__all__ = ["ODD_TARGET", "load_plan", "model_target", "non_finite", "refuse_bad", "refuse_non_finite", "report_of"]

ODD_TARGET = "load before the model is sharded or quantised; keep= leaves a tensor as it is"


def model_target(model: nn.Module) -> Target:
    """What a model wants: its state_dict's keys in order, and which of them are one tensor."""
    facts = target_of(model)
    if facts.lazy:
        raise LoadError(
            Diagnostic(
                "lazy-parameter",
                f"{counted(len(facts.lazy), 'parameter', 'has')} no shape yet",
                notes=facts.lazy[:6],
                help="run the model on one batch first",
            )
        )
    ties = [[n for n in g.names if n in facts.specs] for g in facts.ties]
    return Target(facts.specs, [names for names in ties if len(names) > 1], "model")


def load_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    model: nn.Module,
    options: LoadOptions,
    *,
    extra_load: Callable[[], object] | None = None,
    extra_keys: Sequence[str] = (),
) -> Report:
    """Carry a plan out on a model.

    Args:
        options: what to do with the model: assign or copy, where to, initialise with which seed, look for NaN.
        extra_load: further work on the model, after the plan's own and before ties and buffers are made whole.
        extra_keys: the keys that this work fills.

    Raises:
        PlanError: values that must be equal differ. LoadError: the model cannot take the result; after an I/O failure
            in the middle, `.written` and `.untouched` tell which keys hold what.
    """
    assign, device = bool(options.assign), options.device
    prove(plan, checkpoint)
    inits = {k: v for k, v in plan.inits.items() if v not in OWN}
    kept = [k for k, v in plan.inits.items() if v in OWN]
    tensors = named_tensors(model)
    named = (key for key in (*plan.specs, *extra_keys, *inits) if key in tensors)
    require_plain(((key, tensors[key]) for key in named), ODD_TARGET)
    _refuse((*plan.specs, *extra_keys), tensors, kept, assign, device)
    if not assign:
        prove_overlaps(plan, checkpoint, tensors, kept)
    meta = any(tensor.is_meta for tensor in tensors.values())
    # a module that loads in its own way may compute its buffers then
    buffers = computed_buffers(model) if meta and extra_load is None else {}
    if options.check_values:
        made = (zip(step.targets, run_step(step, checkpoint.load)) for step in plan.steps)
        refuse_non_finite(chain.from_iterable(made))
    first = FirstValues.of(model, inits, options.seed) if inits else None
    ties = find_ties(model)
    skipped = {other for other, _ in plan.tie_proofs}
    filled = {*extra_keys, *inits, *(k for step in plan.steps for k in step.targets if k not in skipped)}
    with ByteBar(sum(s.nbytes for s in plan.specs.values()), "loading", options.progress) as bar:
        _carry_out(plan, checkpoint, model, assign, device, bar)
    if extra_load is not None:
        extra_load()
    rows = first.give(model) if first is not None else ()
    for name, buffer in buffers.items():
        set_tensor(model, name, buffer, assign=True)
    if meta and extra_load is not None:
        materialise_buffers(model)
    if device is not None:
        move_to(model, device)
    _restore(model, ties, filled, plan)
    if meta:
        _refuse_left(model)
    return report_of(plan, checkpoint, model, rows, kept, skipped, bar.done)


def report_of(
    plan: Plan,
    checkpoint: Checkpoint,
    model: nn.Module,
    rows: Sequence[Any],
    kept: Sequence[str],
    skipped: Collection[str],
    nbytes: int,
) -> Report:
    """The report of a plan that was carried out on a model.

    Args:
        rows: what was initialised. kept: keys left as constructed. skipped: tied keys that were not made.
        nbytes: what was written.
    """
    return Report(
        _entries(plan, rows, kept, model),
        checkpoint.source,
        type(model).__name__,
        tuple(_untied(plan, checkpoint, skipped)),
        plan.warnings,
        bytes_read=plan.cost.bytes_read,
        bytes_written=nbytes,
    )


def _carry_out(
    plan: Plan, checkpoint: Checkpoint, model: nn.Module, assign: bool, device: torch.device | None, bar: ByteBar
) -> None:
    skipped = {other for other, _ in plan.tie_proofs}
    sink: TensorSink
    if assign:
        sink = AssignSink(plan.steps, skipped, model, device)
    else:
        sink = CopySink(plan.steps, skipped, model)
        checkpoint = apart_from(model, checkpoint)
    try:
        fill(sink, plan.steps, checkpoint, bar)
    except (OSError, CheckpointError) as error:
        raise _broken_off(plan, sink, error) from error


def _broken_off(plan: Plan, sink: TensorSink, error: OSError | CheckpointError) -> LoadError:
    written, torn_keys = sink.written, sink.torn
    touched = {*written, *torn_keys}
    untouched = [k for step in plan.steps for k in step.targets if k not in touched]
    first = error.diagnostics if isinstance(error, CheckpointError) else (Diagnostic("read-failed", str(error)),)
    if not touched:
        return LoadError(first, (), untouched)
    torn = f", {len(torn_keys)} a mix of both ({', '.join(torn_keys[:4])})" if torn_keys else ""
    half = Diagnostic(
        "half-loaded",
        f"the load broke off: new values in {counted(len(written), 'key')}, old in {len(untouched):,}{torn}",
        help="load again, or build the model anew",
    )
    return LoadError([*first, half], written, untouched)


def _refuse(
    filled: Sequence[str], tensors: Tensors, kept: Sequence[str], assign: bool, device: torch.device | None
) -> None:
    """Refuse what the model's tensors cannot take."""
    _refuse_meta(filled, tensors, kept, assign)
    if not assign:
        _refuse_repeated(filled, tensors)
        if device is not None:
            _refuse_elsewhere(filled, tensors, device)


def _refuse_repeated(filled: Sequence[str], tensors: Tensors) -> None:
    """Tensors that are one value shown many times (`expand`) have no room for many."""
    strided = (k for k in filled if k in tensors and not tensors[k].is_contiguous())
    wrong = [k for k in strided if any(d == 0 and n > 1 for d, n in zip(tensors[k].stride(), tensors[k].shape))]
    if wrong:
        raise LoadError(
            Diagnostic(
                "expanded-target",
                f"{len(wrong)} of the model's tensors show one value many times (expand), and cannot take many",
                notes=tuple(wrong[:6]),
                remedies=(Remedy("assign", True, "puts new tensors in their place"),),
            )
        )


def _refuse_elsewhere(filled: Sequence[str], tensors: Tensors, device: torch.device) -> None:
    """What is copied into stays where it is, so that another device is asked for in vain."""
    wrong = {k: tensors[k].device for k in filled if k in tensors and tensors[k].device != device}
    if wrong:
        lie = ", ".join(sorted({str(there) for there in wrong.values()}))
        raise LoadError(
            Diagnostic(
                "other-device",
                f"{counted(len(wrong), 'model tensor', 'lies')} on {lie}, and device={str(device)!r} is asked for",
                notes=tuple(wrong)[:6],
                remedies=(Remedy("assign", True), Remedy("to", f"model.to({literal(str(device))})", kind="before")),
            )
        )


def _refuse_meta(filled: Sequence[str], tensors: Tensors, kept: Sequence[str], assign: bool) -> None:
    meta = {n for n, t in tensors.items() if t.is_meta}
    if not meta:
        return
    targets = [k for k in filled if k in meta]
    if targets and not assign:
        raise LoadError(
            Diagnostic(
                "meta-target",
                f"{counted(len(targets), 'model parameter', 'is')} on the meta device, where nothing can be copied to",
                notes=tuple(targets[:6]),
                remedies=(Remedy("assign", True),),
            )
        )
    empty = [k for k in tensors if k in meta and k in kept]  # `kept` may be a set: in the model's order
    if empty:
        raise LoadError(
            Diagnostic(
                "meta-kept",
                f"{len(empty)} keys would be kept as built, but they are on the meta device",
                notes=tuple(empty[:12]),
                remedies=(Remedy("init", dict.fromkeys(empty, "default"), "gives them first values", kind="recipe"),),
            )
        )


def refuse_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Look through what is about to be loaded.

    Raises:
        LoadError: some of it holds NaN or Inf.
    """
    refuse_bad(non_finite(tensors))


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return a line for each tensor that holds NaN or Inf."""
    import torch

    bad: list[str] = []
    for key, tensor in tensors:
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() and not tensor.is_meta:
            wide = tensor if tensor.element_size() > 1 else tensor.float()
            count = int((~torch.isfinite(wide)).sum())
            if count:
                bad.append(f"{key}  {count} of {tensor.numel()} elements")
    return bad


def refuse_bad(bad: Sequence[str]) -> None:
    """Raise the error for tensors that hold NaN or Inf, if there are any."""
    if bad:
        raise LoadError(
            Diagnostic(
                "non-finite",
                f"{counted(len(bad), 'source tensor', 'holds')} NaN or Inf; nothing was loaded",
                notes=tuple(bad[:12]),
                remedies=(Remedy("check_values", False, "loads them all the same"),),
            )
        )


def _restore(model: nn.Module, ties: Sequence[Tie], filled: Collection[str], plan: Plan) -> None:
    groups = list(ties)
    known = {n for g in groups for n in g.names}
    wanted: dict[str, list[str]] = {}
    for alias, base in plan.ties.items():
        if alias not in known:
            wanted.setdefault(base, [base]).append(alias)
    groups += [Tie(tuple(names), "declared") for names in wanted.values()]
    if groups:
        restore_ties(model, groups, prefer=filled)


def _untied(plan: Plan, checkpoint: Checkpoint, skipped: Collection[str]) -> list[str]:
    """A note for each tie of the source of which the model makes separate tensors."""
    if not checkpoint.ties:
        return []
    made: dict[str, list[str]] = {}
    for step in plan.steps:
        if len(step.sources) == len(step.targets) == 1 and step.kind != "compute":
            made.setdefault(step.sources[0], []).extend(key for key in step.targets if key not in skipped)
    notes = []
    for tie in checkpoint.ties:
        keys = [made[name][0] for name in tie.names if made.get(name)]
        if len(keys) > 1:
            others = "; ".join(f"cs.tie(model, {key!r}, to={keys[0]!r})" for key in keys[1:])
            notes.append(f"one tensor in the source, separate in the model: {', '.join(keys)}; to tie them: {others}")
    return notes


def _refuse_left(model: nn.Module) -> None:
    left = [n for n, t in named_tensors(model).items() if t.is_meta]
    if left:
        raise LoadError(
            Diagnostic(
                "meta-left",
                f"{counted(len(left), 'model tensor', 'is')} still on the meta device",
                notes=tuple(left[:12]),
                help="load or initialise them",
            )
        )


def _entries(plan: Plan, rows: Sequence[Any], kept: Sequence[str], model: nn.Module) -> tuple[ReportEntry, ...]:
    by_key: dict[str, ReportEntry] = {}
    target: Mapping[str, TensorSpec] = plan.target.specs if plan.target else {}
    for entry in ledger(plan, plan.ties, lambda rule: plan.uses[rule].text):
        if entry.action == "tied" and entry.spec is None:
            entry = entry._replace(spec=target.get(entry.key))
        by_key[("source:" if entry.action == "dropped" else "") + entry.key] = entry
    said = {row.name: f"{row.initialiser} ({row.by}, seed {row.seed})" for row in rows}
    for key, what in plan.inits.items():
        if key in kept:
            by_key[key] = ReportEntry(key, "kept", target.get(key), by="as the model built it")
        else:
            by_key[key] = ReportEntry(key, "initialised", target.get(key), by=said.get(key, str(what)))
    order = [*target, *(k for k in by_key if k not in target)]
    return tuple(by_key[k] for k in order if k in by_key)
