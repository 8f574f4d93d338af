"""`load_into`: the one call that most people come for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike, as_recipe, file_of, load_recipe
from ..errors import CkptSurgeryError, Diagnostic, LoadError, Remedy
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..modeling.assigning import has_meta
from ..modeling.places import places, require_module, require_plain
from ..planning.expanding import Stage
from ..planning.plan import Plan, Target
from ..planning.planner import draft_plan, fitted
from ..planning.steps import cut
from ..planning.unread import Unreadable
from ..planning.wrapping import draft_unwrapped
from ..running.loading import ODD_TARGET, load_plan, model_target, refuse_non_finite
from ..running.report import Entry, Report
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open_checkpoint
from ..storage.sources.links import as_device
from ..storage.unpickling.unreadable import unreadable_tensors
from ..wording import counted
from .arguments import check_arguments, listed
from .authoring import own_layout
from .codes import codes_as_weights
from .deciding import Decision, Wishes, below, decide, named_keys, samples
from .doubts import Doubts
from .extra_states import ExtraStates, collected, is_state, states_of
from .handing import Handing, own_loaders, renamed_versions, saved_names
from .layouts import as_if_transposed, foreign_layout
from .orienting import live_modules, turned_weights
from .recipes import fitting_recipes
from .resizing import as_arguments, resized

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
    partial: bool = False,
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
      note: values were not scanned for NaN and Inf: check_values=True does

    Args:
        model: any `nn.Module`, on the meta device too.
        source: whatever `open` takes; the tensors are found inside a training checkpoint.
        recipe: rules, a recipe, its name or path; without one, wrapper prefixes and PyTorch's own respellings are
            settled where the model shows them.
        init: module paths, keys or patterns of the model to initialise anew, or `{path: initialiser}`, or
            `{path: {last part of the name: initialiser}}`.
        keep: what stays as constructed. drop: what the source holds in vain. Each path means its whole subtree.
        mismatch: of shapes: "error", "init" or "keep".
        dtype: "lossless" casts where no bit is lost, "error" never, "model" always, "source" takes the source's dtype
            (with `assign=True`).
        partial: load what fits in name and shape, and list what did not.
        subtree: where in a training checkpoint the tensors are.
        config: what `config.` means in the recipe's dims; the source's own by default, else the model's.
        dims: sizes that go before the recipe's own.
        assign: True puts new parameters in place of the old ones, False copies into them. By default a model with
            tensors on the meta device is assigned, and any other is copied into.
        device: where all of the model comes to be, with assignment: what is only copied goes there from the files,
            with no copy in the host's memory. Without, a copy stays where the model is.
        check_values: look for NaN and Inf first.
        seed: of the initialisers.
        progress: True or False to insist on a bar or on none.

    Raises:
        CheckpointError, RecipeError, PlanError, LoadError: everything that headers and tied bytes can show, before the
            model is touched; each problem names the argument that settles it.
    """
    import torch

    require_module(model)
    assigned = has_meta(model) if assign is None else assign
    check_arguments(mismatch, dtype, assigned)
    where = as_device(device) if device is not None else None
    checkpoint = open_checkpoint(source, subtree=subtree)
    inits = dict(init) if isinstance(init, Mapping) else dict.fromkeys(listed("init", init), "default")
    dropped = listed("drop", drop)
    without = {key: path for path in dropped for key in below(path, checkpoint.unreadable)}
    without |= {key: key for key in dropped if is_state(key) and key in checkpoint.extras}
    drops = [path for path in dropped if path not in without.values() or below(path, checkpoint.specs)]
    wishes = Wishes(inits, listed("keep", keep), drops, mismatch, partial)
    state = {place.name: place.tensor for place in places(model) if place.persistent}
    kept = {name for path in wishes.keep for name in below(path, state)}
    require_plain(((name, tensor) for name, tensor in state.items() if name not in kept), ODD_TARGET)
    transfer = _Transfer(model, checkpoint, model_target(model), wishes, dtype, without, live_modules(source, subtree))
    said = as_recipe(recipe) if recipe is not None else None
    try:
        transfer.draft(said, config, dims)
        with torch.inference_mode(False):  # parameters made in it could never be trained
            return transfer.load(assign=assigned, device=where, check_values=check_values, seed=seed, progress=progress)
    except CkptSurgeryError as error:
        error.rewrite(as_arguments if said is None else lambda problem: problem.within(file_of(said)))
        raise


