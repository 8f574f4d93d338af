"""Decides what becomes of every key of a source and of a target, for `plan(target=)` and `load_into` alike.

A key that the source offers is loaded, set aside, unexpected or refused; a key of the target is loaded, initialised,
kept, tied or missing. What nobody asked for is an error, and all errors come at once. Only names, shapes and dtypes
count here: where in a tensor its elements lie, and which process holds them, is for those who carry the plan out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress, count, filterfalse
from operator import attrgetter
from typing import Any

from ..errors import LoadError, RecipeError
from ..language.leaves import by_leaf
from ..ops.registry import make_op
from ..specs import DTYPES, TensorSpec, dtype_name
from .codes import Code, codes_as_weights, unscaled
from .misfits import Misfits
from .naming import dropped_keys, named_keys
from .options import DTYPE_POLICIES, OWN, LoadOptions
from .record import Target
from .settlement import Offer, Settlement
from .steps import ApplyOp, Program, Step, cut, outputs_of

__all__ = ["settle"]


def settle(offer: Offer, target: Target | None, options: LoadOptions | None = None) -> Settlement:
    """Decide what becomes of every key.

    >>> from ckptsurgery.planning.plan import Plan
    >>> spec = TensorSpec([2], "F32")
    >>> offer = Offer(plan=Plan((), (), {"a": spec, "b": spec}))
    >>> found = settle(offer, Target({"a": spec, "c": spec}))
    >>> found.load, [problem.code for problem in found.problems]
    (['a'], ['missing-keys', 'unexpected-keys'])

    Args:
        target: specs are those of whole tensors, however they are stored; None where nothing is to be filled, and
            only the recipe's ties and a dtype are to be settled.
    """
    options = options if options is not None else LoadOptions()
    settling = _Settling(offer, target, options, Settlement(offer.plan))
    if options.init or options.keep or options.drop:
        settling.name()
    if offer.stage.ties:
        settling.tie()
    if target is None:
        settling.out.load = list(offer.specs)
        settling.misfits.inits_without_target(offer.stage.inits)
    else:
        if offer.stage.inits:
            settling.initialise()
        settling.sort()
        settling.miss()
        settling.tie_target()
        settling.tell()
    if target is not None or options.dtype not in DTYPE_POLICIES:
        settling.cast()
    settling.finish()
    return settling.out


@dataclass
class _Settling:
    offer: Offer
    target: Target | None
    options: LoadOptions
    out: Settlement
    dropped: dict[str, str] = field(default_factory=dict)  # offered key -> the path that drops it
    named: dict[str, Any] = field(default_factory=dict)  # key -> what the caller's init= or keep= makes of it
    recipe_inits: dict[str, Any] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    proofs: list[tuple[str, str]] = field(default_factory=list)
    mismatched: dict[str, TensorSpec] = field(default_factory=dict)
    codes: dict[str, Code] = field(default_factory=dict)
    steps: list[Step] | None = None

    def __post_init__(self) -> None:
        self.made = self.offer.specs
        self.wanted: Mapping[str, TensorSpec] = self.target.specs if self.target is not None else {}
        self.ties.update(self.offer.plan.ties)
        name = self.target.name if self.target is not None else "target"
        self.misfits = Misfits(self.offer.plan, self.made, self.wanted, name, self.offer, self.out.problems)

    def name(self) -> None:
        """Find the keys that `init=`, `keep=` and `drop=` name."""
        options, problems = self.options, self.out.problems
        inits: dict[str, Any] = {}
        for path, what in options.init.items():
            keys = named_keys(path, self.wanted, "init", problems)
            try:
                inits.update(by_leaf(keys, what))
            except LoadError as error:
                problems += error.diagnostics
                inits.update(dict.fromkeys(keys, "default"))  # they are spoken for: one mistake is told once
        keeps = {k for path in options.keep for k in named_keys(path, self.wanted, "keep", problems)}
        self.misfits.named_twice(inits, keeps)
        self.dropped = dropped_keys(options.drop, self.made, self.offer.origins, problems)
        self.named = {**inits, **dict.fromkeys(keeps, "own")}
        for group in self.target.ties if self.target is not None else ():
            self.misfits.named_of_tied(group, self.named, None)

    def tie(self) -> None:
        """Follow the recipe's `[tie]` entries."""
        found: set[int] = set()
        new = list(self.made)
        while new:  # a tie may lead to a tied name, whichever was written first
            tied: list[str] = []
            for number, tie in enumerate(self.offer.stage.ties):
                for key in new:
                    values = tie.value.match(key)
                    if values is None:
                        continue
                    found.add(number)
                    try:
                        self._tie_up(number, tie.pattern.spell_match(tie.value, values), key, tied)
                    except RecipeError as error:
                        self.out.problems += [replace(d, place=tie.place) for d in error.diagnostics]
            new = tied
        for number, tie in enumerate(self.offer.stage.ties):
            if number not in found and not tie.optional:
                self.misfits.unused_tie(tie)

    def _tie_up(self, number: int, alias: str, key: str, tied: list[str]) -> None:
        tie, base = self.offer.stage.ties[number], self.ties.get(key, key)
        if tie.optional and self.target is not None and alias not in self.wanted:
            return
        if tie.optional and alias in self.made:
            if alias in self.misfits.left_over:  # nothing says that it is a tensor of its own
                self.ties.setdefault(alias, base)
                self.proofs.append((alias, base))
        elif alias in self.made:
            self.misfits.tied_and_made(tie, alias, key)
        elif self.ties.setdefault(alias, base) != base:
            self.misfits.tied_twice(tie, alias, self.ties[alias], base)
        else:
            tied.append(alias)

    def initialise(self) -> None:
        """Follow the recipe's `[init]` entries; what the caller names goes before them."""
        for init in self.offer.stage.inits:
            self.misfits.check_initialiser(init)
            found = False
            mine: dict[str, Any] = {}
            for key in self.wanted:
                if init.pattern.match(key) is None:
                    continue
                found = True
                if key in self.named:
                    continue
                if key in self.made and key not in self.dropped:
                    self.misfits.init_and_made(init, key)
                elif key in self.recipe_inits and self.recipe_inits[key] != init.value:
                    self.misfits.init_twice(init, key)
                mine[key] = init.value
            if not found and not init.optional:
                self.misfits.unused_init(init)
            for group in self.target.ties if self.target is not None and mine and not init.optional else ():
                self.misfits.named_of_tied(group, mine, init)
            self.recipe_inits |= mine

    @cached_property
    def kinds(self) -> list[int]:
        """A number for each key made, the same where spec and wanted spec are the same objects, cast or not."""
        numbers: dict[tuple[int, int, bool], int] = defaultdict(count().__next__)
        uncast = map(self.offer.uncast.__contains__, self.made)
        pairs = zip(map(id, self.made.values()), map(id, map(self.wanted.get, self.made)), uncast)
        return list(map(numbers.__getitem__, pairs))

    @cached_property
    def examples(self) -> dict[int, str]:
        """One key of each kind; kinds are few."""
        return dict(zip(self.kinds, self.made))

    def sort(self) -> None:
        """Tell which of the offered keys are loaded."""
        odd = {n for n, key in self.examples.items() if not self._fits(key)}
        self._find_codes()
        doubts = {**self.offer.doubts, **{k: f"would load unscaled: {code}" for k, code in self.codes.items()}}
        if not (odd or doubts or self.dropped or self.named):
            self.out.load = list(self.made)
            return
        for key, kind in zip(self.made, self.kinds):
            self._sort(key, kind in odd, doubts)

    def _fits(self, key: str) -> bool:
        want = self.wanted.get(key)
        return want is not None and want.shape == self.made[key].shape

    def _find_codes(self) -> None:
        """Find quantised codes that would come into float parameters as they are."""
        few = {n for n, key in self.examples.items() if DTYPES[self.made[key].dtype].bits <= 8}
        if few:
            keys = compress(self.made, map(few.__contains__, self.kinds))
            dtypes = {key: self.made[key].dtype for key in keys}
            specs, origins = self.offer.plan.source, self.offer.origins
            self.codes = codes_as_weights(dtypes, origins, self.wanted, specs, self.options.dtype)

    def _sort(self, key: str, odd: bool, doubts: Mapping[str, str]) -> None:
        out, partial = self.out, self.options.partial
        if key in self.dropped:
            out.aside[key] = f"drop = {self.dropped[key]!r}"
        elif key in self.named:
            kept = self.named[key] in OWN
            out.aside[key] = f"set aside: the model's own is {'kept' if kept else 'initialised'}"
        elif odd and key not in self.wanted:
            out.unexpected[key] = "no place in the model"
        elif odd and self.options.mismatch != "error":
            mine, theirs = list(self.made[key].shape), list(self.wanted[key].shape)
            out.aside[key] = f"mismatch={self.options.mismatch!r}: {mine} against {theirs}"
            out.inits[key] = "default" if self.options.mismatch == "init" else "own"
        elif odd and partial:
            mine, theirs = list(self.made[key].shape), list(self.wanted[key].shape)
            out.unexpected[key] = f"{mine} here, {theirs} in the model"
            out.unfilled[key] = f"the source holds another shape, {mine}"
        elif odd:
            self.mismatched[key] = self.made[key]
        elif key in doubts:
            out.refused.append(key)
            out.unfilled[key] = doubts[key]
            if partial:
                out.unexpected[key] = doubts[key]
        else:
            out.load.append(key)

    def tie_target(self) -> None:
        """Fill names that are one tensor in the target from one; where several are made, they must be equal."""
        groups = self.target.ties if self.target is not None else ()
        load = set(self.out.load) if groups else set()
        for names in groups:
            if any(name in self.offer.elsewhere for name in names):
                continue  # the module that fills one fills them all
            made = [n for n in names if n in load]
            held = made or [n for n in names if n in self.out.inits]
            if not held:
                continue
            for name in names:
                if name != held[0]:
                    self.ties.setdefault(name, held[0])
                    self.out.inits.pop(name, None)
            self.proofs += [(other, made[0]) for other in made[1:]]

    def miss(self) -> None:
        """Keep what nothing fills; that is a problem unless tolerated, or told already."""
        self.out.inits |= self.recipe_inits | self.named
        told = chain(self.mismatched, () if self.options.partial else self.out.refused)
        filled = {*self.out.load, *self.out.inits, *self.ties, *told}
        missing = list(filterfalse(filled.__contains__, self.wanted))
        if not missing:
            return
        tied = {n: group for group in (self.target.ties if self.target is not None else ()) for n in group}
        missing = [k for k in missing if not any(n in filled for n in tied.get(k, ()))]
        self.out.inits.update(dict.fromkeys(missing, "own"))
        self.out.missing = [k for k in missing if k not in self.offer.tolerated]

    def tell(self) -> None:
        """Add what stands against the outcome, unless the caller asked for what fits."""
        out, partial = self.out, self.options.partial
        extra = [key for key in chain(out.unexpected, self.ties) if key not in self.wanted]
        if self.mismatched:
            self.misfits.shapes(self.mismatched)
        if out.missing and not partial:
            self.misfits.missing(out.missing)
        if extra and not partial:
            self.misfits.unexpected(extra)
        refused = {key: self.codes[key] for key in out.refused if key in self.codes}
        if refused and not (partial and out.load):
            out.problems += unscaled(refused, self.made, self.offer.origins)

    def cast(self) -> None:
        """Cast what has another dtype than is wanted, where the policy allows it."""
        if self.options.dtype == "source":
            return
        made = self.made
        wants = {n: self._wanted_dtype(key) for n, key in self.examples.items()}
        odd = {n: (made[key].dtype, wants[n]) for n, key in self.examples.items() if made[key].dtype != wants[n]}
        if not odd:
            return
        kinds = dict(zip(made, self.kinds))
        if len(self.out.load) < len(made):
            load = set(self.out.load)
            kinds = {key: kind for key, kind in kinds.items() if key in load}
        keys = chain(chain.from_iterable(map(attrgetter("targets"), self.offer.plan.steps)), self.offer.elsewhere)
        self.out.casts = {key: odd[kinds[key]] for key in keys if kinds.get(key) in odd}
        if self.misfits.casts(self.out.casts, self.options.dtype):
            self._cast_steps(kinds, wants)

    def _wanted_dtype(self, key: str) -> str:
        spec, want, policy = self.made[key], self.wanted.get(key), self.options.dtype
        if key in self.offer.uncast:
            return spec.dtype
        if policy not in DTYPE_POLICIES and DTYPES[spec.dtype].kind == "float":
            return dtype_name(policy)
        return want.dtype if want is not None else spec.dtype

    def _cast_steps(self, kinds: Mapping[str, int], wants: Mapping[int, str]) -> None:
        cast: dict[tuple[int, tuple[str, ...]], Program] = {}
        programs: dict[tuple[int, ...], Program] = {}  # by the one before, and by the kinds of the targets
        self.steps = []
        for step in self._loaded_steps():
            sources, targets, program, rules = step
            way = (id(program), *map(kinds.__getitem__, targets))
            if way not in programs:
                place = (id(program), tuple(map(wants.__getitem__, way[1:])))
                if place not in cast:
                    cast[place] = self._cast(program, place[1])
                programs[way] = cast[place]
            changed = programs[way]
            self.steps.append(step if changed is program else Step(sources, targets, changed, rules))

    def _cast(self, program: Program, wants: Sequence[str]) -> Program:
        for want in dict.fromkeys(wants):
            groups = tuple((n,) for n, w in enumerate(wants) if w == want and program.outputs[n].dtype != want)
            if groups:
                program = program.then(ApplyOp(make_op("cast", (want,), {}), groups))
        return program

    def _loaded_steps(self) -> Iterable[Step]:
        if len(self.out.load) == len(self.made):
            return self.offer.plan.steps
        load = set(self.out.load)
        return [part for step in self.offer.plan.steps for part in cut(step, load)]

    def finish(self) -> None:
        """Put the outcome into the plan."""
        plan, out = self.offer.plan, self.out
        steps = plan.steps if self.steps is None and len(out.load) == len(self.made) else tuple(
            self.steps if self.steps is not None else self._loaded_steps()
        )  # fmt: skip
        specs = plan.specs if steps is plan.steps else dict(zip(*outputs_of(steps)))
        mine = {k: change for k, change in out.casts.items() if k not in self.offer.elsewhere}
        out.plan = replace(
            plan,
            steps=steps,
            specs=specs,
            ties=self.ties,
            tie_proofs=tuple(self.proofs),
            inits=out.inits,
            casts=mine,
            target=self.target,
        )
