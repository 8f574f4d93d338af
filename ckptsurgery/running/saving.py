"""`save`: a plan, a state_dict or a checkpoint into files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic, PlanError, Remedy
from ..many_objects import gc_pause
from ..planning.costing import BUDGET, cost_of, largest_step
from ..planning.options import OWN, SaveOptions
from ..planning.plan import Plan
from ..planning.report import Proof, Report, ReportEntry
from ..planning.sharing import copied_from, output_aliases, scattered_keys, unread_proofs
from ..planning.steps import Step, outputs_of
from ..sharding.peers import Peers, peers
from ..storage.checkpoint import Checkpoint
from ..storage.json_text import parse_json
from ..storage.output.resuming import ResumableWriter
from ..storage.output.staging import Writer
from ..storage.output.uploading import is_address
from ..storage.output.writing import WriterOptions, holds_extras, open_staged, open_writer, others_in, parse_size
from ..storage.sources.files import read_regular
from ..storage.unpickling.frames import route_of
from ..wording import counted, listed, shown_keys
from .beside import along_with, moved_versions
from .carry.asking import Carrying
from .config_remarks import as_warnings, config_remarks
from .executor.execution import execute
from .executor.sinks import FileSink
from .fingerprints import fingerprint, plan_digest
from .packing import architecture_warnings, packed_extras
from .progress import ByteBar
from .provenance import PROVENANCE, provenance_of
from .proving import prove
from .saving_at_addresses import save_at
from .writing_together import share_of, write_together

if TYPE_CHECKING:
    import torch

__all__ = ["save_plan", "state_dict_of"]

PathLike = str | os.PathLike[str]
FRAMEWORKS = frozenset({"pt", "np", "numpy", "tf", "tensorflow", "flax", "jax", "mlx", "paddle"})
"""Values of the metadata's `format` that name a framework, which the output restates; any other is its owner's."""


def save_plan(plan: Plan, checkpoint: Checkpoint, path: PathLike, options: SaveOptions) -> Report:
    """Stream a plan into a file or a folder; it appears whole or not at all.

    Raises:
        PlanError, CheckpointError: as for `Plan.save`.
    """
    _refuse_inits(plan)
    _refuse_together(options)
    if is_address(os.fspath(path)):
        return save_at(os.fspath(path), options, lambda local, more: save_plan(plan, checkpoint, local, more))
    if options.together:
        return _among_ranks(plan, checkpoint, path, options)
    save = _Save(plan, checkpoint, path, options)
    prove(plan, checkpoint)
    if options.format is not None:
        return save.write_dcp()
    return save.change_header() if options.in_place else save.write()


def _among_ranks(plan: Plan, checkpoint: Checkpoint, path: PathLike, options: SaveOptions) -> Report:
    """Save on all ranks of the process group; an error is raised on all of them."""
    ranks = peers()
    if ranks is None:
        text = "there is no process group whose ranks could share the work"
        help = "torch.distributed.init_process_group() first, or leave together= out"
        raise PlanError(Diagnostic("no-process-group", text, help=help))
    try:
        save = _Save(plan, checkpoint, path, options)
        if save.framed:
            text = "several ranks write safetensors, and a torch file was named"
            raise CheckpointError(Diagnostic("not-by-ranks", text, str(path), help="name x.safetensors, or a folder"))
        ranks.agree(None, (plan_digest(plan), os.fspath(path), *_asked(options)))
        ranks.told(0, partial(prove, plan, checkpoint))
        return save.write_with(ranks)
    except Exception as error:
        ranks.fail(error)
        raise


def _asked(options: SaveOptions) -> tuple[object, ...]:
    """What decides on the calls that a rank makes, and on the output."""
    kept = options.max_shard_size, options.overwrite, options.resume, options.sync, options.provenance
    return *kept, options.companions, options.check, options.dry_run


class _Save:
    """One save; to make it is to find out all that headers and names can refuse."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, path: PathLike, options: SaveOptions) -> None:
        self.plan, self.checkpoint, self.path, self.options = plan, checkpoint, path, options
        self.place = Path(path).expanduser()
        self.budget = _budget(plan, checkpoint, options.max_memory)
        self.framed = not options.in_place and holds_extras(path) and options.format is None
        carry = Carrying.of(plan, options.carry, options.carry_lost)
        self.side = along_with(plan, checkpoint, options.beside, self.framed, carry)
        self.extras = packed_extras(self.side.extras, plan, checkpoint, options.template) if self.framed else {}
        self.aliases = output_aliases(plan, checkpoint)

    def change_header(self) -> Report:
        """Give the file that is read another header."""
        from .renaming import change_in_place

        metadata, dry_run = _metadata(self.plan, self.checkpoint), self.options.dry_run
        written, note = change_in_place(self.plan, self.checkpoint, self.place, self.aliases, metadata, dry_run)
        return self.report((str(self.place),), written, (note,), read=0)

    def write(self) -> Report:
        """Write the output, and check it where that is asked for; a dry run stops short of the first byte."""
        options, checkpoint = self.options, self.checkpoint
        along, told = self.along()
        with gc_pause():
            writer = self.writer(along)
        if options.dry_run:
            dry = (*self.side.notes, *told, "a dry run: nothing was written")
            return self.report(tuple(writer.files), writer.nbytes, dry)
        proofs: tuple[Proof, ...] = ()
        with writer:
            with ByteBar(writer.nbytes, f"writing {self.place.name}", options.progress) as bar:
                execute(self.plan.steps, checkpoint, FileSink(writer), bar, budget=self.budget)
                checkpoint.check_unchanged()
            if options.check:
                proofs = self.checked(writer)
        notes = [*self.side.notes, *_left_out(writer), *_resumed(writer), *self.notes(along, proofs), *told]
        files, written = tuple(writer.files), bar.done
        left = others_in(self.place, files)
        if left:
            notes.append(f"other weights stay in the folder, remove them if they are old: {listed(left, 8)}")
        del writer  # and where each tensor lies with it
        with gc_pause():
            stale = self.stale_config() if options.companions else ()
            report = self.report(files, written, tuple(notes))
            return replace(report, proofs=proofs, warnings=(*report.warnings, *stale))

    def write_dcp(self) -> Report:
        """Write a distributed checkpoint, as several ranks would have."""
        from .dcp_saving import write_dcp

        options, plan = self.options, self.plan
        with ByteBar(
            sum(spec.nbytes for spec in plan.specs.values()), f"writing {self.place.name}", options.progress
        ) as bar:
            files, written = write_dcp(plan, self.checkpoint, self.place, options.ranks, options.sync, bar)
        return self.report(files, written, (*self.side.notes, *self.notes({}, ())))

    def write_with(self, ranks: Peers) -> Report:
        """Write the output with other ranks, each of which carries out its share of the steps."""
        options, checkpoint = self.options, self.checkpoint
        along, told = self.along()
        if options.dry_run:
            return self.write()
        proofs: list[Proof] = []

        def work(writer: Writer) -> int:
            steps = share_of(self.plan.steps, ranks)
            nbytes = sum(spec.nbytes for step in steps for spec in step.program.outputs)
            with ByteBar(nbytes, f"writing {self.place.name}", options.progress and not ranks.rank) as bar:
                execute(steps, checkpoint, FileSink(writer), bar, budget=self.budget)
                checkpoint.check_unchanged()
            return bar.done

        def check(writer: Writer) -> None:
            proofs.extend(self.checked(writer) if options.check else ())

        files, written = write_together(partial(self.writer, along), ranks, work, check)
        proven: tuple[Proof, ...] = ranks.gathered(tuple(proofs))[0]
        shared = f"written by {counted(ranks.size, 'rank')}"
        report = self.report(files, written, (*self.side.notes, *self.notes(along, proven), *told, shared))
        stale = self.stale_config() if options.companions else ()
        return replace(report, proofs=proven, warnings=(*report.warnings, *stale))

    def along(self) -> tuple[Mapping[str, bytes], list[str]]:
        """The companions, with a config that follows the tensors, and what was changed in it."""
        if not self.options.companions:
            return {}, []
        from .config_following import following_companions

        return following_companions(self.plan, self.checkpoint, self.place, self.options.overwrite, self.aliases)

    def writer(self, along: Mapping[str, bytes]) -> Writer:
        """The writer of the format that the path asks for, with everything but the tensors."""
        plan, checkpoint, options = self.plan, self.checkpoint, self.options
        specs = plan.specs
        if self.aliases or plan.target is not None:
            specs = {key: specs[key] for key in plan.keys if key in specs and key not in self.aliases}
        metadata = _metadata(plan, checkpoint, self.framed)
        wanted = WriterOptions(
            aliases=self.aliases,
            metadata=metadata | (provenance_of(plan, checkpoint) if options.provenance else {}),
            extras=self.extras,
            frame=checkpoint.frame,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            resume=fingerprint(plan, checkpoint, self.aliases, along) if options.resume else None,
            source_offsets=copied_from(plan, checkpoint),
            companions=along,
            sync=options.sync,
        )
        return open_writer(self.path, specs, wanted)

    def checked(self, writer: Writer) -> tuple[Proof, ...]:
        """Read the output back while it still has no name; what fails is not kept, nor gone on from."""
        writer.finish()
        if not writer.places:
            return ()  # a torch file without tensors is written, and a reader does not take it for a checkpoint
        from .checking import check_output

        checkpoint = self.checkpoint
        try:
            subtree = route_of(checkpoint.frame) if self.framed and checkpoint.frame else None
            with open_staged(writer, subtree) as written:
                return check_output(self.plan, checkpoint, written, self.aliases, self.options.progress, self.budget)
        except CheckpointError:
            writer.discard()
            checkpoint.check_unchanged()  # then that is why they differ
            raise

    def notes(self, along: Mapping[str, bytes], proofs: Sequence[Proof]) -> Iterator[str]:
        """What a person should know of the output."""
        if PROVENANCE in self.checkpoint.metadata:
            yield "the source's own provenance was left out: the output is made from it in another way"
        if self.checkpoint.disputed:
            names = ", ".join(shown_keys(self.checkpoint.disputed))
            yield f"the source's files give different values to {names}; those of the last file were taken"
        framework = self.checkpoint.metadata.get("format")
        if framework in FRAMEWORKS - {"pt"}:
            yield f"the metadata's format {framework!r} became 'pt'"
        if self.options.companions:
            yield f"copied along: {', '.join(along) or 'nothing, the source has no companions'}"
        if self.options.check:
            checked = sum(proof.nbytes for proof in proofs)
            yield f"checked before the output took its place: {checked:,} bytes read back, as the plan makes them"

    def stale_config(self) -> tuple[Diagnostic, ...]:
        """What the config in the output says of tensors that the plan made otherwise."""
        try:
            config = parse_json(read_regular(self.place / "config.json"))
        except (OSError, ValueError, RecursionError):
            return ()
        ties = [tie.names for tie in self.checkpoint.ties]
        return as_warnings(config_remarks(config, self.plan, self.aliases, ties))

    def report(self, files: tuple[str, ...], written: int, notes: tuple[str, ...], read: int | None = None) -> Report:
        """The ledger of the save."""
        plan, checkpoint = self.plan, self.checkpoint
        if read is None:
            unread, scattered = unread_proofs(plan, checkpoint), scattered_keys(checkpoint)
            read = cost_of(plan, self.aliases, unread, scattered).bytes_read
        return Report(
            ledger(plan, self.aliases, lambda rule: plan.uses[rule].text),
            source=checkpoint.source,
            target=str(self.path),
            notes=notes,
            warnings=(*plan.warnings, *architecture_warnings(self.path, self.extras)),
            files=files,
            bytes_read=read,
            bytes_written=written,
        )


