"""What lies beside the model in a training checkpoint: what goes along, and what a plan would leave without a model.

An optimizer's state, an EMA copy, any tree of tensors that mirrors the model's, belongs to the tensors that it was made
of. A plan that changes keys, shapes, values, order or number of these leaves such a tree behind; it goes along only on
request. What does not depend on the tensors (a step, arguments, random states) always goes along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

from ..errors import Diagnostic, PlanError, Remedy
from ..ops.arithmetic import Cast
from ..planning.plan import Plan
from ..planning.steps import ApplyOp, Instruction, Move, Step
from ..storage.checkpoint import Checkpoint
from ..storage.metadata_records import METADATA, recorded
from ..storage.mirrors import Mirror, has_weights, mirrors_in, parts_of
from ..storage.unpickling.nodes import is_state, name_of
from ..wording import counted
from .carry.asking import Carrying, on_one_way
from .carry.tree_leaves import Leaves, with_tensors

__all__ = ["Beside", "along_with", "carried", "moved_modules", "moved_versions"]

Asked = str | Mapping[str, str]
"""`"error"`, `"drop"` or `"keep"` for every tree, or a word for each by its path; `""` names all others."""

_WORDS = ("error", "drop", "keep")
_SHOWN = 8
_FEW = 16


@dataclass(frozen=True, slots=True)
class Beside:
    """What goes along with the model.

    Args:
        extras: dotted path -> value.
        notes: what went along and what was left out.
    """

    extras: dict[str, Any]
    notes: tuple[str, ...] = ()


def along_with(plan: Plan, checkpoint: Checkpoint, asked: Asked, held: bool, carry: Carrying | None = None) -> Beside:
    """What goes along with a plan's result into a file.

    Args:
        asked: what becomes of trees that the plan leaves without a model.
        held: whether the output's format holds more than tensors.
        carry: which of them follow the plan; by default those that its recipe names.

    Raises:
        PlanError: a tree would no longer fit and nothing is said of it; a word or a path that is not known.
    """
    default, named = _said(asked)
    # tensors that cannot be read are the plan's matter, which drops them
    everything = {path: value for path, value in checkpoint.extras.items() if path not in checkpoint.unreadable}
    carry = carry or Carrying.of(plan)
    _check_paths([*named, *carry.asked], everything)
    if not held:
        _refuse_keep(default, named, carry.asked)
        # the versions of modules go into the metadata that every format holds
        unheld = [path for path in everything if path != METADATA]
        return Beside({}, _listed("left out, as the format cannot hold it", unheld))
    if not everything:
        return Beside({})
    changed = _Changes.of(plan)
    extras = _moved_states(plan, everything)
    found = _mirrors(extras, plan, changed, carry)
    undecided: list[Mirror] = []
    followed, found = carry.taken(found)
    kept: list[Mirror] = []
    dropped = [path for path, word in named.items() if word == "drop"]
    for mirror in found:
        word = _word_for(mirror.path, named, default)
        if word == "drop":
            dropped.append(mirror.path)
        else:
            (kept if word == "keep" else undecided).append(mirror)
    if undecided:
        raise PlanError(_left_behind(undecided, changed))
    trees, told = _followed(plan, checkpoint, followed, carry)
    extras = _without(replaced(extras, trees), dropped)
    notes = [
        *told,
        *_listed("left out, as asked", dict.fromkeys(dropped)),
        *_listed("kept as it was, though the plan changes the tensors that it belongs to", [m.path for m in kept]),
        *_listed("went along beside the model", [path for path in extras if not (_of_model(path) or path in trees)]),
    ]
    if plan.casts and not changed.any:
        cast = {key: plan.source[key] for key in plan.casts if key in plan.source}
        paths = [mirror.path for mirror in mirrors_in(extras, plan.source, cast)]
        notes += _listed("kept in its dtype, though the model is cast", paths)
    lost = everything.keys() - extras.keys() - set(dropped)
    notes += _listed("left out, as the plan does not say where its module went", sorted(filter(is_state, lost)))
    return Beside(extras, tuple(notes))


def carried(plan: Plan, checkpoint: Checkpoint, carry: Carrying) -> dict[str, Any]:
    """Return the trees that follow a plan, with torch tensors; those that it leaves as they are too.

    Raises:
        PlanError: a path that is not there; and as for `carried_trees`.
    """
    everything = {path: value for path, value in checkpoint.extras.items() if path not in checkpoint.unreadable}
    _check_paths(carry.paths, everything)
    changed = _Changes.of(plan)
    found = _mirrors(everything, plan, changed, carry)
    trees, _ = _followed(plan, checkpoint, carry.taken(found)[0], carry)
    made = replaced(everything, trees)
    leaves = Leaves(checkpoint)
    return {path: with_tensors(next(_values(made, path)), leaves) for path in carry.paths}


def _followed(
    plan: Plan, checkpoint: Checkpoint, mirrors: Sequence[Mirror], carry: Carrying
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Let trees follow the plan: path -> the tree as it is then, and what became of them."""
    if not mirrors:
        return {}, ()
    from .carry.carried_trees import carried_trees  # most checkpoints have no such trees

    carried = carried_trees(plan, checkpoint, mirrors, carry.paths, carry.lost)
    return carried.trees, carried.notes


