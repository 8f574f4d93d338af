"""The plan back: every step turned round with the keys and sizes that it had."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from ..errors import Diagnostic, PlanError
from ..language.folding import fold
from ..ops.base import Specs
from ..ops.over_axes import Same
from ..specs import TensorSpec
from ..wording import counted
from .layout import Layout, Piece
from .plan import Plan
from .steps import ApplyOp, Instruction, Make, Move, Parallel, Program, Select, Step
from .uniting import united

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
    _check_dropped(plan, problems)
    _check_keys(plan, converted, problems)
    back = _steps_back(plan, problems)
    if problems:
        raise PlanError(_folded(problems))
    drawn = [key for step in plan.steps if not step.sources for key in step.targets]
    steps, equal = united(back)
    specs = {k: s for step in steps for k, s in zip(step.targets, step.program.outputs)}
    order = {key: n for n, key in enumerate(plan.source)}
    specs = dict(sorted(specs.items(), key=lambda item: order.get(item[0], len(order))))
    proofs = tuple((alias, base) for alias, base in plan.ties.items() if alias in converted)
    return replace(
        plan,
        steps=tuple(steps),
        specs=specs,
        dropped={k: "initialised, not converted" for k in (*plan.inits, *drawn) if k in converted},
        proofs=(*proofs, *equal),
        ties=dict(plan.proofs),
        tie_proofs=(),
        inits={},
        casts={},
        warnings=(),
        source=dict(converted),
        target=None,
        recipe=None,
    )


def _check_dropped(plan: Plan, problems: list[Diagnostic]) -> None:
    read = {key for step in plan.steps for key in step.sources}
    lost = [key for key in plan.dropped if key not in read]  # what a rule read as well comes back from there
    if lost:
        folded = [text for text, _ in fold(lost)]
        problems.append(
            Diagnostic(
                "lossy-drop",
                f"{counted(len(lost), 'source key', 'was')} dropped and cannot come back",
                notes=tuple(folded[:8]),
                help="recipe.inverse() goes back without them",
            )
        )


def _steps_back(plan: Plan, problems: list[Diagnostic]) -> list[Step]:
    """The way back of each step that reads; what cannot be undone is a problem."""
    programs: dict[int, Program | str] = {}
    steps = []
    for step in plan.steps:
        if not step.sources:
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
    return steps


def _check_keys(plan: Plan, converted: Mapping[str, TensorSpec], problems: list[Diagnostic]) -> None:
    missing = [k for k in plan.specs if k not in converted]
    surplus = [k for k in converted if k not in plan.specs and k not in plan.ties and k not in plan.inits]
    changed = [k for k, s in plan.specs.items() if k in converted and converted[k] != s]
    for code, keys, text in (
        ("missing-keys", missing, "that the plan made and the converted checkpoint lacks"),
        ("unexpected-keys", surplus, "of the converted checkpoint that the plan did not make"),
        ("shape-mismatch", changed, "of another shape or dtype than the plan gave"),
    ):
        if keys:
            help = "it was changed since it was converted: go back by the inverse of the recipe"
            notes = tuple(t for t, _ in fold(keys)[:8])
            problems.append(Diagnostic(code, f"{counted(len(keys), 'key')} {text}", notes=notes, help=help))


def _reversed(program: Program) -> Program:
    before = program.specs_on_the_way()
    instructions: list[Instruction] = []
    for instruction, inputs in zip(reversed(program.instructions), reversed(before[:-1])):
        instructions += _undone(instruction, inputs)
    back = Program.of(program.outputs, instructions)
    if back.outputs != program.inputs:
        raise Lossy("its way back does not lead to the same shapes")
    return back


def _undone(instruction: Instruction, inputs: Specs) -> list[Instruction]:
    match instruction:
        case Move(layout):
            dtypes = tuple(s.dtype for s in inputs)
            return [Move(layout.inverse(), dtypes)] if layout.invertible else _unrepeated(layout, dtypes)
        case Select(indices):
            return _unpicked(indices, len(inputs))
        case Parallel(programs):
            return [Parallel(tuple(map(_reversed, programs)))]
        case ApplyOp(op, groups) if isinstance(op, Same) and op.joins:
            head = {i: group[0] for group in groups for i in group}
            kept = {i: n for n, i in enumerate(i for i in range(len(inputs)) if head.get(i, i) == i)}
            return [Select(tuple(kept[head.get(i, i)] for i in range(len(inputs))))]
        case ApplyOp(Same(), groups):
            return [_repeated(instruction, inputs)]
        case Make():
            return [Select(tuple(range(len(inputs))))]
        case ApplyOp():
            return [_op_undone(instruction, inputs)]


def _repeated(run: ApplyOp, inputs: Specs) -> Move:
    """Back from slices that were the same: the one that was passed on, as often as there were slices."""
    slices = {i for group in run.groups for i in group}
    pieces = []
    for n, spec in enumerate(inputs):
        count, rest = (spec.shape[0], math.prod(spec.shape[1:])) if n in slices else (1, math.prod(spec.shape))
        pieces.append(Piece(n, n, (count, rest), 0, (0, 1), 0, (rest, 1)))
    layout = Layout(tuple(s.shape for s in run.after(inputs)), tuple(s.shape for s in inputs), tuple(pieces))
    return Move(layout, tuple(s.dtype for s in inputs))


def _unrepeated(layout: Layout, dtypes: tuple[str, ...]) -> list[Instruction]:
    """Back from a rearrangement that repeats everything equally often: the copies apart, proved to be the same."""
    boxes: dict[tuple[object, ...], list[Piece]] = {}
    for piece in (one for p in layout.pieces for one in _single(p)):
        boxes.setdefault((piece.source, piece.source_offset, piece.shape, piece.source_strides), []).append(piece)
    times = len(next(iter(boxes.values()), ()))
    moved = sum(p.numel for same in boxes.values() for p in same)
    if (
        not times
        or any(len(same) != times for same in boxes.values())
        or moved != times * sum(map(math.prod, layout.sources))
    ):
        raise Lossy("it leaves out elements, or repeats some")
    width = len(layout.sources)
    back = [replace(p.inverse(), target=p.source + n * width) for same in boxes.values() for n, p in enumerate(same)]
    groups = tuple(tuple(s + n * width for n in range(times)) for s in range(width))
    return [Move(Layout(layout.targets, layout.sources * times, tuple(back)), dtypes * times), ApplyOp(Same(), groups)]


def _single(piece: Piece) -> Iterator[Piece]:
    """A piece once for each time that it repeats its source."""
    again = [n for n, stride in enumerate(piece.source_strides) if stride == 0]
    once = [n for n, stride in enumerate(piece.source_strides) if stride != 0]
    shape, strides, back = (
        tuple(values[n] for n in once) for values in (piece.shape, piece.source_strides, piece.target_strides)
    )
    for index in product(*(range(piece.shape[n]) for n in again)):
        offset = piece.target_offset + sum(i * piece.target_strides[n] for i, n in zip(index, again))
        yield Piece(piece.source, piece.target, shape, piece.source_offset, strides, offset, back)


def _unpicked(indices: Sequence[int], count: int) -> list[Instruction]:
    """Back from a list that holds some tensors several times: the copies must be the same."""
    places: list[list[int]] = [[] for _ in range(count)]
    for place, index in enumerate(indices):
        places[index].append(place)
    if not all(places):
        raise Lossy("some of what it makes was left out")
    back: list[Instruction] = (
        [ApplyOp(Same(), tuple(tuple(p) for p in places if len(p) > 1))] if len(indices) > count else []
    )
    rank = {first: n for n, first in enumerate(sorted(p[0] for p in places))}
    return [*back, Select(tuple(rank[p[0]] for p in places))]


def _op_undone(run: ApplyOp, inputs: Specs) -> Instruction:
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
    return ApplyOp(op, tuple(groups))


def _lossy(step: Step, plan: Plan, reason: str) -> Diagnostic:
    use = plan.uses[step.rules[-1]]
    return Diagnostic(
        "lossy-step",
        f"{step.targets[0]!r} cannot be turned back exactly: {reason}",
        place=use.place,
        notes=(use.text,),
        help="leave the op out of the recipe, or write the way back by hand",
    )


def _folded(problems: list[Diagnostic]) -> list[Diagnostic]:
    """One diagnostic a rule and reason, not one a layer."""
    seen: dict[tuple[str, tuple[str, ...], str], Diagnostic] = {}
    for problem in problems:
        seen.setdefault((problem.code, problem.notes, problem.headline.partition(":")[2]), problem)
    return list(seen.values())
