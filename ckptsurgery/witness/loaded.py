"""`check_loaded`: proof that a model holds what its source says, after any loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike, as_recipe, file_of
from ..errors import CkptSurgeryError, Diagnostic, RecipeError, Remedy
from ..language.dims import DimValue
from ..modeling.defaults import DefaultInitialisation as OwnInit
from ..modeling.places import named_tensors, places, require_module, require_plain
from ..modeling.ties import find_ties
from ..planning.codes import codes_as_weights
from ..planning.options import DTYPE_POLICIES
from ..planning.report import Report, ReportEntry
from ..running.executor.execution import execute
from ..running.progress import ByteBar
from ..specs import TensorSpec, Tie, is_lossless
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..wording import counted
from .causes import Causes
from .expecting import Expectation, expectation
from .faults import Fault, NotAsPlanned, diagnostics_of
from .model_sink import ModelSink
from .overlaps import overlaps

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Before", "CheckOptions", "check_loaded", "checked", "listed"]

_ODD = "keep= leaves a tensor out of the check"


@dataclass(frozen=True)
class CheckOptions:
    """What the caller says of a check; `check_loaded` documents each."""

    recipe: RecipeLike | None = None
    keep: Sequence[str] = ()
    untied: Sequence[str] = ()
    dtype: str = "lossless"
    config: Mapping[str, Any] | None = None
    dims: Mapping[str, DimValue] | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_POLICIES or self.dtype == "source":
            ways = tuple(Remedy("dtype", policy) for policy in ("lossless", "error", "model"))
            raise RecipeError(Diagnostic("bad-argument", f"dtype={self.dtype!r} is not a policy", remedies=ways))


@dataclass(frozen=True)
class Before:
    """What was known of a model before a load.

    Args:
        ties: its tie groups.
        untouched: whether a tensor is still as it was.
    """

    ties: Sequence[Tie] = ()
    untouched: Callable[[str], bool] = lambda key: False


def check_loaded(
    model: nn.Module,
    source: Any,
    recipe: RecipeLike | None = None,
    *,
    keep: str | Sequence[str] = (),
    untied: str | Sequence[str] = (),
    dtype: str = "lossless",
    subtree: str | None = None,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
    progress: bool | None = None,
) -> Report:
    """Prove that a model holds a checkpoint, whatever code loaded it; nothing is changed.

    >>> import torch, ckptsurgery as cs
    >>> model, source = torch.nn.Linear(2, 2), {"module.weight": torch.eye(2)}
    >>> _ = model.load_state_dict({"weight": torch.eye(2)}, strict=False)
    >>> cs.check_loaded(model, source, keep="bias").loaded
    ('weight',)
    >>> cs.check_loaded(model, source)
    Traceback (most recent call last):
        ...
    ckptsurgery.witness.faults.NotAsPlanned: error[never-loaded]: 1 model tensor is not loaded: ...
       bias  F32 [2]
     = help: keep=["bias"] accepts it as built

    Every parameter and persistent buffer is compared byte for byte with what the plan from `source` makes for it.
    Buffers that no file holds are compared with what their modules' own hooks compute, where there are such hooks.

    Args:
        source: whatever `open` takes: what was to be loaded.
        recipe: how its layout becomes the model's. Without one, wrapper prefixes are settled as `load_into` does, and
            a transformers model is read by the library's own conversion table.
        keep: module paths or keys that the source was not to fill.
        untied: names that share a tensor in the source, and are meant to be apart in the model.
        dtype: "lossless" accepts a cast where no bit is lost, "error" none, "model" each to the model's own dtype.
        subtree: where in a training checkpoint the tensors are.
        config: what `config.` means in the recipe's dims. dims: sizes that go before the recipe's own.

    Returns:
        A report: each tensor that was proved, and under `unexpected` what the source holds in vain.

    Raises:
        NotAsPlanned: a `LoadError` that lists each wrong tensor with what it holds instead; all at once.
        CheckpointError, RecipeError, PlanError: the source cannot be read or planned.
    """
    require_module(model)
    options = CheckOptions(recipe, listed(keep), listed(untied), dtype, config, dims, progress)
    return checked(model, open_checkpoint(source, subtree=subtree), options)


def checked(model: nn.Module, checkpoint: Checkpoint, options: CheckOptions, before: Before | None = None) -> Report:
    """Check a model as `check_loaded` does.

    Args:
        before: what was known of the model before the load.

    Raises:
        NotAsPlanned, CheckpointError, RecipeError, PlanError: as for `check_loaded`.
    """
    said = as_recipe(options.recipe) if options.recipe is not None else None
    try:
        check = _LoadedCheck(model, checkpoint, options, before or Before())
        wanted = expectation(model, checkpoint, said, keep=options.keep, config=options.config, dims=options.dims)
        return check.run(wanted, by_recipe=said is not None)
    except CkptSurgeryError as error:
        if said is not None:
            error.rewrite(lambda problem: problem.within(file_of(said)))
        raise


def listed(what: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list."""
    return [what] if isinstance(what, str) else list(what)


