"""`[init]` as a source: tensors that are drawn, as steps without sources, where no target gives their shape.

The key's captures run over ranges, choices, `dims`, or over what they are in the keys that rules make beside it. Sizes
are those of `dims`, else those that the rules solve for an axis of the same name. The dtype is that of the neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeVar

from ..errors import CheckpointError, Diagnostic, PlanError, RecipeError, Remedy
from ..language.calls import parse_call
from ..language.dims import Dims
from ..language.keys import Capture, KeyPattern, Literal
from ..language.law import Signature
from ..language.rules import Rule, Term
from ..ops.base import OpError
from ..ops.initialisers import Initialiser
from ..ops.keyed import Draw, Seeded
from ..specs import DTYPES, TensorSpec
from .expanding import BoundPattern, ResolvedRule, Stage
from .plan import Plan
from .record import RuleUse
from .steps import Make, Program, Step

__all__ = ["drawn", "initialiser_of", "with_draws"]

Sizes = Mapping[str, Collection[int]]
AnyPlan = TypeVar("AnyPlan", bound=Plan)
_KEPT = ("default", "own", "default()", "own()")


def drawn(plan: Plan, stage: Stage, sizes: Sizes, seed: int, problems: list[Diagnostic]) -> tuple[Plan, Stage]:
    """The plan with a step for each key of `[init]` whose axes are named, and the stage without these entries.

    Args:
        sizes: axis -> the sizes that the rules of the stage solved for it.
        seed: of the draws.
    """
    drawing = _Drawing(plan, sizes, seed, problems)
    steps: list[Step] = []
    uses: list[RuleUse] = []
    left: list[BoundPattern] = []
    for init in stage.inits:
        if init.axes is None:
            left.append(init)
            continue
        number = len(plan.uses) + len(uses)
        found = [Step((), (key,), program, (number,)) for key, program in drawing.made_by(init)]
        if found:
            uses.append(_use(init))
            steps += found
    specs = {**plan.specs, **{step.targets[0]: step.program.outputs[0] for step in steps}}
    if len(specs) < len(plan.specs) + len(steps):
        twice = next(key for step in steps for key in step.targets if [s.targets[0] for s in steps].count(key) > 1)
        problems.append(Diagnostic("init-twice", f"{twice!r} is initialised in two ways"))
    whole = replace(plan, steps=(*plan.steps, *steps), uses=(*plan.uses, *uses), specs=specs)
    return whole, replace(stage, inits=left)


def initialiser_of(value: object) -> Initialiser | None:
    """The initialiser that a text or a callable stands for; None where the model itself gives the values.

    Raises:
        RecipeError, OpError: the text names no initialiser.
    """
    if value in _KEPT:
        return None
    if not isinstance(value, str):
        return value if isinstance(value, Initialiser) else Initialiser.wrap(value)  # type: ignore[arg-type]
    call = parse_call(value)
    return Initialiser.of(call.name, call.args, dict(call.keywords))


def with_draws(plan: AnyPlan, seed: int) -> AnyPlan:
    """The plan with a step for each key that its target has initialised, as far as no model is needed for it.

    Raises:
        PlanError: an initialiser cannot fill its tensor.
    """
    steps: list[Step] = []
    uses: dict[str, RuleUse] = {}
    left = {}
    for key, value in plan.inits.items():
        try:
            initialiser = initialiser_of(value)
            if initialiser is None or plan.target is None:
                left[key] = value
                continue
            use = uses.setdefault(str(value), _use(BoundPattern(KeyPattern.literal(key), False, key, value)))
            number = len(plan.uses) + list(uses.values()).index(use)
            steps.append(Step((), (key,), _program(plan.target.specs[key], initialiser, seed), (number,)))
        except OpError as error:
            text = f"[init] {key!r}: {error}"
            raise PlanError(Diagnostic("bad-init", text, remedies=error.remedies("init"))) from None
    specs = {**plan.specs, **{step.targets[0]: step.program.outputs[0] for step in steps}}
    whole = (*plan.uses, *uses.values())
    return replace(plan, steps=(*plan.steps, *steps), uses=whole, specs=specs, inits=left) if steps else plan


def _program(spec: TensorSpec, initialiser: Initialiser, seed: int) -> Program:
    return Program.of((), [Make(Seeded(Draw(initialiser, spec), seed))])


def _use(init: BoundPattern) -> RuleUse:
    rule = Rule((), (Term(init.pattern, init.axes),))
    bound = ResolvedRule(rule, Signature((), (), (), {}, ()), init.dims or Dims({}), init.text)
    return RuleUse(f'[init] "{init.text}" = "{init.value}"', init.place, bound)


@dataclass
class _Drawing:
    """Solves the entries of one stage."""

    plan: Plan
    sizes: Sizes
    seed: int
    problems: list[Diagnostic]
    _near: dict[str, set[str]] = field(default_factory=dict)

    def made_by(self, init: BoundPattern) -> Iterator[tuple[str, Program]]:
        """The keys of an entry with their programs."""
        try:
            initialiser = initialiser_of(init.value)
            keys = self.keys_of(init) if initialiser is not None else []
            shape = self.shape_of(init) if keys else ()
            programs: dict[str, Program] = {}
            for key in keys:
                if key in self.plan.specs:
                    raise _Unsolved("init-and-made", f"{key!r} is initialised, but a rule makes it too")
                dtype = self.dtype_of(init, key)
                if dtype not in programs and initialiser is not None:
                    programs[dtype] = _program(TensorSpec(shape, dtype), initialiser, self.seed)
                yield key, programs[dtype]
            if initialiser is None and not init.optional:
                raise _Unsolved("init-needs-model", f"{init.value!r} is what a model gives, and there is none")
        except _Unsolved as error:
            self.problem(init, error.diagnostic)
        except RecipeError as error:
            self.problem(init, replace(error.diagnostics[0], code="bad-init"))
        except OpError as error:
            self.problem(init, Diagnostic("bad-init", str(error), remedies=error.remedies("init")))

    def problem(self, init: BoundPattern, problem: Diagnostic) -> None:
        self.problems.append(replace(problem, headline=f"[init] '{init.text}': {problem.headline}", place=init.place))

    def keys_of(self, init: BoundPattern) -> list[str]:
        """The keys that the pattern spells; its captures run over what is given, or over what is made beside them."""
        given = {c.name: self.values_of(c, init.dims) for c in init.pattern.firsts}
        free = [name for name, values in given.items() if values is None]
        beside = self.beside(init.pattern, free) if free else [{}]
        if not beside:
            if init.optional:
                return []
            size = free[0]
            text = f"nothing says which values {{{size}}} has: no key is made beside '{init.pattern}'"
            raise _Unsolved("init-without-keys", text, help=f"{{{size}:0..3}}, or its number in dims")
        known = {name: values for name, values in given.items() if values is not None}
        rows = [{**row, **dict(zip(known, choice))} for row in beside for choice in product(*known.values())]
        return list(dict.fromkeys(init.pattern.spell(row) for row in rows))

    def values_of(self, capture: Capture, dims: Dims | None) -> list[str] | None:
        if capture.choices is not None:
            return list(capture.choices)
        if capture.span is not None:
            return list(map(str, range(int(capture.span.first), int(capture.span.last) + 1)))
        extent = dims.get(capture.name) if dims is not None and not capture.rest else None
        return list(map(str, range(extent))) if isinstance(extent, int) else None

    def beside(self, pattern: KeyPattern, free: Sequence[str]) -> list[dict[str, str]]:
        """The values of captures in the keys that are made under the same prefix, each combination once."""
        last = max(n for n, piece in enumerate(pattern.pieces) if isinstance(piece, Capture) and piece.name in free)
        after = pattern.pieces[last + 1 :]
        if not after or not isinstance(after[0], Literal) or after[0].text[0] not in "./":
            return []
        whole = KeyPattern((*pattern.pieces[: last + 1], Literal(after[0].text[0]), Capture("...", rest=True)))
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for key in self.plan.specs:
            for values in whole.readings(key):
                found.setdefault(tuple(values[n] for n in free), {n: values[n] for n in free})
        return list(found.values())

    def shape_of(self, init: BoundPattern) -> tuple[int, ...]:
        shape = []
        for dim in init.axes.dims if init.axes is not None else ():
            if dim.ellipsis or dim.optional:
                raise _Unsolved("bad-init", f"'{dim}' has no size where nothing is read")
            size = 1
            for axis in dim.axes:
                size *= axis.size if axis.size is not None else self.size_of(axis.name, init)
            shape.append(size)
        return tuple(shape)

    def size_of(self, name: str, init: BoundPattern) -> int:
        given = init.dims.get(name) if init.dims is not None else None
        if isinstance(given, int):
            return given
        solved = sorted(self.sizes.get(name, ()))
        if len(solved) == 1 and given is None:
            return solved[0]
        several = f"the rules solve it as {', '.join(map(str, solved))}" if solved else "no rule solves it"
        text = f"axis {name!r} has no size: {several}"
        raise _Unsolved("unsolved-axis", text, remedies=(Remedy.size(name),))

    def dtype_of(self, init: BoundPattern, key: str) -> str:
        """The dtype that is said, or that of the floats made nearest to the key."""
        if init.dtype is not None:
            return init.dtype
        prefix = key
        while prefix:
            prefix = prefix.rpartition(".")[0]
            near = self.near(prefix)
            if len(near) == 1:
                return next(iter(near))
            if near:
                break
        found = ", ".join(sorted(near)) if prefix or near else "none"
        text = f"the dtype of {key!r} does not follow from its neighbours ({found})"
        raise _Unsolved("unsolved-dtype", text, help=f'say it behind the axes: "{init.text} BF16"')

    def near(self, prefix: str) -> set[str]:
        """The float dtypes of what is made under a prefix."""
        if prefix not in self._near:
            under = f"{prefix}." if prefix else ""
            kinds = (s.dtype for k, s in self.plan.specs.items() if k.startswith(under))
            self._near[prefix] = {dtype for dtype in kinds if DTYPES[dtype].kind == "float"}
        return self._near[prefix]


class _Unsolved(CheckpointError):
    """An entry that cannot be solved."""

    def __init__(self, code: str, text: str, help: str | None = None, remedies: tuple[Remedy, ...] = ()) -> None:
        super().__init__(Diagnostic(code, text, help=help, remedies=remedies))

    @property
    def diagnostic(self) -> Diagnostic:
        return self.diagnostics[0]