def _mirrors(extras: Mapping[str, Any], plan: Plan, changed: _Changes, carry: Carrying) -> list[Mirror]:
    """The trees that belong to tensors that a plan changes; those with weights that the caller has follow are such."""
    if not changed.any:
        return []
    found = mirrors_in(extras, plan.source, changed.specs)
    for path in carry.asked:
        known = any(on_one_way(one.path, path) for one in found)
        found += [Mirror(path, "carry names it", v) for v in _values(extras, path) if not known and has_weights(v)]
    return found


def _values(extras: Mapping[str, Any], path: str) -> Iterator[Any]:
    for way in _find(extras, path):
        node: Any = extras
        for key in way:
            node = node[key]
        yield node


def moved_modules(plan: Plan) -> dict[str, str]:
    """Module path of the source -> of the result: a module goes where its tensors went, or those of its parts."""
    moved: dict[str, str] = {"": ""}
    for step in plan.steps:
        if not (step.sources and step.targets):
            continue
        old, new = step.sources[0].rpartition(".")[0], step.targets[0].rpartition(".")[0]
        while old and old not in moved:
            moved[old] = new
            old, _, one = old.rpartition(".")
            new, _, other = new.rpartition(".")
            if one != other:
                break
    return moved


@dataclass(frozen=True, slots=True)
class _Changes:
    """The source's tensors that a plan does not give back as they were.

    Args:
        any: whether the result differs in more than its dtypes.
        specs: key -> spec of the tensors that change; all of them where only their order or number does.
        text: one of them and what became of it.
    """

    any: bool
    specs: Mapping[str, Any]
    text: str = ""

    @classmethod
    def of(cls, plan: Plan) -> _Changes:
        same = {step.targets[0] for step in plan.steps if _keeps(step)}
        changed = {key: spec for key, spec in plan.source.items() if key not in same}
        more = [key for key in plan.keys if key not in plan.source]
        lost = next((key for key in plan.dropped if key not in plan.source), None)
        if changed:
            first = next(iter(changed))
            return cls(True, changed, _became(first, plan))
        if lost is not None:
            return cls(True, plan.source, f"{lost} is dropped")
        if more:
            return cls(True, plan.source, f"{more[0]} is new")
        if [key for key in plan.keys if key in same] != list(plan.source):
            return cls(True, plan.source, "the keys come in another order")
        return cls(False, {})


def _keeps(step: Step) -> bool:
    if step.sources != step.targets or len(step.targets) != 1:
        return False
    return step.program.copies == (0,) or all(map(_only_casts, step.program.instructions))


def _only_casts(instruction: Instruction) -> bool:
    if isinstance(instruction, Move):
        return instruction.layout.copies == (0,)
    return isinstance(instruction, ApplyOp) and isinstance(instruction.op, Cast)


def _became(key: str, plan: Plan) -> str:
    if key in plan.dropped:
        return f"{key} is dropped"
    step = next((step for step in plan.steps if key in step.sources), None)
    if step is None:
        return f"{key} is left out"
    return f"{key} -> {', '.join(step.targets[:3])}" + (", …" if len(step.targets) > 3 else "")


def _said(asked: Asked) -> tuple[str, dict[str, str]]:
    named = {"": asked} if isinstance(asked, str) else dict(asked)
    wrong = [word for word in named.values() if word not in _WORDS]
    if wrong:
        near = get_close_matches(str(wrong[0]), _WORDS, 1)
        raise PlanError(
            Diagnostic(
                "bad-argument",
                f"beside: {wrong[0]!r} is not one of {', '.join(_WORDS)}",
                remedies=(Remedy("beside", {wrong[0]: near}, kind="instead"),) if near else (),
                advice=None if near else "the word stands alone, or goes with the path of a tree",
            )
        )
    return named.pop("", "error"), named


def _check_paths(named: Collection[str], extras: Mapping[str, Any]) -> None:
    unknown = [path for path in named if not any(_find(extras, path))]
    if unknown:
        there = [path for path in extras if not _of_model(path)]
        near = get_close_matches(unknown[0], there, 1)
        raise PlanError(
            Diagnostic(
                "unknown-tree",
                f"nothing called {unknown[0]!r} lies beside the model",
                notes=tuple(unknown[1:_SHOWN]),
                remedies=(Remedy("beside", {unknown[0]: near}, kind="instead"),) if near else (),
                advice="there are: " + ", ".join(there[:_SHOWN])
                if there
                else "leave the option out: there is nothing beside the model",
            )
        )