def state_dict_of(plan: Plan, checkpoint: Checkpoint, device: torch.device | None = None) -> dict[str, Any]:
    """The result in memory, on the CPU or on a device, in the target's order; tied names share one tensor.

    Raises:
        PlanError: as for `save_plan`.
    """
    from .sinks.new_tensors import StateDictSink, fill

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
    drawn = [key for key, how in plan.inits.items() if how not in OWN]
    if drawn:
        raise PlanError(
            Diagnostic(
                "init-needs-model",
                f"{counted(len(drawn), 'key', 'is')} to be initialised, which a model does and a file does not",
                notes=tuple(drawn)[:8],
                help="plan.load_into(model), then cs.save(model.state_dict(), path)",
            )
        )


_RELY_ON_SYNC = {
    "resume": "resume goes on from what is known to be on the disk",
    "in_place": "in_place writes over the header that the tensors are found by",
}


_NOT_IN_DCP = (
    "in_place",
    "resume",
    "max_shard_size",
    "companions",
    "check",
    "provenance",
    "overwrite",
    "dry_run",
    "together",
)


def _refuse_together(options: SaveOptions) -> None:
    """Refuse options that do not go together."""
    for name, text in () if options.sync else _RELY_ON_SYNC.items():
        if getattr(options, name):
            text, synced = f"{text}, so it cannot go without sync", Remedy("sync", True)
            raise PlanError(Diagnostic("bad-argument", text, remedies=(synced,), advice=f"or do without {name}"))
    if options.format not in (None, "dcp") or options.ranks < 1 or (options.ranks > 1 and options.format is None):
        text = f"format={options.format!r} with ranks={options.ranks} is not written"
        raise PlanError(Diagnostic("bad-argument", text, help='format="dcp", ranks=1 or more'))
    for name in _NOT_IN_DCP if options.format else ():
        if getattr(options, name):
            text = f"format={options.format!r} knows no {name}"
            raise PlanError(Diagnostic("bad-argument", text, help=f"without {name}"))
    for name in ("in_place", "resume") if options.together else ():
        if getattr(options, name):
            text = f"the work of {name} is not shared among ranks"
            raise PlanError(Diagnostic("bad-argument", text, help=f"without {name}, or in one process"))
    for name in ("max_shard_size", "companions", "resume", "provenance") if options.in_place else ():
        if getattr(options, name):
            text = f"in_place changes one file's header, and knows no {name}"
            raise PlanError(Diagnostic("bad-argument", text, help=f"without {name}"))


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


