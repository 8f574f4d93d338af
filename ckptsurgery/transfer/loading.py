"""`load_into`: the one call that most people come for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike, as_recipe, file_of, load_recipe
from ..errors import CkptSurgeryError, Diagnostic, LoadError, Remedy
from ..language.dims import DimValue
from ..language.folding import fold
from ..language.recipe import Recipe
from ..modeling.assigning import has_meta
from ..modeling.places import places, require_module, require_plain
from ..modeling.saved_names import own_loaders, saved_names
from ..planning.expanding import Stage
from ..planning.naming import below, set_aside
from ..planning.options import LoadOptions, PlanOptions
from ..planning.plan import Plan
from ..planning.record import Target
from ..planning.report import Report, ReportEntry
from ..planning.resizing import as_arguments
from ..planning.settlement import Offer, Settlement
from ..planning.settling import settle
from ..planning.unread import Unreadable
from ..planning.wrapping import draft_unwrapped
from ..running.model_loading import ODD_TARGET, model_target, refuse_non_finite
from ..running.source_notes import notes_of
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..storage.unpickling.nodes import is_state
from ..storage.unpickling.unreadable import unreadable_tensors
from ..wording import counted
from .aligning import own_names
from .custom_loads import CustomLoad, renamed_versions
from .extra_states import ExtraStates, collected, states_of
from .first_choices import MeantInits, meant_inits
from .fitting import fitting_recipe
from .load_arguments import asked, check_assigned, own_config, tolerated_keys, unused_dims
from .orienting import as_if_transposed, crossed_weights, foreign_layout, live_modules, transposed, turned_weights
from .together import Carry, seen_plainly

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["load_into"]

Named = str | Sequence[str] | Mapping[str, Any]


def load_into(
    model: nn.Module,
    source: Any,
    recipe: RecipeLike | None = None,
    *,
    init: Named = (),
    keep: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    mismatch: str = "error",
    dtype: str = "lossless",
    partial: bool | str = False,
    subtree: str | None = None,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
    assign: bool | None = None,
    device: torch.device | str | None = None,
    check_values: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Load a checkpoint into a model, and account for every tensor of both.

    >>> import torch, ckptsurgery as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))
    >>> backbone = {"module.0.weight": torch.ones(3, 2), "module.0.bias": torch.zeros(3)}
    >>> report = cs.load_into(model, backbone, init="1")
    >>> print(report)
    state_dict -> Sequential: 31.0% of the model's elements loaded
      loaded            2 tensors                9 elements
      initialised       2 tensors               20 elements
        1.weight  F32 [5, 3]  default (Linear.reset_parameters, seed 0)
        1.bias  F32 [5]  default (Linear.reset_parameters, seed 0)
      note: prefix 'module.' taken off

    Args:
        model: any `nn.Module`, on the meta device too.
        source: whatever `open` takes; the tensors are found inside a training checkpoint.
        recipe: rules, a recipe, its name or path; without one, wrapper prefixes and PyTorch's own respellings are
            settled where the model shows them.
        init: module paths, keys or patterns of the model to initialise anew, or `{path: initialiser}`, or
            `{path: {last part of the name: initialiser}}`. `xavier_uniform` and its kind mean the matrices of a layer,
            and the rest of it stays as built; a part that a layer does not have, such as its bias, is passed over.
        keep: what stays as constructed. drop: what the source holds in vain. Each path means its whole subtree.
        mismatch: of shapes: "error", "init" or "keep".
        dtype: "lossless" casts where no bit is lost, "error" never, "model" always, "source" takes the source's dtype
            (with `assign=True`).
        partial: True loads what fits in name and shape, and lists what did not. "stages" is for a pipeline, whose ranks
            each hold some of the layers: each loads its own, and together they must account for the whole.
        subtree: where in a training checkpoint the tensors are.
        config: what `config.` means in the recipe's dims; the source's own by default, else the model's.
        dims: sizes that go before the recipe's own.
        assign: True puts new parameters in place of the old ones, False copies into them. By default a model with
            tensors on the meta device is assigned, and any other is copied into.
        device: where all of the model comes to be, with assignment: what is only copied goes there from the files,
            with no copy in the host's memory. Without, a copy stays where the model is.
        check_values: look for NaN and Inf first; otherwise values are not scanned.
        seed: of the initialisers, and of ops that draw numbers.
        progress: True or False to insist on a bar or on none.

    Raises:
        CheckpointError, RecipeError, PlanError, LoadError: everything that headers and tied bytes can show, before the
            model is touched; each problem names the argument that settles it.
    """
    import torch

    require_module(model, "the model comes first: load_into(model, source)")
    with seen_plainly(model, stages=partial == "stages") as (seen, carry):
        wanted = asked(init, keep, drop, mismatch, dtype, partial, assign, device, check_values, seed, progress)
        options = wanted if wanted.assign is not None else replace(wanted, assign=has_meta(seen))
        check_assigned(options)
        checkpoint = open_checkpoint(source, subtree=subtree)
        without = {key: path for path in options.drop for key in below(path, checkpoint.unreadable)}
        without |= {key: key for key in options.drop if is_state(key) and key in checkpoint.extras}
        drops = [path for path in options.drop if path not in without.values() or below(path, checkpoint.specs)]
        state = {place.name: place.tensor for place in places(seen) if place.persistent}
        kept = {name for path in options.keep for name in below(path, state)}
        require_plain(((name, tensor) for name, tensor in state.items() if name not in kept), ODD_TARGET)
        meant = meant_inits(seen, state, options.init) if options.init else MeantInits({})
        options, live = replace(options, drop=drops, init=meant.inits), live_modules(source, subtree)
        load = _Load(seen, checkpoint, model_target(seen), options, carry, without, live)
        load.notes, load.problems = list(meant.notes), list(meant.problems)
        said = as_recipe(recipe) if recipe is not None else None
        try:
            load.draft(said, config, dims)
            with torch.inference_mode(False):  # parameters made in it could never be trained
                return load.run()
        except CkptSurgeryError as error:
            error.rewrite(as_arguments if said is None else lambda problem: problem.within(file_of(said)))
            raise