def _refuse_keep(default: str, named: Mapping[str, str], carried: Collection[str]) -> None:
    wanted = [path for path, word in named.items() if word == "keep"] + ["everything"] * (default == "keep")
    wanted += carried
    if wanted:
        word, verb = ("carry", "be carried") if wanted[0] in carried else ("beside", "be kept")
        raise PlanError(
            Diagnostic(
                "bad-argument",
                f"{word}: {wanted[0]} is to {verb}, and the output's format holds tensors of the model alone",
                help="write a .pt file",
            )
        )


def _word_for(path: str, named: Mapping[str, str], default: str) -> str:
    above = [name for name in named if path == name or path.startswith(f"{name}.")]
    return named[max(above, key=len)] if above else default


def _left_behind(mirrors: list[Mirror], changed: _Changes) -> Diagnostic:
    names = [mirror.path for mirror in mirrors]
    verb, it = ("belongs", "it") if len(names) == 1 else ("belong", "them")
    return Diagnostic(
        "left-behind",
        f"{', '.join(names[:_SHOWN])} {verb} to tensors that the plan changes, and would no longer fit the model",
        notes=tuple(f"{mirror.path}  {mirror.why}" for mirror in mirrors[:_FEW]),
        facts=(("changes", changed.text),),
        remedies=(
            Remedy("carry", names, f"lets {it} follow the plan"),
            Remedy("beside", dict.fromkeys(names, "drop"), f"leaves {it} out"),
            Remedy("beside", dict.fromkeys(names, "keep"), f"copies {it} as {'it is' if it == 'it' else 'they are'}"),
        ),
    )


def _listed(text: str, paths: Any) -> tuple[str, ...]:
    shown = list(islice(paths, _FEW + 1))
    more = len(list(paths)) - _FEW
    names = ", ".join(map(str, shown[:_FEW])) + (f" and {counted(more, 'more part')}" if more > 0 else "")
    return (f"{text}: {names}",) if shown else ()


def _find(extras: Mapping[str, Any], path: str) -> Iterator[tuple[Any, ...]]:
    """The ways to a dotted path: the extra's own path, then keys of dictionaries within it."""
    for name, value in extras.items():
        if path == name:
            yield (name,)
        elif path.startswith(f"{name}."):
            yield from ((name, *way) for way in _ways(value, path[len(name) + 1 :]))


def _ways(value: Any, path: str) -> Iterator[tuple[Any, ...]]:
    for key, part in value.items() if isinstance(value, dict) else ():
        name = name_of(key)
        if path == name:
            yield (key,)
        elif path.startswith(f"{name}."):
            yield from ((key, *way) for way in _ways(part, path[len(name) + 1 :]))


def _without(extras: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """The extras without some parts."""
    kept = dict(extras)
    for path in paths:
        for node, key in _nodes_at(kept, path):
            del node[key]
    return kept


def replaced(extras: Mapping[str, Any], trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return the extras with other trees at some paths."""
    made = dict(extras)
    for path, tree in trees.items():
        for node, key in _nodes_at(made, path):
            node[key] = tree
    return made


def _nodes_at(extras: dict[str, Any], path: str) -> Iterator[tuple[dict[Any, Any], Any]]:
    """The mappings that hold a path; those on the way are made anew, since the source's own stay as they are."""
    for way in list(_find(extras, path)):
        node: dict[Any, Any] = extras
        for key in way[:-1]:
            node[key] = parts_of(node[key])
            node = node[key]
        yield node, way[-1]


def _moved_states(plan: Plan, extras: Mapping[str, Any]) -> dict[str, Any]:
    """The extras with the states of modules, and the versions of modules, under the names that these get."""
    if not any(map(_of_model, extras)):
        return dict(extras)
    moved = moved_modules(plan)
    made: dict[str, Any] = {}
    for path, value in extras.items():
        module = path.rpartition(".")[0]
        if path == METADATA and isinstance(value, Mapping):
            made[path] = {moved[old]: told for old, told in value.items() if old in moved}
        elif not is_state(path):
            made[path] = value
        elif module in moved:
            made[f"{moved[module]}._extra_state".lstrip(".")] = value
        elif all(map(_keeps, plan.steps)):
            made[path] = value
    return made


def moved_versions(plan: Plan, extras: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that tells the versions of the modules, under the names that these get."""
    told = extras.get(METADATA)
    return recorded(_moved_states(plan, {METADATA: told})[METADATA]) if isinstance(told, Mapping) else {}


def _of_model(path: str) -> bool:
    return path == METADATA or is_state(path)