@dataclass
class _LoadedCheck:
    """One check of a model."""

    model: nn.Module
    checkpoint: Checkpoint
    options: CheckOptions
    before: Before

    def run(self, wanted: Expectation, *, by_recipe: bool) -> Report:
        """Compare everything, and raise what is wrong."""
        kept = set(wanted.kept)
        tensors = named_tensors(self.model)
        require_plain(((k, t) for k, t in tensors.items() if k not in kept), _ODD)
        specs = wanted.target.specs
        faults = [Fault(k, "never-loaded", "", specs[k]) for k in wanted.missing]
        faults += [
            Fault(k, "shape-differs", f"{list(shape)} in the source", specs[k], wanted.origins[k])
            for k, shape in wanted.misshapen.items()
        ]
        faults += [Fault(k, "no-data", "", _spec(t)) for k, t in tensors.items() if t.is_meta and k not in kept]
        empty = {fault.key for fault in faults}
        wrong = self.compared(wanted, {k: t for k, t in tensors.items() if k not in empty})
        codes = {} if by_recipe else self.codes(wanted)
        faults += [self.of_code(wanted, k, codes[k], k in wrong) for k in codes if k not in empty]
        causes = Causes(self.model, self.checkpoint, wanted, self.before.untouched)
        shared = {k: other for k, other in overlaps(tensors).items() if k not in kept | empty}
        faults += [Fault(k, "overlapping", f"with {other!r}", specs.get(k)) for k, other in shared.items()]
        told = codes.keys() | shared.keys()
        faults += [causes.of(k, tensors[k]) for k in wanted.plan.specs if k in wrong and k not in told]
        faults += self.casts(wanted, {f.key for f in faults})
        faults += self.ties(wanted, tensors)
        computed, unknown, off = self.buffers(kept | empty)
        faults += off
        report = self.report(wanted, faults, computed, unknown)
        if faults:
            raise NotAsPlanned(diagnostics_of(faults, list(tensors)), faults, report)
        return report

    def compared(self, wanted: Expectation, tensors: Mapping[str, Tensor]) -> set[str]:
        """The keys whose bytes are not what the plan makes."""
        plan = wanted.plan
        self.checkpoint.refuse_without_data(source for step in plan.steps for source in step.sources)
        sink = ModelSink(tensors, {k: spec for k, spec in plan.specs.items() if k in tensors})
        with ByteBar(sum(p.nbytes for p in sink.places.values()), "checking", self.options.progress) as bar:
            execute(plan.steps, self.checkpoint, sink, bar)
        self.checkpoint.check_unchanged()
        return sink.wrong

    def codes(self, wanted: Expectation) -> dict[str, str]:
        """Quantised codes that the plan would bring in as weights: model key -> what is known of them."""
        made = {k: wanted.made[k].dtype for k in wanted.plan.specs}
        return {
            k: str(code)
            for k, code in codes_as_weights(
                made, wanted.origins, wanted.target.specs, self.checkpoint.specs, self.options.dtype
            ).items()
        }

    def of_code(self, wanted: Expectation, key: str, code: str, differs: bool) -> Fault:
        """The fault of a float tensor whose source is a quantised code.

        Without a rule that scales it nothing says what it should hold, whether or not it holds the bare code.
        """
        text = f"{code}; " + ("what it should be is not known without a rule" if differs else "held as it is")
        return Fault(key, "unscaled-codes", text, wanted.target.specs[key], wanted.origins[key])

    def casts(self, wanted: Expectation, told: set[str]) -> list[Fault]:
        """Changes of dtype that the caller's policy does not accept."""
        if self.options.dtype == "model":
            return []
        found = []
        for key, (have, want) in wanted.plan.casts.items():
            if key not in told and (self.options.dtype == "error" or not is_lossless(have, want)):
                spec = wanted.target.specs[key]
                found.append(Fault(key, "cast", f"{have} in the source", spec, wanted.origins[key]))
        return found

    def ties(self, wanted: Expectation, tensors: Mapping[str, Tensor]) -> list[Fault]:
        """Names that should be one tensor and are not."""
        groups = find_ties(self.model)
        # Two parameters over one storage have gradients of their own, and an optimizer steps both.
        real = [g for g in groups if g.kind == "object" or (g.kind == "storage" and g in self.before.ties)]
        together = {name: number for number, group in enumerate(real) for name in group.names}
        found: dict[str, Fault] = {}

        def one(names: Sequence[str], why: str) -> None:
            first = names[0]
            for name in names[1:]:
                apart = together.get(name, name) != together.get(first, first)
                if apart and name not in self.options.untied and first not in self.options.untied and name in tensors:
                    found.setdefault(name, Fault(name, "untied", f"from {first!r}: {why}", _spec(tensors[name])))

        for group in groups:
            if group.kind == "declared":
                one(group.names, "the model's class and config declare it")
        for group in self.before.ties:
            one(group.names, "they were one before the load")
        for alias, base in wanted.tied.items():
            one((base, alias), "the recipe ties them")
        for names in self.source_ties(wanted):
            one(names, "they are one tensor in the source")
        return list(found.values())

    def source_ties(self, wanted: Expectation) -> list[list[str]]:
        """Model keys that are copies of names which are one tensor in the source."""
        if not self.checkpoint.ties:
            return []
        made: dict[str, list[str]] = {}
        for step in wanted.plan.steps:
            if len(step.sources) == len(step.targets) == 1 and not step.program.changes_values:
                made.setdefault(step.sources[0], []).append(step.targets[0])
        groups = ([made[name][0] for name in tie.names if name in made] for tie in self.checkpoint.ties)
        return [names for names in groups if len(names) > 1]

    def buffers(self, known: set[str]) -> tuple[list[str], list[str], list[Fault]]:
        """Buffers that no file holds: those as their modules compute them, those nobody computes, and the wrong."""
        import torch

        right: list[str] = []
        unknown: list[str] = []
        wrong: list[Fault] = []
        found = [p for p in places(self.model) if p.is_buffer and not p.persistent and p.name not in known]
        if not found:
            return right, unknown, wrong
        with OwnInit(self.model) as stage:
            drawn = {place.name: _computed(stage, place.name) for place in found}
        for place in found:
            made, tensor = drawn[place.name], place.tensor.detach()
            if made is None:
                unknown.append(place.name)
            elif made.shape == tensor.shape and torch.equal(made.to(tensor.device), tensor):
                right.append(place.name)
            else:
                wrong.append(Fault(place.name, "buffer-differs", "", _spec(tensor)))
        return right, unknown, wrong

    def report(
        self, wanted: Expectation, faults: Sequence[Fault], computed: Sequence[str], unknown: Sequence[str]
    ) -> Report:
        """The account of every tensor of the model, and of what the source holds in vain."""
        wrong = {fault.key: fault for fault in faults}
        specs, plan = wanted.target.specs, wanted.plan
        rules = {key: step for step in plan.steps for key in step.targets}
        group = {name: names[0] for names in wanted.target.ties for name in names}
        entries = []
        for key, spec in specs.items():
            if key in wrong:
                entries.append(
                    ReportEntry(key, "missing", spec, wrong[key].sources, f"{wrong[key].kind} {wrong[key].text}")
                )
            elif key in rules:
                by = "  then  ".join(plan.uses[n].text for n in rules[key].rules)
                entries.append(ReportEntry(key, "loaded", spec, rules[key].sources, by, plan.casts.get(key)))
            elif key in wanted.kept or key in wanted.counters:
                entries.append(ReportEntry(key, "kept", spec, by="not in the source"))
            else:
                entries.append(ReportEntry(key, "tied", spec, by=wanted.tied.get(key, group.get(key, ""))))
        held = self.checkpoint.specs
        entries += [ReportEntry(k, "unexpected", held[k], (k,), "no place in the model") for k in wanted.unused]
        notes = list(wanted.notes)
        if computed:
            notes.append(f"{counted(len(computed), 'buffer')} outside the file, as the modules' own hooks compute them")
        if unknown:
            notes.append(f"{counted(len(unknown), 'buffer')} outside the file not checked: no hook computes them")
        return Report(
            tuple(entries),
            self.checkpoint.source,
            type(self.model).__name__,
            tuple(notes),
            plan.warnings,
            bytes_read=plan.cost.bytes_read,
        )


def _computed(stage: OwnInit, name: str) -> Tensor | None:
    """What a module's own hooks give for a buffer; None where there are none, or where they draw at random."""
    import torch

    try:
        first, second = (stage.draw(name, seed)[0].clone() for seed in (0, 1))
    except Exception:  # a hook is the model's own code, and may raise anything
        return None
    return first if torch.equal(first, second) else None


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)