@dataclass
class _Load:
    """One load, from draft to report.

    Args:
        carry: carries the plan out.
        without: source keys that the caller does without -> the path that says so.
        live: the modules of a source that is a live one.
    """

    model: nn.Module
    checkpoint: Checkpoint
    target: Target
    options: LoadOptions
    carry: Carry
    without: Mapping[str, str] = field(default_factory=dict)
    live: Mapping[str, nn.Module] = field(default_factory=dict)
    plan: Plan = field(init=False)
    stage: Stage = field(default_factory=Stage)
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    by_recipe: bool = False
    handed: list[CustomLoad] = field(default_factory=list)
    states: ExtraStates = field(default_factory=ExtraStates)
    crossed: Collection[str] = ()  # weights that the source has the other way round

    def draft(
        self, recipe: Recipe | None, config: Mapping[str, Any] | None, dims: Mapping[str, DimValue] | None
    ) -> None:
        """Plan what the source would make in the model's names, before anything is decided."""
        self.by_recipe = recipe is not None
        specs, target = self.checkpoint.specs, self.target
        saved = saved_names(self.model)
        target = target.renamed(saved) if saved else target  # a recipe speaks of the names under which it is saved
        if recipe is not None:
            config = config if config is not None else self.checkpoint.config or own_config(self.model)
            lost = self.checkpoint.unreadable
            self.plan, self.stage = draft_unwrapped(
                specs,
                recipe,
                load_recipe,
                target,
                PlanOptions(config, dims or {}, seed=self.options.seed),
                unreadable=Unreadable(lost, refused=False) if lost else None,
                told_of=notes_of(self.checkpoint),
            )
            return
        self.problems += unused_dims(dims) if dims else ()
        found = own_names(specs, target.specs, self.options.drop)
        self.plan, self.problems = found.plan, [*self.problems, *found.problems]
        self.notes += found.notes
        left = [path for path in self.options.drop if path not in found.away]
        self.options = replace(self.options, drop=left)

    def run(self) -> Report:
        """Decide, load, and report."""
        options, target = self.options, self.target
        named, owners = (*options.init, *options.keep), states_of(self.model)
        self.states, self.plan = collected(self.plan, self.checkpoint, owners, named, options.drop, self.without)
        self.problems += self.states.problems(options.partial)
        offer = self.hand_over()
        squares, across = self.turned(offer)
        reasons = {key: f"would load untransposed: {why}" for key, why in squares.items()}
        offer = replace(offer, doubts=reasons) if reasons else offer
        settled = settle(offer, target, options)
        self.problems += settled.problems
        squares = {key: why for key, why in squares.items() if key in settled.refused}
        if squares and not (options.partial and settled.load):
            self.problems.append(transposed(squares, across, offer.specs))
        plan = self.handed_over(settled) if self.handed else settled.plan
        if self.crossed:
            self.problems += foreign_layout(self.crossed, self.plan, settled.load)
        self.problems += self.unreadable()
        self.check(settled)
        taken = tuple(k for h in self.handed for k in h.taken)
        if options.check_values and self.handed:
            refuse_non_finite((k, h.taken[k]) for h in self.handed for k in h.taken)
        extra_load = (lambda: self.load_handed(bool(options.assign))) if self.handed else None
        report = self.carry(plan, self.checkpoint, self.model, options, extra_load=extra_load, extra_keys=taken)
        handed = {h.key(name) for h in self.handed for name in h.states}
        self.states.hand(handed, tuple(target.specs))
        self.notes += self.states.notes()
        return self.completed(report, settled, offer.origins)

    def turned(self, offer: Offer) -> tuple[dict[str, str], list[str]]:
        """Square matrices that the source holds transposed -> how that shows; and those that shape gives away."""
        if self.by_recipe:  # its rules say which way round
            return {}, []
        return turned_weights(self.model, offer.specs, self.target.specs, offer.origins, self.live)

    def unreadable(self) -> list[Diagnostic]:
        """Tensors of the source that cannot be read, unless the caller does without them."""
        if not self.checkpoint.unreadable:
            return []
        self.notes.extend(f"left behind: {key}, {why}" for key, why in self.checkpoint.unreadable.items())
        lost = self.undecided()
        if not lost or self.options.partial:
            return []
        return [unreadable_tensors(lost, (Remedy("drop", list(lost), "does without"),))]

    def undecided(self) -> dict[str, str]:
        """Tensors that cannot be read, and that neither the caller nor the recipe drops: source key -> kind."""
        settled = self.without.keys() | self.plan.dropped.keys()
        return {key: why for key, why in self.checkpoint.unreadable.items() if key not in settled}

    def hand_over(self) -> Offer:
        """Set apart what modules with loading of their own shall have, and return what is offered then."""
        tolerated = tolerated_keys(self.checkpoint, self.target.specs)
        self.crossed = set() if self.by_recipe else crossed_weights(self.model, self.checkpoint)
        made = as_if_transposed(self.crossed, self.plan, self.target.specs) if self.crossed else None
        whole = Offer(self.plan, self.stage, made, tolerated=tolerated, by_call=True)
        loaders = own_loaders(self.model)
        if not loaders:
            return whole
        aside = set_aside(self.options, whole, self.target.specs)
        specs = dict(whole.specs)
        elsewhere: dict[str, tuple[str, ...]] = {}
        for path in loaders:
            prefix = path + "." if path else ""
            theirs = {k for k in specs if k.startswith(prefix)} - aside
            if not theirs:
                continue
            handing = self.handing(path, theirs)
            self.handed.append(handing)
            self.problems += handing.trial(self.model, self.target.specs)
            if handing.strays and not self.options.partial:
                self.problems.append(
                    Diagnostic(
                        "unexpected-keys",
                        f"{counted(len(handing.strays), 'tensor', 'has')} no place in {handing.title}, say its hooks",
                        notes=tuple(handing.strays[:8]),
                        remedies=(Remedy("partial", True, "loads what fits"),),
                    )
                )
            left = {handing.key(n) for n in (*handing.unused, *handing.unfit)}
            elsewhere |= {handing.key(n): behind for n, behind in handing.sources.items() if handing.key(n) in left}
            specs = {k: s for k, s in specs.items() if k not in theirs or k in left}
            if handing.refused:  # told already, so that nothing below it is missing
                below_it = [k for k in self.target.specs if path == "" or k.startswith(prefix)]
                specs |= {k: self.target.specs[k] for k in below_it}
                elsewhere |= dict.fromkeys(below_it, ())
            specs |= handing.specs(self.target.specs)
            elsewhere |= {k: handing.origin(k) for k in handing.taken}
            handed = counted(len(handing.tensors), "tensor")
            self.notes.append(f"{handing.title} loads in its own way: {handed} handed over")
            for text in handing.unversioned(self.model):
                self.notes.append(f"{text}, and the source tells none: it is loaded as a file of an old one")
        return Offer(self.plan, self.stage, specs, elsewhere, tolerated=tolerated, by_call=True)

    def handed_over(self, settled: Settlement) -> Plan:
        """Keep to the outcome where modules load in their own way; return the plan of all else."""
        for handing in self.handed:
            self.problems += handing.withhold({*settled.aside, *settled.refused} & handing.taken.keys())
            handing.casts = {k: settled.casts[k] for k in handing.taken if k in settled.casts}
        taken = {k: h for h in self.handed for k in h.taken}
        tied = [key for names in self.target.ties if not taken.keys().isdisjoint(names) for key in names]
        plan = settled.plan
        if not self.problems:
            self.problems += self.prove_handed(plan, taken)
        inits = {k: v for k, v in plan.inits.items() if k not in taken}
        return replace(plan.without(tied), inits=inits)

    def handing(self, path: str, keys: set[str]) -> CustomLoad:
        """What one module is handed, taken out of the plan."""
        from ..running.executor.programs import run_step

        prefix = path + "." if path else ""
        mine = [step for step in self.plan.steps if keys.intersection(step.targets)]
        sources = {k[len(prefix) :]: step.sources for step in mine for k in step.targets if k in keys}

        def read() -> dict[str, Tensor]:
            made = (zip(step.targets, run_step(step, self.checkpoint.load)) for step in mine)
            return {k[len(prefix) :]: tensor for rows in made for k, tensor in rows if k in keys}

        self.plan = self.plan.without(keys)
        entries = self.checkpoint.entries
        in_memory = {k for k, e in entries.items() if e.tensor is not None}
        borrowed = {n for n, behind in sources.items() if not in_memory.isdisjoint(behind)}
        metadata = self.checkpoint.extras.get("_metadata")
        versions = renamed_versions(metadata, sources) if isinstance(metadata, Mapping) else {}
        return CustomLoad(path, read(), sources, read, versions, borrowed, self.states.under(path))

    def prove_handed(self, plan: Plan, taken: Mapping[str, CustomLoad]) -> list[Diagnostic]:
        """Compare names that the plan fills with those tied to them that a module took, which fills them all."""
        from ..running.executor.programs import run_step

        problems = []
        for names in self.target.ties:
            theirs = [n for n in names if n in taken]
            for step in plan.steps if theirs else ():
                for key in [k for k in step.targets if k in names]:
                    value = run_step(step, self.checkpoint.load)[step.targets.index(key)]
                    other = taken[theirs[0]].taken[theirs[0]]
                    if value.shape != other.shape or not bool((value == other).all()):
                        text = f"{key!r} and {theirs[0]!r} are tied, and the source holds different values for them"
                        other_one = Remedy("drop", [key], "takes the other")
                        problems.append(Diagnostic("tied-values-differ", text, remedies=(other_one,)))
        return problems

    def load_handed(self, assign: bool) -> None:
        """Have each module that loads in its own way load what it was handed."""
        for handing in self.handed:
            handing.load(self.model, assign)

    def check(self, settled: Settlement) -> None:
        """Raise what stands against the load; a source of which nothing fits is one problem."""
        codes = {p.code for p in self.problems}
        if not settled.load and not codes - {"missing-keys", "unexpected-keys", "unexpected-targets"}:
            self.problems, codes = [self.nothing_fits()], {"nothing-fits"}
        if not self.problems:
            if self.options.partial and settled.missing and settled.unexpected:
                self.notes += [f"{told.headline}: {told.help}" for told in self.recipe_that_fits(settled)]
            return
        self.problems = [self.with_numbers(p, settled) if p.code == "missing-keys" else p for p in self.problems]
        if codes & {"missing-keys", "unexpected-keys", "shape-mismatch", "nothing-fits"}:
            self.problems += self.recipe_that_fits(settled)
        raise LoadError(self.problems)

    def with_numbers(self, problem: Diagnostic, settled: Settlement) -> Diagnostic:
        """The problem of missing keys, with those that the source has as numbers."""
        extras = self.checkpoint.extras
        found = [key for key in settled.missing if isinstance(extras.get(key), Number)]
        if not found:
            return problem
        text = f"{', '.join(found[:6])}; torch.tensor(…) makes a tensor of one, before the load"
        return replace(problem, facts=(*problem.facts, ("stored as a number", text)))

    def recipe_that_fits(self, settled: Settlement) -> list[Diagnostic]:
        """The note that names a recipe that ships and fills more of the model, where none was passed."""
        loaded = len(settled.load)
        config = own_config(self.model)
        found = None if self.by_recipe else fitting_recipe(self.checkpoint, self.target, self.options, loaded, config)
        return [found.diagnostic(loaded, len(self.target.specs))] if found else []

    def nothing_fits(self) -> Diagnostic:
        """The problem of a source that has no tensor for the model."""
        if not self.checkpoint.specs:
            text = f"nothing of {self.checkpoint.source} was loaded: it has no tensors"
            return Diagnostic("nothing-fits", text, help="check what was saved or passed")
        return Diagnostic(
            "nothing-fits",
            f"nothing of {self.checkpoint.source} was loaded: no key fits the model in name and shape",
            facts=(("source", _samples(self.checkpoint.specs)), ("model", _samples(self.target.specs))),
            help="a recipe maps the keys to the model's (suggest proposes one), a subtree is the part to read",
        )

    def completed(self, report: Report, settled: Settlement, origins: Mapping[str, tuple[str, ...]]) -> Report:
        """The report with what was missing, unexpected and set aside, and with what modules took in their own way."""
        missing = set(settled.missing)
        entries = [
            e._replace(
                action="missing", by=f"{settled.unfilled.get(e.key, 'not in the source')}; as the model built it"
            )
            if e.key in missing and e.action == "kept"
            else e
            for e in report.ledger
        ]
        if self.handed:
            entries += self.taken_entries(origins)
            order = {k: n for n, k in enumerate(self.target.specs)}
            entries.sort(key=lambda e: len(order) if e.action == "dropped" else order.get(e.key, len(order)))
        specs = self.checkpoint.specs
        for key, why in settled.unexpected.items():
            entries += [ReportEntry(s, "unexpected", specs[s], (s,), why) for s in origins[key]]
        for key, why in settled.aside.items():
            entries += [ReportEntry(s, "dropped", specs[s], (s,), why) for s in origins[key]]
        lost = self.checkpoint.unreadable
        if lost:
            aside = ((s, path) for s, path in self.without.items() if s in lost)
            entries += [ReportEntry(s, "dropped", None, (s,), f"drop = {path!r}") for s, path in aside]
            entries += [ReportEntry(s, "unexpected", None, (s,), why) for s, why in self.undecided().items()]
        return replace(report, ledger=tuple(entries), notes=tuple(dict.fromkeys((*self.notes, *report.notes))))

    def taken_entries(self, origins: Mapping[str, tuple[str, ...]]) -> list[ReportEntry]:
        entries: list[ReportEntry] = []
        first: dict[str, str] = {}
        for handing in self.handed:
            for key in handing.taken:
                spec, by = self.target.specs.get(key), f"{handing.title} in its own way"
                if key in first:
                    entries.append(ReportEntry(key, "tied", spec, (), first[key]))
                    continue
                entries.append(ReportEntry(key, "loaded", spec, origins[key], by, handing.casts.get(key)))
                for names in self.target.ties:
                    first.update((n, key) for n in names if key in names and n != key)
        known = {e.key for e in entries}
        return entries + [
            ReportEntry(k, "tied", self.target.specs.get(k), (), f) for k, f in first.items() if k not in known
        ]


def _samples(keys: Iterable[str], most: int = 4) -> str:
    """A few keys, folded, for a message."""
    texts = [text for text, _ in fold(list(keys))]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "") or "no tensors"
