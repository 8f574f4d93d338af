"""What a target wants, and how a plan is held against it: keys, shapes, dtypes, ties and initialisers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count, filterfalse
from operator import attrgetter

from ..errors import Diagnostic, RecipeError, Remedy
from ..language.calls import parse_call
from ..language.covering import exact_patterns
from ..language.folding import fold, fold_groups
from ..language.keys import KeyPattern
from ..ops.base import OpError
from ..ops.initialisers import Initialiser
from ..ops.registry import make_op
from ..specs import DTYPES, TensorSpec, dtype_name, is_lossless
from ..wording import counted
from .expanding import BoundPattern, Stage
from .misspelling import meant_instead, nearest_pattern
from .plan import Plan, Target
from .steps import Program, Run, Step, outputs_of

__all__ = ["DTYPE_POLICIES", "fit"]

DTYPE_POLICIES = ("lossless", "error", "model", "source")


def fit(plan: Plan, stage: Stage, target: Target | None, dtype: str, problems: list[Diagnostic]) -> Plan:
    """Hold a plan against its target; the plan with inits, ties and casts settled.

    Args:
        dtype: one of `DTYPE_POLICIES`, or the dtype that every floating-point tensor gets.
    """
    fitting = _Fitting(plan, target, problems, dict(plan.ties), dict(plan.inits))
    fitting.recipe_ties(stage.ties)
    if target is None:
        fitting.inits_without_target(stage.inits)
        if dtype not in DTYPE_POLICIES:
            fitting.dtypes(dtype)
        return fitting.result()
    fitting.inits(stage.inits)
    fitting.target_ties(target)
    fitting.coverage()
    fitting.shapes()
    fitting.dtypes(dtype)
    return fitting.result()


@dataclass
class _Fitting:
    plan: Plan
    target: Target | None
    problems: list[Diagnostic]
    ties: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, object] = field(default_factory=dict)
    proofs: list[tuple[str, str]] = field(default_factory=list)
    steps: list[Step] | None = None
    casts: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def wanted(self) -> Mapping[str, TensorSpec]:
        return self.target.specs if self.target is not None else {}

    def result(self) -> Plan:
        steps, specs = self.plan.steps, self.plan.specs
        if self.steps is not None:
            steps = tuple(self.steps)
            specs = dict(zip(*outputs_of(steps)))
        return replace(
            self.plan,
            steps=steps,
            specs=specs,
            ties=self.ties,
            tie_proofs=tuple(self.proofs),
            inits=self.chosen,
            casts=self.casts,
            target=self.target,
        )

    @cached_property
    def left_over(self) -> set[str]:
        """Keys that no rule names and that `rest` made."""
        uses = self.plan.uses
        return {key for step in self.plan.steps if uses[step.rules[-1]].is_rest for key in step.targets}

    def recipe_ties(self, ties: Sequence[BoundPattern]) -> None:
        found: set[int] = set()
        new = list(self.plan.specs)
        while new:  # a tie may lead to a tied name, whichever was written first
            tied: list[str] = []
            for number, tie in enumerate(ties):
                for key in new:
                    values = tie.value.match(key)
                    if values is None:
                        continue
                    found.add(number)
                    try:
                        self.tie_up(tie, tie.pattern.spell(values), key, tied)
                    except RecipeError as error:
                        self.problems += [replace(d, place=tie.place) for d in error.diagnostics]
            new = tied
        for number, tie in enumerate(ties):
            if number not in found and not tie.optional:
                self.problem(
                    "unused-tie",
                    f"nothing makes '{tie.value}', to which '{tie.pattern}' is tied",
                    tie,
                    self.meant_base(tie),
                )

    def meant_base(self, tie: BoundPattern) -> tuple[Remedy, ...]:
        near = nearest_pattern(tie.value, self.plan.specs)
        optional = Remedy("tie", {tie.text: f"? {tie.text}"}, "may find nothing", kind="instead")
        return (*(Remedy("tie", {str(tie.value): str(p)}, kind="instead") for p in [near] if p is not None), optional)

    def tie_up(self, tie: BoundPattern, alias: str, key: str, tied: list[str]) -> None:
        base = self.ties.get(key, key)
        if tie.optional and self.target is not None and alias not in self.wanted:
            return
        if tie.optional and alias in self.plan.specs:
            if alias in self.left_over:  # nothing says that it is a tensor of its own
                self.ties.setdefault(alias, base)
                self.proofs.append((alias, base))
        elif alias in self.plan.specs:
            self.problem(
                "tied-and-made",
                f"{alias!r} is tied to {key!r}, but a rule makes it too",
                tie,
                self.drops([alias]),
                "or prove them equal: a, b -> c | same",
            )
        elif self.ties.setdefault(alias, base) != base:
            self.problem(
                "tied-twice",
                f"{alias!r} is tied to {self.ties[alias]!r} and to {base!r}",
                tie,
                advice="name one of them",
            )
        else:
            tied.append(alias)

    def inits_without_target(self, inits: Sequence[BoundPattern]) -> None:
        for init in inits:
            if not init.optional:
                self.problem(
                    "init-needs-target",
                    f"[init] '{init.pattern}' needs a target, which says shape and dtype",
                    init,
                    (Remedy("target", None, "is a model, a checkpoint or specs"),),
                )

    def inits(self, inits: Sequence[BoundPattern]) -> None:
        for init in inits:
            self.check_initialiser(init)
            found = False
            for key in self.wanted:
                if init.pattern.match(key) is None:
                    continue
                found = True
                if key in self.plan.specs:
                    self.problem(
                        "init-and-made",
                        f"{key!r} is initialised, but a rule makes it too",
                        init,
                        self.drops([key]),
                        "or leave it out of [init]",
                    )
                elif key in self.chosen and self.chosen[key] != init.value:
                    self.problem("init-twice", f"{key!r} is initialised in two ways", init)
                self.chosen[key] = init.value
            if not found and not init.optional:
                self.problem(
                    "unused-init",
                    f"[init] '{init.pattern}' matches no target key",
                    init,
                    meant_instead("init", init.text, init.pattern, self.unmade),
                )

    def check_initialiser(self, init: BoundPattern) -> None:
        """A text that names no initialiser is told now, not when everything else is loaded."""
        if not isinstance(init.value, str):
            return
        try:
            call = parse_call(init.value)
            Initialiser.of(call.name, call.args, dict(call.keywords))
        except RecipeError as error:
            self.problem("bad-init", f"[init] '{init.pattern}': {error.diagnostics[0].headline}", init)
        except OpError as error:
            near = (Remedy("init", error.instead, kind="instead"),) if error.instead else ()
            self.problem("bad-init", f"[init] '{init.pattern}': {error}", init, near)

    def target_ties(self, target: Target) -> None:
        """Names that are one tensor in the target are filled from one; where several are made, they must be equal."""
        for names in target.ties:
            made = [n for n in names if n in self.plan.specs]
            held = made or [n for n in names if n in self.chosen]
            if not held:
                continue
            for name in names:
                if name != held[0]:
                    self.ties.setdefault(name, held[0])
                    self.chosen.pop(name, None)
            self.proofs += [(other, made[0]) for other in made[1:]]

    def coverage(self) -> None:
        extra = list(filterfalse(self.wanted.__contains__, chain(self.plan.specs, self.ties)))
        if extra:
            folded = fold_groups(extra, label=self.plan.specs.get)
            notes = tuple(
                f"{f.text}  {self.plan.specs[f.first]}" if f.first in self.plan.specs else f.text for f in folded[:12]
            )
            verb = "is" if len(extra) == 1 else "are"
            self.problems.append(
                Diagnostic(
                    "unexpected-targets",
                    f"{len(extra)} key{'s' * (len(extra) > 1)} that the plan makes {verb} not in the {self.name}",
                    notes=notes,
                    facts=self.near(extra),
                    remedies=self.drops(extra),
                    advice="or correct the rule",
                )
            )
        missing = [k for k in self.unmade if k not in self.chosen and k not in self.ties]
        if missing:
            folded = fold_groups(missing, label=self.wanted.get)
            notes = tuple(f"{f.text}  {self.wanted[f.first]}" for f in folded[:12])
            notes += (f"… and {len(folded) - 12} more patterns",) if len(folded) > 12 else ()
            inits = dict.fromkeys(exact_patterns(missing, self.wanted), "default")
            verb = "is" if len(missing) == 1 else "are"
            self.problems.append(
                Diagnostic(
                    "missing-keys",
                    f"{len(missing)} {self.name} key{'s' * (len(missing) > 1)} {verb} made by no rule",
                    notes=notes,
                    remedies=(Remedy("init", inits, "has the model draw them", kind="recipe"),),
                    advice="or a rule that makes them",
                )
            )

    @property
    def name(self) -> str:
        return self.target.name if self.target is not None else "target"

    def near(self, keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
        sample = [text for text, _ in fold([k for k in self.wanted if k not in self.plan.specs])[:3]]
        return ((f"the {self.name} lacks", ", ".join(sample)),) if sample else ()

    @property
    def sources(self) -> list[str]:
        """All keys of the source that come to something."""
        return list(dict.fromkeys(chain.from_iterable(map(attrgetter("sources"), self.plan.steps))))

    @property
    def unmade(self) -> list[str]:
        """The keys of the target that no rule makes."""
        return list(filterfalse(self.plan.specs.__contains__, self.wanted))

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
        return self.narrowed(rules.pop(), unwanted) if len(rules) == 1 else ()

    def narrowed(self, rules: tuple[int, ...], unwanted: set[str]) -> tuple[Remedy, ...]:
        """The rule with its source restricted to the keys of which something is wanted."""
        use = self.plan.uses[rules[0]]
        wanted = [k for s in self.plan.steps if s.rules == rules and unwanted.isdisjoint(s.targets) for k in s.sources]
        patterns = exact_patterns(wanted, self.sources)
        terms = use.bound.rule.sources if use.bound is not None else ()
        if len(rules) > 1 or len(patterns) != 1 or len(terms) != 1:
            return ()
        whole, part = str(terms[0].pattern), KeyPattern.parse(patterns[0])
        if whole not in use.text or set(part.names) != set(terms[0].pattern.names):
            return ()
        return (Remedy("rules", {whole: patterns[0]}, "takes what is wanted", kind="instead"),)

    @cached_property
    def kinds(self) -> list[int]:
        """A number for each key made, the same where its spec and the one that is wanted are the same objects."""
        numbers: dict[tuple[int, int], int] = defaultdict(count().__next__)
        pairs = zip(map(id, self.plan.specs.values()), map(id, map(self.wanted.get, self.plan.specs)))
        return list(map(numbers.__getitem__, pairs))

    @cached_property
    def examples(self) -> dict[int, str]:
        """One key of each kind; kinds are few."""
        return dict(zip(self.kinds, self.plan.specs))

    def shapes(self) -> None:
        wrong: dict[int, list[tuple[str, TensorSpec, Step]]] = {}
        for step in self.plan.steps if any(map(self.misshapen, self.examples.values())) else ():
            for key, spec in zip(step.targets, step.program.outputs):
                if self.misshapen(key):
                    wrong.setdefault(step.rules[-1], []).append((key, spec, step))
        for number, cases in wrong.items():
            key, spec, step = cases[0]
            use = self.plan.uses[number]
            reads = ", ".join(f"{k} {list(s.shape)}" for k, s in zip(step.sources[:4], step.program.inputs[:4]))
            others = [text for text, _ in fold([k for k, _, _ in cases[1:]])]
            self.problems.append(
                Diagnostic(
                    "shape-mismatch",
                    f"rule makes {key!r} {list(spec.shape)}; {self.name} wants {list(self.wanted[key].shape)}",
                    place=use.place,
                    notes=(use.text, *others[:6]),
                    facts=(("reads", reads),),
                    advice=_shape_help(spec, self.wanted[key], key),
                )
            )

    def misshapen(self, key: str) -> bool:
        want = self.wanted.get(key)
        return want is not None and want.shape != self.plan.specs[key].shape

    def dtypes(self, policy: str) -> None:
        if policy == "source":
            return
        made = self.plan.specs
        wants = {n: _wanted_dtype(made[key], self.wanted.get(key), policy) for n, key in self.examples.items()}
        odd = {n: (made[key].dtype, wants[n]) for n, key in self.examples.items() if made[key].dtype != wants[n]}
        if not odd:
            return
        kinds = dict(zip(made, self.kinds))
        keys = chain.from_iterable(map(attrgetter("targets"), self.plan.steps))
        self.casts = {key: odd[kinds[key]] for key in keys if kinds[key] in odd}
        cast: dict[tuple[int, tuple[str, ...]], Program | None] = {}
        programs: dict[tuple[int, ...], Program] = {}  # by the one before, and by the kinds of the targets
        self.steps = []
        for step in self.plan.steps:
            sources, targets, program, rules = step
            way = (id(program), *map(kinds.__getitem__, targets))
            if way not in programs:
                place = (id(program), tuple(map(wants.__getitem__, way[1:])))
                if place not in cast:
                    cast[place] = self.cast(program, place[1])
                programs[way] = cast[place] or program
            changed = programs[way]
            self.steps.append(step if changed is program else Step(sources, targets, changed, rules))
        self.refuse(policy)

    def refuse(self, policy: str) -> None:
        """Say which casts the policy does not allow."""
        for have, want in dict.fromkeys(self.casts.values()):
            lossless = is_lossless(have, want)
            if policy == "error" or (policy == "lossless" and not lossless):
                keys = [key for key, change in self.casts.items() if change == (have, want)]
                lossy = "" if lossless else ", which can lose bits"
                self.problems.append(
                    Diagnostic(
                        "dtype-mismatch",
                        f"{counted(len(keys), 'tensor', 'is')} {have}, the {self.name} wants {want}{lossy}",
                        notes=tuple([text for text, _ in fold(keys)][:8]),
                        remedies=(Remedy("dtype", "model", "casts them"), Remedy("dtype", "source", "keeps them")),
                        advice="or | cast(…) in the rule",
                    )
                )

    def cast(self, program: Program, wants: Sequence[str]) -> Program | None:
        for want in dict.fromkeys(wants):
            groups = tuple((n,) for n, w in enumerate(wants) if w == want and program.outputs[n].dtype != want)
            if groups:
                try:
                    program = program.then(Run(make_op("cast", (want,), {}), groups))
                except OpError as error:
                    self.problems.append(Diagnostic("dtype-mismatch", str(error)))
                    return None
        return program

    def problem(
        self,
        code: str,
        headline: str,
        said: BoundPattern,
        remedies: tuple[Remedy, ...] = (),
        advice: str | None = None,
    ) -> None:
        self.problems.append(Diagnostic(code, headline, place=said.place, remedies=remedies, advice=advice))


def _wanted_dtype(spec: TensorSpec, want: TensorSpec | None, policy: str) -> str:
    if policy not in DTYPE_POLICIES and DTYPES[spec.dtype].kind == "float":
        return dtype_name(policy)
    return want.dtype if want is not None else spec.dtype


def _shape_help(spec: TensorSpec, want: TensorSpec, key: str) -> str | None:
    if spec.shape[::-1] == want.shape and len(spec.shape) > 1:
        return "transposed? name the axes: [x y] -> [y x]"
    if spec.numel == want.numel:
        return "the same number of elements: name the axes on both sides"
    if len(spec.shape) == len(want.shape) and spec.shape[1:] == want.shape[1:]:
        return f"{spec.shape[0]} rows against {want.shape[0]}: other classes, a padded vocabulary, or grouped heads?"
    return None