def ledger(plan: Plan, aliases: Mapping[str, str], text: Callable[[int], str]) -> tuple[ReportEntry, ...]:
    """One entry for every key of either side."""
    entries = _made(plan, {rules: text(rules[-1]) for rules in set(map(attrgetter("rules"), plan.steps))})
    if aliases:
        tied = ((e, aliases.get(e.key)) for e in entries)
        entries = [e if base is None else ReportEntry(e.key, "tied", e.spec, e.sources, base) for e, base in tied]
    if plan.ties:
        made = {e.key for e in entries}
        bare = ((alias, base) for alias, base in plan.ties.items() if alias not in made)
        entries += [ReportEntry(alias, "tied", plan.specs.get(base), (), base) for alias, base in bare]
    wanted = plan.target.specs if plan.target else {}
    entries += [
        ReportEntry(key, "kept", wanted.get(key), by="left to the module that builds it")
        for key, how in plan.inits.items()
        if how in OWN
    ]
    entries += [ReportEntry(key, "dropped", plan.source.get(key), (key,), line) for key, line in plan.dropped.items()]
    entries += [
        ReportEntry(key, "dropped", plan.source.get(key), (key,), f"equal to {kept}") for key, kept in plan.proofs
    ]
    return tuple(entries)


_ROLE = {True: "loaded", False: "initialised"}


def _made(plan: Plan, texts: Mapping[tuple[int, ...], str]) -> list[ReportEntry]:
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
    kinds = repeat("loaded") if all(step.sources for step in plan.steps) else [_ROLE[bool(s.sources)] for s in steps]
    rows = zip(keys, kinds, specs, sources, map(texts.__getitem__, rules), casts)
    return list(map(tuple.__new__, repeat(ReportEntry), rows))
