"""`save`: a plan, a state_dict or a checkpoint into files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collection import without_collection
from ..errors import CheckpointError, Diagnostic, PlanError, Remedy
from ..planning.costing import BUDGET, cost_of, largest_step
from ..planning.plan import Plan
from ..planning.steps import Step, outputs_of
from ..storage.checkpoint import Checkpoint
from ..storage.json_text import parse_json
from ..storage.output.resuming import ResumableWriter
from ..storage.output.staging import Writer
from ..storage.output.writing import holds_extras, open_staged, open_writer, parse_size
from ..storage.sources.files import read_regular
from ..storage.unpickling.frames import route_of
from ..wording import counted
from .beside import Asked as BesideAsked
from .beside import Beside, along_with, moved_versions
from .companions import companions_for
from .config_remarks import as_warnings, config_remarks
from .executor.execution import execute
from .executor.sinks import FileSink
from .fingerprints import fingerprint
from .progress import ByteBar
from .provenance import PROVENANCE, Asked, provenance_of
from .proving import prove
from .report import Entry, Proof, Report
from .sharing import copied_from, output_aliases, scattered_keys, unread_proofs

if TYPE_CHECKING:
    import torch

__all__ = ["save_plan", "state_dict_of"]

PathLike = str | os.PathLike[str]
FRAMEWORKS = frozenset({"pt", "np", "numpy", "tf", "tensorflow", "flax", "jax", "mlx", "paddle"})
"""Values of the metadata's `format` that name a framework, which the output restates; any other is its owner's."""


def save_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    path: PathLike,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    max_memory: int | str | None = None,
    companions: bool = False,
    check: bool = False,
    resume: bool = False,
    in_place: bool = False,
    sync: bool = True,
    provenance: Asked | None = None,
    beside: BesideAsked = "error",
    progress: bool | None = None,
) -> Report:
    """Stream a plan into a file or a folder; it appears whole or not at all.

    Raises:
        PlanError: values that must be equal differ, the plan initialises what a file cannot, memory would not do,
            two arguments do not go together, or a tree beside the model would no longer fit.
        CheckpointError: the output exists, cannot be written, or the source cannot be read; with `check`, what was
            written is not what was meant.
    """
    _refuse_inits(plan)
    if not sync:
        _refuse_without_sync(resume=resume, in_place=in_place)
    budget = _budget(plan, checkpoint, max_memory)
    framed = not in_place and holds_extras(path)
    side = along_with(plan, checkpoint, beside, framed)
    prove(plan, checkpoint)
    aliases = output_aliases(plan, checkpoint)
    if in_place:
        _refuse_with_in_place(
            max_shard_size=max_shard_size, companions=companions, resume=resume, provenance=provenance
        )
        from .renaming import change_in_place

        written, note = change_in_place(plan, checkpoint, Path(path).expanduser(), aliases, _metadata(plan, checkpoint))
        file = str(Path(path).expanduser())
        return _report(plan, checkpoint, str(path), aliases, (file,), written, (note,), read=0)
    options = _Options(max_shard_size, overwrite, companions, resume, provenance, check, sync, side, framed)
    files, written, notes, proofs = _write(plan, checkpoint, path, aliases, budget, options, progress)
    with without_collection():
        report = _report(plan, checkpoint, str(path), aliases, files, written, tuple(notes))
        stale = _stale_config(plan, checkpoint, Path(path).expanduser(), aliases) if companions else ()
        return replace(report, proofs=proofs, warnings=(*report.warnings, *stale))


def _stale_config(
    plan: Plan, checkpoint: Checkpoint, folder: Path, aliases: Mapping[str, str]
) -> tuple[Diagnostic, ...]:
    """What the config in the output says of tensors that the plan made otherwise."""
    try:
        config = parse_json(read_regular(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return ()
    return as_warnings(config_remarks(config, plan, aliases, [tie.names for tie in checkpoint.ties]))


@dataclass(frozen=True)
class _Options:
    max_shard_size: int | str | None
    overwrite: bool
    companions: bool
    resume: bool
    provenance: Asked | None
    check: bool
    sync: bool
    side: Beside
    framed: bool


def _write(
    plan: Plan,
    checkpoint: Checkpoint,
    path: PathLike,
    aliases: Mapping[str, str],
    budget: int,
    options: _Options,
    progress: bool | None,
) -> tuple[tuple[str, ...], int, list[str], tuple[Proof, ...]]:
    """The files, the bytes, what is to be said and what was proved; the writer and its places are gone by then."""
    side = options.side
    along = companions_for(checkpoint.files, Path(path).expanduser()) if options.companions else {}
    with without_collection():
        specs = plan.specs
        if aliases or plan.target is not None:
            specs = {key: specs[key] for key in plan.keys if key in specs and key not in aliases}
        writer = open_writer(
            path,
            specs,
            aliases=aliases,
            metadata=_metadata(plan, checkpoint, options.framed)
            | (provenance_of(plan, options.provenance, checkpoint) if options.provenance else {}),
            extras=side.extras,
            frame=checkpoint.frame,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            sources=checkpoint.files,
            resume=fingerprint(plan, checkpoint, aliases, along) if options.resume else None,
            lies=copied_from(plan, checkpoint),
            companions=along,
            sync=options.sync,
        )
    del specs
    with writer:
        with ByteBar(writer.nbytes, f"writing {Path(path).name}", progress) as bar:
            execute(plan.steps, checkpoint, FileSink(writer), bar, budget=budget)
            checkpoint.check_unchanged()
        proofs = _checked(plan, checkpoint, writer, aliases, budget, progress, options.framed) if options.check else ()
    lost = PROVENANCE in checkpoint.metadata
    note = ["the source's own provenance was left out: the output is made from it in another way"] if lost else []
    framework = checkpoint.metadata.get("format")
    if framework in FRAMEWORKS - {"pt"}:
        note.append(f"the metadata's format {framework!r} became 'pt'")
    if options.companions:
        note.append(f"copied along: {', '.join(along) or 'nothing, the source has no companions'}")
    if options.check:
        checked = sum(proof.nbytes for proof in proofs)
        note.append(f"checked before it took its place: {checked:,} bytes were read back, and are what the plan makes")
    return tuple(writer.files), bar.done, [*side.notes, *_left_out(writer), *_resumed(writer), *note], proofs


def _checked(
    plan: Plan,
    checkpoint: Checkpoint,
    writer: Writer,
    aliases: Mapping[str, str],
    budget: int,
    progress: bool | None,
    framed: bool,
) -> tuple[Proof, ...]:
    """What reading the output back proves, while it still has no name; what fails is not kept, nor gone on from."""
    writer.finish()
    if not writer.places:
        return ()  # a torch file without tensors is written, and is no checkpoint to a reader
    from .checking import check_output

    try:
        subtree = route_of(checkpoint.frame) if framed and checkpoint.frame else None
        with open_staged(writer, subtree) as written:
            return check_output(plan, checkpoint, written, aliases, progress, budget)
    except CheckpointError:
        writer.discard()
        checkpoint.check_unchanged()  # then that is why they differ
        raise


def state_dict_of(plan: Plan, checkpoint: Checkpoint, device: torch.device | None = None) -> dict[str, Any]:
    """The result in memory, on the CPU or on a device, in the target's order; tied names share one tensor.

    Raises:
        PlanError: as for `save_plan`.
    """
    from .sinks.tensors import StateDictSink, fill

    _refuse_inits(plan)
    prove(plan, checkpoint)
    aliases = output_aliases(plan, checkpoint)
    sink = StateDictSink(plan.steps, aliases, device)
    fill(sink, plan.steps, checkpoint, lambda nbytes: None)
    made = sink.made
    # what is left to the module that builds it ([init] own) is in no file either
    return {key: made[at] for key in plan.keys if (at := aliases.get(key, key)) in made}


def _budget(plan: Plan, checkpoint: Checkpoint, max_memory: int | str | None) -> int:
    """Bytes that tasks may hold together; a limit that the largest of them breaks is refused before anything starts."""
    if max_memory is None:
        return BUDGET
    allowed, least = parse_size(max_memory), plan.cost.least_memory
    if least <= allowed:
        return min(BUDGET, allowed)
    step = largest_step(plan, scattered_keys(checkpoint))
    raise PlanError(
        Diagnostic(
            "too-much-memory",
            f"the largest step holds {least:,} bytes, more than the {max_memory} that are allowed",
            facts=(("makes", ", ".join(step.targets[:3])), ("of", ", ".join(step.sources[:3]))),
            remedies=(Remedy("max_memory", least, "allows it"),),
            advice="or split the rule that gathers most",
        )
    )


def _refuse_inits(plan: Plan) -> None:
    drawn = [key for key, how in plan.inits.items() if how not in ("own", "own()")]
    if drawn:
        raise PlanError(
            Diagnostic(
                "init-needs-model",
                f"{counted(len(drawn), 'key', 'is')} to be initialised, which a model does and a file does not",
                notes=tuple(drawn)[:8],
                help="plan.load_into(model), then cs.save(model.state_dict(), path)",
            )
        )


def _refuse_with_in_place(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise PlanError(
                Diagnostic(
                    "bad-argument", f"in_place changes one file's header, and knows no {name}", help=f"without {name}"
                )
            )


_RELY_ON_SYNC = {
    "resume": "resume goes on from what is known to be on the disk",
    "in_place": "in_place writes over the header that the tensors are found by",
}


def _refuse_without_sync(**given: bool) -> None:
    for name, value in given.items():
        if value:
            text = f"{_RELY_ON_SYNC[name]}, so it cannot go without sync"
            synced = Remedy("sync", True)
            raise PlanError(Diagnostic("bad-argument", text, remedies=(synced,), advice=f"or do without {name}"))


def _metadata(plan: Plan, checkpoint: Checkpoint, framed: bool = False) -> dict[str, str]:
    """String metadata of the output; `framed` where its format holds the versions of modules by itself."""
    # What the source was made from is no longer what the output was made from.
    own = {PROVENANCE} | ({"format"} if checkpoint.metadata.get("format") in FRAMEWORKS else set())
    kept = {k: v for k, v in checkpoint.metadata.items() if k not in own}
    return kept if framed else kept | moved_versions(plan, checkpoint.extras)


def _left_out(writer: object) -> tuple[str, ...]:
    left = getattr(writer, "left_out", ())
    return (f"left out, as the format cannot hold it: {', '.join(map(str, left))}",) if left else ()


def _resumed(writer: Writer) -> tuple[str, ...]:
    if not isinstance(writer, ResumableWriter):
        return ()
    notes = [f"resumed: {writer.resumed:,} bytes were there from an interrupted run"] if writer.resumed else []
    others = writer.journal.others()
    if others:
        notes.append(f"unfinished output of another run lies here, remove it if it is not wanted: {', '.join(others)}")
    return tuple(notes)


def _report(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str,
    aliases: Mapping[str, str],
    files: tuple[str, ...],
    written: int,
    notes: tuple[str, ...],
    read: int | None = None,
) -> Report:
    return Report(
        ledger(plan, aliases, lambda rule: plan.uses[rule].text),
        source=checkpoint.source,
        target=path,
        notes=notes,
        warnings=plan.warnings,
        files=files,
        bytes_read=_read(plan, checkpoint, aliases) if read is None else read,
        bytes_written=written,
    )


def _read(plan: Plan, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> int:
    return cost_of(plan, aliases, unread_proofs(plan, checkpoint), scattered_keys(checkpoint)).bytes_read


def ledger(plan: Plan, aliases: Mapping[str, str], text: Callable[[int], str]) -> tuple[Entry, ...]:
    """One entry for every key of either side."""
    entries = _made(plan, {rules: text(rules[-1]) for rules in set(map(attrgetter("rules"), plan.steps))})
    if aliases:
        tied = ((e, aliases.get(e.key)) for e in entries)
        entries = [e if base is None else Entry(e.key, "tied", e.spec, e.sources, base) for e, base in tied]
    if plan.ties:
        made = {e.key for e in entries}
        bare = ((alias, base) for alias, base in plan.ties.items() if alias not in made)
        entries += [Entry(alias, "tied", plan.specs.get(base), (), base) for alias, base in bare]
    wanted = plan.target.specs if plan.target else {}
    entries += [
        Entry(key, "kept", wanted.get(key), by="left to the module that builds it")
        for key, how in plan.inits.items()
        if how in ("own", "own()")
    ]
    entries += [Entry(key, "dropped", plan.source.get(key), (key,), line) for key, line in plan.dropped.items()]
    entries += [Entry(key, "dropped", plan.source.get(key), (key,), f"equal to {kept}") for key, kept in plan.proofs]
    return tuple(entries)


def _made(plan: Plan, texts: Mapping[tuple[int, ...], str]) -> list[Entry]:
    """An entry for every key that a step makes; of 100,000 none by a call of its own.

    Args:
        texts: what is said of the steps of the same rules.
    """
    steps: Sequence[Step] = plan.steps
    keys, specs = outputs_of(steps)
    if len(keys) > len(steps):  # the step of each key
        steps = list(chain.from_iterable(map(repeat, steps, map(len, map(attrgetter("targets"), steps)))))
    sources, rules = map(attrgetter("sources"), steps), map(attrgetter("rules"), steps)
    casts = map(plan.casts.get, keys) if plan.casts else repeat(None)
    rows = zip(keys, repeat("loaded"), specs, sources, map(texts.__getitem__, rules), casts)
    return list(map(tuple.__new__, repeat(Entry), rows))