@dataclass
class _Transfer:
    """One load, from draft to report."""

    model: nn.Module
    checkpoint: Checkpoint
    target: Target
    wishes: Wishes
    dtype: str
    without: Mapping[str, str] = field(default_factory=dict)  # keys that cannot be read -> what the caller dropped
    live: Mapping[str, nn.Module] = field(default_factory=dict)
    plan: Plan = field(init=False)
    stage: Stage = field(init=False)
    notes: list[str] = field(default_factory=list)
    by_recipe: bool = False
    handed: list[Handing] = field(default_factory=list)
    states: ExtraStates = field(default_factory=ExtraStates)

    def draft(
        self, recipe: Recipe | None, config: Mapping[str, Any] | None, dims: Mapping[str, DimValue] | None
    ) -> None:
        """Plan what the source would make in the model's names, before anything is decided."""
        self.by_recipe = recipe is not None
        if config is None:
            config = self.checkpoint.config if self.checkpoint.config is not None else self.own_config()
        specs, target = self.checkpoint.specs, self.target
        unreadable = Unreadable(self.checkpoint.unreadable, refused=False)
        if recipe is not None:
            self.plan, self.stage = draft_unwrapped(
                specs, recipe, load_recipe, target=target, config=config, dims=dims, unreadable=unreadable
            )
            return
        saved = saved_names(self.model)
        wanted = {saved.get(k, k): spec for k, spec in self.target.specs.items()}
        written, notes = own_layout(self.checkpoint.specs, wanted, self.wishes.drop)
        self.notes += notes
        self.plan, self.stage = draft_plan(
            specs, written, load_recipe, target=target, config=config, dims=dims, unreadable=unreadable
        )

    def own_config(self) -> Mapping[str, Any] | None:
        """The model's own config, where it has one that can be read."""
        to_dict: Any = getattr(getattr(self.model, "config", None), "to_dict", None)
        return to_dict() if callable(to_dict) else None

    def load(
        self, *, assign: bool, device: torch.device | None, check_values: bool, seed: int, progress: bool | None
    ) -> Report:
        named, owners = (*self.wishes.init, *self.wishes.keep), states_of(self.model)
        self.states, self.plan = collected(self.plan, self.checkpoint, owners, named, self.wishes.drop, self.without)
        made, origins, problems = self.hand_over()
        problems += self.states.problems(self.wishes.partial)
        if not self.by_recipe:
            made = as_if_transposed(self.model, self.checkpoint, made, self.target.specs)
        doubts = self.doubts(made, origins)
        decision = decide(
            made,
            origins,
            self.target.specs,
            self.target.ties,
            self.wishes,
            self.tolerated(),
            self.recipe_inits(self.target.specs),
            doubts.reasons,
        )
        decision.problems += problems
        if not self.wishes.partial or not decision.load:
            decision.problems += doubts.problems(decision.refused, made, origins)
        for handing in self.handed:
            decision.problems += handing.withhold({*decision.aside, *decision.refused} & handing.taken.keys())
        taken = {k: h for h in self.handed for k in h.taken}
        decision.problems += self.prove_handed(decision, taken)
        if not self.by_recipe:
            decision.problems += foreign_layout(self.model, self.checkpoint, self.plan, decision.load)
        decision.problems += self.unreadable()
        decision.problems = resized(
            decision.problems, self.plan, made, decision.aside, self.target.specs, self.by_recipe
        )
        self.check(decision, made)
        if check_values:
            refuse_non_finite((k, h.taken[k]) for k, h in taken.items())
        plan = self.settled(decision)
        plan = fitted(plan, Stage(ties=self.stage.ties), self.others(decision, taken), self.dtype)
        report = load_plan(
            plan,
            self.checkpoint,
            self.model,
            assign=assign,
            device=device,
            seed=seed,
            check_values=check_values,
            progress=progress,
            notes=self.notes,
            also=(lambda: self.load_handed(assign)) if self.handed else None,
            also_filled=tuple(taken),
        )
        self.set_extra_state()
        return self.completed(report, decision, origins)

    def doubts(self, made: Mapping[str, TensorSpec], origins: Mapping[str, tuple[str, ...]]) -> Doubts:
        """What fits in name and shape, and must not be loaded as it is."""
        dtypes = {k: s.dtype for k, s in made.items()} | {k: d for h in self.handed for k, d in h.dtypes().items()}
        codes = codes_as_weights(dtypes, origins, self.target.specs, self.checkpoint.specs, self.dtype)
        if self.by_recipe:  # its rules say which way round
            return Doubts(codes)
        return Doubts(codes, *turned_weights(self.model, made, self.target.specs, origins, self.live))

    def unreadable(self) -> list[Diagnostic]:
        """Tensors of the source that cannot be read, unless the caller does without them."""
        self.notes.extend(f"left behind: {key}, {why}" for key, why in self.checkpoint.unreadable.items())
        lost = self.undecided()
        if not lost or self.wishes.partial:
            return []
        return [unreadable_tensors(lost, (Remedy("drop", list(lost), "does without"),))]

    def undecided(self) -> dict[str, str]:
        """Tensors that cannot be read, and that neither the caller nor the recipe drops: source key -> kind."""
        settled = self.without.keys() | self.plan.dropped.keys()
        return {key: why for key, why in self.checkpoint.unreadable.items() if key not in settled}

    def hand_over(self) -> tuple[dict[str, TensorSpec], dict[str, tuple[str, ...]], list[Diagnostic]]:
        """Set apart what modules with loading of their own shall have; what is made then, of what, and the problems."""
        made = dict(self.plan.specs)
        origins = {k: step.sources for step in self.plan.steps for k in step.targets}
        aside = named_keys(self.wishes, made, origins, self.target.specs)
        problems: list[Diagnostic] = []
        for path in own_loaders(self.model):
            prefix = path + "." if path else ""
            theirs = {k for k in made if k.startswith(prefix)} - aside
            if not theirs:
                continue
            handing = self.handing(path, theirs)
            self.handed.append(handing)
            problems += handing.trial(self.model, self.target.specs, self.dtype)
            if handing.strays and not self.wishes.partial:
                problems.append(
                    Diagnostic(
                        "unexpected-keys",
                        f"{counted(len(handing.strays), 'tensor', 'has')} no place in {handing.title}, say its hooks",
                        notes=tuple(handing.strays[:8]),
                        remedies=(Remedy("partial", True, "loads what fits"),),
                    )
                )
            left = {handing.key(n) for n in (*handing.unused, *handing.unfit)}
            made = {k: s for k, s in made.items() if k not in theirs or k in left}
            filled = self.under(path) if handing.refused else handing.taken
            made |= {k: self.target.specs[k] for k in filled if k in self.target.specs}
            origins |= {k: handing.origin(k) for k in handing.taken}
            handed = counted(len(handing.tensors), "tensor")
            self.notes.append(f"{handing.title} loads in its own way: {handed} handed over")
            for text in handing.unversioned(self.model):
                self.notes.append(f"{text}, and the source tells none: it is loaded as a file of an old one")
        return made, origins, problems

    def handing(self, path: str, keys: set[str]) -> Handing:
        """What one module is handed, taken out of the plan."""
        from ..running.executor.programs import run_step

        prefix = path + "." if path else ""
        mine = [step for step in self.plan.steps if keys.intersection(step.targets)]
        sources = {k[len(prefix) :]: step.sources for step in mine for k in step.targets if k in keys}

        def read() -> dict[str, Tensor]:
            made = (zip(step.targets, run_step(step, self.checkpoint.load)) for step in mine)
            return {k[len(prefix) :]: tensor for rows in made for k, tensor in rows if k in keys}

        steps = [part for step in self.plan.steps for part in cut(step, set(step.targets) - keys)]
        self.plan = replace(
            self.plan, steps=tuple(steps), specs={k: s for k, s in self.plan.specs.items() if k not in keys}
        )
        entries = self.checkpoint.entries
        in_memory = {k for k, e in entries.items() if e.tensor is not None}
        borrowed = {n for n, behind in sources.items() if not in_memory.isdisjoint(behind)}
        metadata = self.checkpoint.extras.get("_metadata")
        versions = renamed_versions(metadata, sources) if isinstance(metadata, Mapping) else {}
        return Handing(path, read(), sources, read, versions, borrowed, self.states.under(path))

    def prove_handed(self, decision: Decision, taken: Mapping[str, Handing]) -> list[Diagnostic]:
        """Names that the plan fills, and that are tied to one that a module took: equal in value, then filled once."""
        from ..running.executor.programs import run_step

        problems = []
        for names in self.target.ties:
            theirs = [n for n in names if n in taken]
            for step in self.plan.steps if theirs else ():
                for key in [k for k in step.targets if k in names and k in decision.load]:
                    value = run_step(step, self.checkpoint.load)[step.targets.index(key)]
                    other = taken[theirs[0]].taken[theirs[0]]
                    if value.shape != other.shape or not bool((value == other).all()):
                        text = f"{key!r} and {theirs[0]!r} are tied, and the source holds different values for them"
                        other_one = Remedy("drop", [key], "takes the other")
                        problems.append(Diagnostic("tied-values-differ", text, remedies=(other_one,)))
                    decision.load.remove(key)
        return problems

    def others(self, decision: Decision, taken: Mapping[str, Handing]) -> Target:
        """The target without what modules take in their own way, and without what is tied to that."""
        tied = {n for names in self.target.ties if any(n in taken for n in names) for n in names}
        specs = {k: s for k, s in self.target.specs.items() if k not in taken and k not in tied}
        return Target(specs, [names for names in self.target.ties if not tied.intersection(names)], "model")

    def under(self, path: str) -> list[str]:
        return [k for k in self.target.specs if path == "" or k.startswith(path + ".")]

    def load_handed(self, assign: bool) -> None:
        for handing in self.handed:
            handing.load(self.model, assign)

    def tolerated(self) -> set[str]:
        """Counters that files written before they existed do not have."""
        metadata = self.checkpoint.extras.get("_metadata")
        versions = metadata if isinstance(metadata, Mapping) else {}
        modern = any(isinstance(v, Mapping) and (v.get("version") or 0) >= 2 for k, v in versions.items() if k)
        has_counter = any(k.endswith("num_batches_tracked") for k in self.checkpoint.specs)
        if modern or has_counter:
            return set()
        return {k for k in self.target.specs if k.rpartition(".")[2] == "num_batches_tracked"}

    def recipe_inits(self, target: Mapping[str, TensorSpec]) -> dict[str, Any]:
        found = {}
        for said in self.stage.inits:
            for key in target:
                if said.pattern.match(key) is not None:
                    found[key] = said.value
        return found

    def check(self, decision: Decision, made: Mapping[str, TensorSpec]) -> None:
        if not decision.load:
            codes = {p.code for p in decision.problems}
            if not codes - {"missing-keys", "unexpected-keys"}:
                decision.problems = [self.nothing_fits(made)]
        if not decision.problems:
            return
        codes = {p.code for p in decision.problems}
        if not self.by_recipe and codes & {"missing-keys", "unexpected-keys", "shape-mismatch", "nothing-fits"}:
            names = fitting_recipes(self.checkpoint, self.target, self.own_config())
            if names:
                decision.problems.append(
                    Diagnostic(
                        "recipe-fits",
                        "a recipe that ships turns this source into this model",
                        remedies=(Remedy("recipe", names[0]),),
                        severity="note",
                    )
                )
        raise LoadError(decision.problems)

    def nothing_fits(self, made: Mapping[str, TensorSpec]) -> Diagnostic:
        return Diagnostic(
            "nothing-fits",
            f"nothing of {self.checkpoint.source} was loaded: no key fits the model in name and shape",
            facts=(("source", samples(self.checkpoint.specs)), ("model", samples(self.target.specs))),
            help="a recipe maps the keys to the model's, a subtree is the part of the source to read",
        )

    def settled(self, decision: Decision) -> Plan:
        """The draft with its steps cut down to what is loaded, and its inits decided."""
        load = set(decision.load)
        steps = [part for step in self.plan.steps for part in cut(step, load)]
        specs = {k: s for k, s in self.plan.specs.items() if k in load}
        return replace(self.plan, steps=tuple(steps), specs=specs, inits=decision.inits)

    def set_extra_state(self) -> None:
        """Hand the modules their extra state, once all tensors are there."""
        handed = {h.key(name) for h in self.handed for name in h.states}
        self.states.hand(handed, tuple(self.target.specs))
        self.notes += self.states.notes()

    def completed(self, report: Report, decision: Decision, origins: Mapping[str, tuple[str, ...]]) -> Report:
        """The report with what was missing, unexpected and set aside, and with what modules took in their own way."""
        missing = set(decision.missing)
        entries = [
            e._replace(
                action="missing", by=f"{decision.unfilled.get(e.key, 'not in the source')}; as the model built it"
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
        for key, why in decision.unexpected.items():
            entries += [Entry(s, "unexpected", specs[s], (s,), why) for s in origins[key]]
        for key, why in decision.aside.items():
            entries += [Entry(s, "dropped", specs[s], (s,), why) for s in origins[key]]
        lost = self.checkpoint.unreadable
        aside = ((s, path) for s, path in self.without.items() if s in lost)
        entries += [Entry(s, "dropped", None, (s,), f"drop = {path!r}") for s, path in aside]
        entries += [Entry(s, "unexpected", None, (s,), why) for s, why in self.undecided().items()]
        return replace(report, ledger=tuple(entries), notes=tuple(dict.fromkeys((*report.notes, *self.notes))))

    def taken_entries(self, origins: Mapping[str, tuple[str, ...]]) -> list[Entry]:
        entries: list[Entry] = []
        first: dict[str, str] = {}
        for handing in self.handed:
            for key in handing.taken:
                spec, by = self.target.specs.get(key), f"{handing.title} in its own way"
                if key in first:
                    entries.append(Entry(key, "tied", spec, (), first[key]))
                    continue
                entries.append(Entry(key, "loaded", spec, origins[key], by, handing.casts.get(key)))
                for names in self.target.ties:
                    first.update((n, key) for n in names if key in names and n != key)
        known = {e.key for e in entries}
        return entries + [Entry(k, "tied", self.target.specs.get(k), (), f) for k, f in first.items() if k not in known]
