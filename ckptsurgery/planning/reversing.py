"""The plan back: every step turned round with the keys and sizes that it had."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ..errors import Diagnostic, PlanError
from ..language.folding import fold
from ..ops.axes import Same
from ..ops.base import Specs
from ..specs import TensorSpec
from .plan import Plan
from .steps import Fork, Instruction, Move, Pick, Program, Run, Step

__all__ = ["reversed_plan"]


class Lossy(Exception):
    """A step that cannot be undone exactly; the text says why."""


def reversed_plan(plan: Plan, converted: Mapping[str, TensorSpec], tied: Collection[str] = ()) -> Plan:
    """The exact way back from what a plan made.

    Args:
        converted: the headers of the converted checkpoint.
        tied: its names that share a tensor with another.

    Raises:
        PlanError: every step that loses something, and every key that is not as the plan made it.
    """
    problems: list[Diagnostic] = []
    if plan.dropped:
        folded = [text for text, _ in fold(plan.dropped)]
        problems.append(Diagnostic("lossy-drop", f"{len(plan.dropped)} source keys were dropped and cannot come back",
                                   notes=tuple(folded[:8]), help="recipe.inverse() goes back without them"))  # fmt: skip
    _check_keys(plan, converted, problems)
    programs: dict[int, Program | str] = {}
    steps = []
    for step in plan.steps:
        if step.upstream:
            problems.append(_lossy(step, plan, "several stages meet in it"))
            continue
        if id(step.program) not in programs:
            try:
                programs[id(step.program)] = _reversed(step.program)
            except Lossy as reason:
                programs[id(step.program)] = str(reason)
        program = programs[id(step.program)]
        if isinstance(program, str):
            problems.append(_lossy(step, plan, program))
        else:
            steps.append(Step(step.targets, step.sources, program, step.rules))
    if problems:
        raise PlanError(_folded(problems))
    specs = {k: s for step in steps for k, s in zip(step.targets, step.program.outputs)}
    order = {key: n for n, key in enumerate(plan.source)}
    specs = dict(sorted(specs.items(), key=lambda item: order.get(item[0], len(order))))
    proofs = tuple((alias, base) for alias, base in plan.ties.items() if alias in converted)
    return replace(
        plan, steps=tuple(steps), specs=specs, dropped={k: "initialised, not converted" for k in plan.inits if k in converted},
        proofs=proofs, ties={alias: base for alias, base in plan.proofs}, tie_proofs=(), inits={}, casts={}, warnings=(),
        source=dict(converted), target=None, recipe=None,
    )  # fmt: skip


def _check_keys(plan: Plan, converted: Mapping[str, TensorSpec], problems: list[Diagnostic]) -> None:
    missing = [k for k in plan.specs if k not in converted]
    surplus = [k for k in converted if k not in plan.specs and k not in plan.ties and k not in plan.inits]
    changed = [k for k, s in plan.specs.items() if k in converted and converted[k] != s]
    for code, keys, text in (
        ("missing-keys", missing, "that the plan made are not in the converted checkpoint"),
        ("unexpected-keys", surplus, "of the converted checkpoint are none that the plan made"),
        ("shape-mismatch", changed, "have another shape or dtype than the plan gave them"),
    ):
        if keys:
            problems.append(Diagnostic(code, f"{len(keys)} keys {text}", notes=tuple(t for t, _ in fold(keys)[:8])))


def _reversed(program: Program) -> Program:
    before = program.specs_on_the_way()
    instructions: list[Instruction] = []
    for instruction, inputs in zip(reversed(program.instructions), reversed(before[:-1])):
        instructions.append(_undone(instruction, inputs))
    back = Program.of(program.outputs, instructions)
    if back.outputs != program.inputs:
        raise Lossy("its way back does not lead to the same shapes")
    return back


def _undone(instruction: Instruction, inputs: Specs) -> Instruction:
    match instruction:
        case Fork(times):
            width = len(inputs)
            return Run(Same(), tuple(tuple(n + t * width for t in range(times)) for n in range(width)))
        case Move(layout):
            if not layout.invertible:
                raise Lossy("it repeats or leaves out elements")
            return Move(layout.inverse(), tuple(s.dtype for s in inputs))
        case Run(op, groups):
            return _op_undone(instruction, inputs)
        case Pick():
            raise Lossy("some of what it makes was left out")
    raise AssertionError(instruction)


def _op_undone(run: Run, inputs: Specs) -> Instruction:
    if isinstance(run.op, Same) and run.op.joins:
        sizes = {len(g) for g in run.groups}
        flat = [i for g in run.groups for i in g]
        width = len(run.groups)
        if len(sizes) == 1 and flat and sorted(flat) == list(range(len(inputs))):
            times = sizes.pop()
            if all(g == tuple(n + t * width for t in range(times)) for n, g in enumerate(run.groups)):
                return Fork(times)
        raise Lossy("its equal sources cannot be told apart")
    undone = {run.op.inverse(tuple(inputs[i] for i in g)) for g in run.groups}
    op = undone.pop() if len(undone) == 1 else None
    if op is None:
        raise Lossy(f"{run.op} is not exactly invertible")
    counter = 0
    groups: list[tuple[int, ...]] = []
    heads = {g[0]: g for g in run.groups}
    inside = {i for g in run.groups for i in g}
    for i in range(len(inputs)):
        if i in heads:
            made = len(run.op.infer(tuple(inputs[j] for j in heads[i])))
            groups.append(tuple(range(counter, counter + made)))
            counter += made
        elif i not in inside:
            counter += 1
    if any(list(g) != list(range(g[0], g[0] + len(g))) for g in run.groups):
        raise Lossy(f"{run.op} joins tensors that do not stand together")
    return Run(op, tuple(groups))


def _lossy(step: Step, plan: Plan, reason: str) -> Diagnostic:
    use = plan.uses[step.rules[-1]]
    return Diagnostic("lossy-step", f"{step.targets[0]!r} cannot be turned back exactly: {reason}", place=use.place,
                      notes=(use.text,))  # fmt: skip


def _folded(problems: list[Diagnostic]) -> list[Diagnostic]:
    """One diagnostic a rule and reason, not one a layer."""
    seen: dict[tuple[str, tuple[str, ...], str], Diagnostic] = {}
    for problem in problems:
        seen.setdefault((problem.code, problem.notes, problem.headline.partition(":")[2]), problem)
    return list(seen.values())
