"""The problems of a source that does not fit a target, each with the lines that settle it.

The same mistake reads the same whoever plans. Only the remedies differ: a load takes `init=`, `keep=`, `drop=` and
`partial=`, and a plan has its recipe.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy, literal
from ..language.calls import parse_call
from ..language.covering import exact_paths, exact_patterns
from ..language.folding import fold, fold_groups
from ..language.keys import KeyPattern
from ..ops.base import OpError
from ..ops.initialisers import Initialiser
from ..ops.registry import make_op
from ..specs import DTYPES, TensorSpec, is_lossless
from ..wording import counted
from .expanding import BoundPattern
from .misspelling import meant_instead, nearest_pattern
from .options import OWN
from .plan import Plan
from .resizing import resizing
from .settlement import Offer
from .steps import Step

__all__ = ["Misfits"]

Specs = Mapping[str, TensorSpec]


class Misfits:
    """Collects the problems of one settlement.

    Args:
        plan: makes what is offered. made: key -> spec, of all that is offered. wanted: the same, of the target.
        name: of the target, in messages.
        problems: where they are added.
    """

    def __init__(
        self, plan: Plan, made: Specs, wanted: Specs, name: str, offer: Offer, problems: list[Diagnostic]
    ) -> None:
        self.plan, self.made, self.wanted, self.target = plan, made, wanted, name
        self.offer, self.problems = offer, problems

    @cached_property
    def left_over(self) -> set[str]:
        """Keys that no rule names and that `rest` made."""
        uses = self.plan.uses
        return {key for step in self.plan.steps if uses[step.rules[-1]].is_rest for key in step.targets}

    @property
    def by_rules(self) -> bool:
        """Whether rules make some of it; else every tensor has the name that it has in the source, or nearly so."""
        return not all(use.is_rest for use in self.plan.uses)

    @cached_property
    def unmade(self) -> list[str]:
        """The keys of the target that nothing is offered for."""
        return [key for key in self.wanted if key not in self.made]

    @cached_property
    def sources(self) -> list[str]:
        """All keys of the source that come to something."""
        return list(dict.fromkeys(chain.from_iterable(self.offer.origins.values())))

    def unexpected(self, extra: Sequence[str]) -> None:
        """Keys are offered that the target lacks."""
        origins, keys = self.offer.origins, set(extra)
        sources = list(dict.fromkeys(s for k in extra for s in origins.get(k, (k,))))
        by_rules = self.by_rules or not keys <= self.made.keys()  # a tie is written down as well
        if by_rules:
            folded = fold_groups(extra, label=self.made.get)
            notes = [f"{f.text}  {self.made[f.first]}" if f.first in self.made else f.text for f in folded[:12]]
            text = f"{counted(len(extra), 'key')} that the plan makes {_are(extra)} not in the {self.target}"
        else:
            specs = {s: self.made[k] for k in extra for s in origins.get(k, (k,))}
            notes = [f"{g.text}  {specs[g.first]}" for g in fold_groups(sources, label=specs.get)[:12]]
            text = f"{counted(len(sources), 'source tensor', 'has')} no place in the {self.target}"
        remedies = self.drops(extra)
        if self.offer.by_call:
            others = {*(s for found in origins.values() for s in found), *(self.made.keys() - keys)}
            drop = Remedy("drop", exact_paths(sources, others), "leaves them out")
            remedies = (drop, Remedy("partial", True, "loads what fits"))
        self.problems.append(
            Diagnostic(
                "unexpected-targets" if by_rules else "unexpected-keys",
                text,
                notes=tuple(notes),
                facts=self._near(),
                remedies=remedies,
                advice=("or correct the rule" if remedies else "correct the rule") if by_rules else None,
            )
        )

    def _near(self) -> tuple[tuple[str, str], ...]:
        sample = [text for text, _ in fold(self.unmade)[:3]] if self.by_rules else []
        return ((f"the {self.target} lacks", ", ".join(sample)),) if sample else ()

    def missing(self, missing: Sequence[str]) -> None:
        """The target wants keys that nothing fills."""
        folded = fold_groups(missing, label=self.wanted.get)
        notes = [f"{f.text}  {self.wanted[f.first]}" for f in folded[:16]]
        notes += [f"… and {len(folded) - 16} more patterns"] if len(folded) > 16 else []
        text = f"{counted(len(missing), f'{self.target} key', 'is')} made by no rule"
        if not self.by_rules:
            text = f"{counted(len(missing), 'tensor')} of the {self.target} {_are(missing)} not in the source"
        if self.offer.by_call:
            paths = exact_paths(missing, self.wanted)
            init, keep = Remedy("init", paths, "initialises them"), Remedy("keep", paths, "leaves them as built")
            remedies: tuple[Remedy, ...] = (init, keep, Remedy("partial", True, "loads the rest"))
        else:
            drawn = dict.fromkeys(exact_patterns(missing, self.wanted), "default")
            remedies = (Remedy("init", drawn, "has the model draw them", kind="recipe"),)
        self.problems.append(
            Diagnostic(
                "missing-keys",
                text,
                notes=tuple(notes),
                remedies=remedies,
                advice=self._other_names(missing),
            )
        )

    def _other_names(self, missing: Sequence[str]) -> str | None:
        """The advice for missing keys: where most miss and the source has others, they bear other names there."""
        if self.by_rules:
            return "or a rule that makes them"
        renamed = 2 * len(missing) > len(self.wanted) and not self.made.keys() <= self.wanted.keys()
        return "or a recipe maps other names to them (suggest proposes one)" if renamed else None

    def shapes(self, wrong: Specs) -> None:
        """Tensors have another shape than the target wants: a problem for each rule, or for all that moves as it is."""
        rules: dict[int, list[tuple[str, Step]]] = {}
        plain: dict[bool, list[str]] = {}
        makers = {key: step for step in self.plan.steps for key in step.targets if key in wrong}
        for key in wrong:
            step = makers.get(key)
            if step is not None and not self.plan.uses[step.rules[-1]].is_rest:
                rules.setdefault(step.rules[-1], []).append((key, step))
            else:
                plain.setdefault(DTYPES[self.wanted[key].dtype].kind == "float", []).append(key)
        for number, cases in rules.items():
            self._shapes_by_rule(number, cases)
        for keys in plain.values():
            lines = []
            for group in fold_groups(keys, label=lambda k: (wrong[k].shape, self.wanted[k].shape)):
                have, want = wrong[group.first].shape, self.wanted[group.first].shape
                lines.append(f"{group.text}  source {list(have)}, {self.target} {list(want)}")
            text = f"{counted(len(keys), 'tensor', 'has')} another shape in the {self.target}"
            empty = any(not wrong[k].numel and self.wanted[k].numel for k in keys)
            advice = _EMPTY if empty else None
            self.problems.append(
                Diagnostic("shape-mismatch", text, notes=tuple(lines[:16]), remedies=self._shaping(keys), advice=advice)
            )

    def _shapes_by_rule(self, number: int, cases: Sequence[tuple[str, Step]]) -> None:
        key, step = cases[0]
        use, spec = self.plan.uses[number], self.made[key]
        reads = ", ".join(f"{k} {list(s.shape)}" for k, s in zip(step.sources[:4], step.program.inputs[:4]))
        others = [text for text, _ in fold([k for k, _ in cases[1:]])]
        self.problems.append(
            Diagnostic(
                "shape-mismatch",
                f"rule makes {key!r} {list(spec.shape)}; {self.target} wants {list(self.wanted[key].shape)}",
                place=use.place,
                notes=(use.text, *others[:6]),
                facts=(("reads", reads),),
                remedies=self._shaping([k for k, _ in cases]),
                advice=_shape_help(spec, self.wanted[key]),
            )
        )

    def _shaping(self, keys: Sequence[str]) -> tuple[Remedy, ...]:
        """What brings tensors to the shape that is wanted, the surest first, or does without them."""
        floats = {k: self.made[k] for k in keys if DTYPES[self.wanted[k].dtype].kind == "float"}
        sure, rows = resizing(self.plan, floats, self.wanted, by_rules=self.by_rules)
        if not self.offer.by_call:
            return (*sure, *rows)
        paths = exact_paths(keys, self.wanted)
        init, keep = Remedy("init", paths, "initialises these"), Remedy("keep", paths, "leaves them")
        if len(floats) < len(keys):
            init, keep = keep, init  # no initialiser makes an index or a mask
        every = Remedy("mismatch", init.argument, f'or "{keep.argument}" does so for all')
        return (*sure, init, keep, every, *rows)

    def casts(self, casts: Mapping[str, tuple[str, str]], policy: str) -> bool:
        """Tell which casts the policy does not allow, or nothing can make; whether all can be made."""
        known = len(self.problems)
        for have, want in dict.fromkeys(casts.values()):
            lossless, possible = is_lossless(have, want), _is_castable(have, want)
            if not possible or policy == "error" or (policy == "lossless" and not lossless):
                keys = [key for key, change in casts.items() if change == (have, want)]
                why = ", which no cast makes" if not possible else "" if lossless else ", which can lose bits"
                casting = (Remedy("dtype", "model", "casts them"),) if possible else ()
                self.problems.append(
                    Diagnostic(
                        "dtype-mismatch",
                        f"{counted(len(keys), 'tensor', 'is')} {have}, the {self.target} wants {want}{why}",
                        notes=tuple([text for text, _ in fold(keys)][:8]),
                        remedies=(*casting, Remedy("dtype", "source", "keeps them")),
                        advice="or | cast(…) in the rule" if self.by_rules and possible else None,
                    )
                )
        return len(self.problems) == known

    def drops(self, keys: Sequence[str]) -> tuple[Remedy, ...]:
        """The remedy that leaves out what these keys are made of, where one line does: a drop of what `rest` takes.

        What a rule takes cannot be dropped as well; the rule is narrowed to what is wanted of it.
        """
        unwanted = set(keys)
        makers = [step for step in self.plan.steps if not unwanted.isdisjoint(step.targets)]
        sources = [k for step in makers for k in step.sources]
        rules = {step.rules for step in makers}
        if not sources or any(not unwanted.issuperset(step.targets) for step in makers):
            return ()
        if all(self.plan.uses[numbers[0]].is_rest for numbers in rules):
            return (Remedy("drop", exact_patterns(sources, self.sources), kind="recipe"),)
        return self._narrowed(rules.pop(), unwanted) if len(rules) == 1 else ()

    def _narrowed(self, rules: tuple[int, ...], unwanted: set[str]) -> tuple[Remedy, ...]:
        """The rule with its source restricted to the keys of which something is wanted."""
        use = self.plan.uses[rules[0]]
        steps = [s for s in self.plan.steps if s.rules == rules and unwanted.isdisjoint(s.targets)]
        patterns = exact_patterns(chain.from_iterable(map(attrgetter("sources"), steps)), self.sources)
        terms = use.bound.rule.sources if use.bound is not None else ()
        if len(rules) > 1 or len(patterns) != 1 or len(terms) != 1:
            return ()
        whole, part = str(terms[0].pattern), KeyPattern.parse(patterns[0])
        if whole not in use.text or set(part.names) != set(terms[0].pattern.names):
            return ()
        return (Remedy("rules", {whole: patterns[0]}, "takes what is wanted", kind="instead"),)

    # what the caller names

    def named_twice(self, inits: Collection[str], keeps: Collection[str]) -> None:
        """`init=` and `keep=` name the same keys."""
        both = sorted({*inits} & {*keeps})
        if both:
            text = f"{counted(len(both), 'key', 'is')} in both init= and keep="
            self.problems.append(Diagnostic("init-and-keep", text, notes=tuple(both[:6])))

    def named_of_tied(self, group: Sequence[str], named: Mapping[str, Any], by: BoundPattern | None) -> None:
        """Keys are initialised or kept that are tied to one which the source fills.

        Args:
            by: the recipe's entry that names them, unless the caller does.
        """
        asked = {n: named[n] for n in group if n in named}
        first, *rest = asked.items() if asked else [("", None)]
        for key, value in rest if by is None else ():
            if value != first[1]:
                text = f"{first[0]!r} and {key!r} are one tensor, and init= or keep= ask two things of it"
                self.problems.append(Diagnostic("init-twice", text, help="name one of them"))
        others = [n for n in group if n not in named and n in self.made]
        for key in sorted(n for n in group if n in named) if others else ():
            argument, verb = ("keep", "keep") if named[key] in OWN else ("init", "initialise")
            text = f"{key!r} is tied to {others[0]!r}, which the source fills: to {verb} one is to lose the other"
            untie = Remedy("untie", f"cs.untie(model, {literal(key)})", kind="before")
            place = by.place if by is not None else None
            self.problems.append(
                Diagnostic(f"{argument}-of-tied", text, place, remedies=(untie,), advice="or leave the name out")
            )

    # what the recipe says of targets

    def problem(
        self, code: str, headline: str, said: BoundPattern, remedies: tuple[Remedy, ...] = (), advice: str | None = None
    ) -> None:
        """Add a problem of one entry of the recipe."""
        self.problems.append(Diagnostic(code, headline, place=said.place, remedies=remedies, advice=advice))

    def unused_tie(self, tie: BoundPattern) -> None:
        """Nothing makes the tensor that a tie leads to."""
        near = nearest_pattern(tie.value, self.made)
        optional = Remedy("tie", {tie.text: f"? {tie.text}"}, "may find nothing", kind="instead")
        meant = [Remedy("tie", {str(tie.value): str(p)}, kind="instead") for p in [near] if p is not None]
        text = f"nothing makes '{tie.value}', to which '{tie.pattern}' is tied"
        self.problem("unused-tie", text, tie, remedies=(*meant, optional))

    def tied_and_made(self, tie: BoundPattern, alias: str, key: str) -> None:
        """A rule makes a tensor for a name that is tied to another."""
        if alias == key:
            self.problem("tied-and-made", f"{alias!r} is tied to itself", tie, advice="leave the line out")
            return
        text = f"{alias!r} is tied to {key!r}, but a rule makes it too"
        self.problem("tied-and-made", text, tie, self.drops([alias]), "or prove them equal: a, b -> c | same")

    def tied_twice(self, tie: BoundPattern, alias: str, one: str, other: str) -> None:
        """A name is tied to two tensors."""
        text = f"{alias!r} is tied to {one!r} and to {other!r}"
        self.problem("tied-twice", text, tie, advice="name one of them")

    def inits_without_target(self, inits: Sequence[BoundPattern]) -> None:
        """Something is to be initialised, and there is no target to give its shape."""
        target = (Remedy("target", None, "is a model, a checkpoint or specs"),)
        for init in inits:
            made = [key for key in self.made if init.pattern.match(key) is not None]
            if made:
                self.init_and_made(init, made[0])
            elif not init.optional:
                text = f"[init] '{init.pattern}' needs a target, which says shape and dtype"
                self.problem(
                    "init-needs-target", text, init, target, f'or its axes: init = {{ "{init.pattern} [n]" = … }}'
                )

    def init_and_made(self, init: BoundPattern, key: str) -> None:
        """A key is initialised that a rule makes."""
        text = f"{key!r} is initialised, but a rule makes it too"
        self.problem("init-and-made", text, init, self.drops([key]), "or leave it out of [init]")

    def init_twice(self, init: BoundPattern, key: str) -> None:
        """Two entries initialise a key in two ways."""
        self.problem("init-twice", f"{key!r} is initialised in two ways", init)

    def unused_init(self, init: BoundPattern) -> None:
        """An entry initialises nothing."""
        text = f"[init] '{init.pattern}' matches no target key"
        self.problem("unused-init", text, init, remedies=meant_instead("init", init.text, init.pattern, self.unmade))

    def check_initialiser(self, init: BoundPattern) -> None:
        """Tell a text that names no initialiser now, and not once everything else is loaded."""
        if not isinstance(init.value, str):
            return
        try:
            call = parse_call(init.value)
            Initialiser.of(call.name, call.args, dict(call.keywords))
        except RecipeError as error:
            self.problem("bad-init", f"[init] '{init.pattern}': {error.diagnostics[0].headline}", init)
        except OpError as error:
            self.problem("bad-init", f"[init] '{init.pattern}': {error}", init, error.remedies("init"))


_EMPTY = "or read the folder with the files of all ranks: sharded training leaves empty tensors in a rank's own file"


def _are(keys: Sequence[str]) -> str:
    return "is" if len(keys) == 1 else "are"


def _shape_help(spec: TensorSpec, want: TensorSpec) -> str | None:
    if spec.shape[::-1] == want.shape and len(spec.shape) > 1:
        return "transposed? name the axes: [x y] -> [y x]"
    if spec.numel == want.numel:
        return "the same number of elements: name the axes on both sides"
    if len(spec.shape) == len(want.shape) and spec.shape[1:] == want.shape[1:]:
        return f"{spec.shape[0]} rows against {want.shape[0]}: other classes, a padded vocabulary, or grouped heads?"
    return None


def _is_castable(have: str, want: str) -> bool:
    try:
        make_op("cast", (want,), {}).infer((TensorSpec((8,), have),))
    except OpError:
        return False
    return True
