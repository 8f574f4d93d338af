"""`diff`: what two checkpoints have in common, and what not."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, RecipeError
from ..language.folding import fold_groups
from ..many_objects import gc_pause
from ..notebook_view import TextInNotebooks
from ..running.progress import ByteBar
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..wording import brief, clipped, counted
from .compared_sides import ComparedSide, Groups, Stored
from .numbers import Difference, difference
from .ranking import ranked

if TYPE_CHECKING:
    from ..catalog import RecipeLike
    from ..inference.suggestion import Suggestion

__all__ = ["Diff", "diff"]

_SHOWN = 16
_WIDE = 200  # characters of a folded run of keys


@dataclass(frozen=True, repr=False)
class Diff(TextInNotebooks):
    """The difference between two checkpoints; `str` shows it as text.

    Args:
        a, b: what was compared.
        common: how many keys both have.
        only_a, only_b: keys of one alone, with their specs.
        shapes, dtypes: keys of both that differ there, with both specs.
        values: keys of one shape whose values differ, and by how much.
        ties_a, ties_b: groups of common keys that are one tensor in one alone.
        values_compared: whether values were looked at.
        alignment: the suggestion by which `a` was brought into `b`'s layout; None where nothing was inferred.
        alike: specs of the keys that both have in one shape.
    """

    a: str
    b: str
    common: int
    only_a: Mapping[str, TensorSpec]
    only_b: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[TensorSpec, TensorSpec]]
    dtypes: Mapping[str, tuple[TensorSpec, TensorSpec]]
    values: Mapping[str, Difference]
    ties_a: Groups = ()
    ties_b: Groups = ()
    values_compared: bool = True
    alignment: Suggestion | None = field(default=None, repr=False)
    alike: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether nothing differs: the same keys, shapes, dtypes, ties and, where they were compared, bytes."""
        return not (
            self.only_a or self.only_b or self.shapes or self.dtypes or self.values or self.ties_a or self.ties_b
        )

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain data."""

        def both(pairs: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> dict[str, list[object]]:
            return {key: [_spec_json(one), _spec_json(other)] for key, (one, other) in pairs.items()}

        return {
            "a": self.a,
            "b": self.b,
            "identical": self.identical,
            "common": self.common,
            "only_a": {key: _spec_json(spec) for key, spec in self.only_a.items()},
            "only_b": {key: _spec_json(spec) for key, spec in self.only_b.items()},
            "shapes": both(self.shapes),
            "dtypes": both(self.dtypes),
            "values": {key: found.to_json() for key, found in self.values.items()} if self.values_compared else None,
            "ties_a": [list(names) for names in self.ties_a],
            "ties_b": [list(names) for names in self.ties_b],
            "alignment": None if self.alignment is None else self.alignment.to_json(),
        }

    def to_html(self, title: str = "diff") -> str:
        """Make a page with a heat map of the values that differ, layer by role; it is one file that fetches nothing."""
        from .heat_map import diff_page  # pages are rare, and their parts are large

        differing = f"{len(self.values):,} of {len(self.alike):,} tensors differ in values"
        facts = [f"a  {self.a}", f"b  {self.b}", f"{self.common:,} keys in common"]
        facts.append(differing if self.values_compared else "values were not compared")
        sections = {
            "in a alone": {key: str(spec) for key, spec in self.only_a.items()},
            "in b alone": {key: str(spec) for key, spec in self.only_b.items()},
            "shapes": {key: f"{list(one.shape)} -> {list(other.shape)}" for key, (one, other) in self.shapes.items()},
            "dtypes": {key: f"{one.dtype} -> {other.dtype}" for key, (one, other) in self.dtypes.items()},
        }
        ties = {"tied in a alone": self.ties_a, "tied in b alone": self.ties_b}
        return diff_page(title, facts, sections, ties, self.alike, self.values)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        alone = ((self.only_a, "in a alone"), (self.only_b, "in b alone"))
        apart = ((self.shapes, "shape"), (self.dtypes, "dtype"), (self.values, "value"))
        counts = [f"{len(keys):,} {where}" for keys, where in alone if keys]
        counts += [f"{len(keys):,} of other {what}s" for keys, what in apart if keys]
        counts += ["other ties"] if self.ties_a or self.ties_b else []
        return brief("Diff", f"{clipped(self.a)} and {clipped(self.b)}", *(counts or ["identical"]))

    def _lines(self) -> Iterator[str]:
        yield f"a  {self.a}"
        yield f"b  {self.b}"
        if self.alignment is not None:
            said = "proved on the data" if self.alignment.evidence == "values" else "from names and shapes"
            yield f"aligned {said}: {self.alignment.coverage:.1%} of b's keys have a counterpart in a"
            yield from (f"  assumed ({found.kind}): {found.text}" for found in self.alignment.assumptions)
        if self.identical:
            what = "keys, shapes, dtypes, ties and bytes" if self.values_compared else "keys, shapes, dtypes and ties"
            yield f"identical: {what} of {_all(self.common)}"
            return
        yield f"keys: {self.common:,} in common, {len(self.only_a):,} in a alone, {len(self.only_b):,} in b alone"
        yield from _section("in a alone", self.only_a, str)
        yield from _section("in b alone", self.only_b, str)
        yield from _section("shapes", self.shapes, lambda pair: f"{list(pair[0].shape)} -> {list(pair[1].shape)}")
        yield from _section("dtypes", self.dtypes, lambda pair: f"{pair[0].dtype} -> {pair[1].dtype}")
        yield from self._value_lines()
        for title, groups in (("tied in a alone", self.ties_a), ("tied in b alone", self.ties_b)):
            if groups:
                yield title
                yield from (f"  {clipped(' = '.join(names), _WIDE)}" for names in groups[:_SHOWN])
                yield from [f"  … and {len(groups) - _SHOWN:,} more"] if len(groups) > _SHOWN else []

    def _value_lines(self) -> Iterator[str]:
        comparable = self.common - len(self.shapes)
        if not self.values_compared:
            yield "values were not compared"
        elif not self.values:
            yield f"values: equal in {_all(comparable)} of equal shape"
        else:
            yield f"values: {len(self.values):,} of {counted(comparable, 'tensor')} differ"
            rows = ranked(self.values)
            for row in rows[:_SHOWN]:
                yield f"  {clipped(row.text, _WIDE)}"
                yield f"    {row.said}"
            if len(rows) > _SHOWN:
                less = counted(sum(row.count for row in rows[_SHOWN:]), "tensor")
                yield f"  … and {len(rows) - _SHOWN:,} more patterns of {less} that differ no more than these"


def _all(tensors: int) -> str:
    return f"{'all ' if tensors > 1 else ''}{counted(tensors, 'tensor')}"


def diff(
    a: Any,
    b: Any,
    recipe: RecipeLike | None = None,
    *,
    align: str | None = None,
    values: bool = True,
    progress: bool | None = None,
) -> Diff:
    """Compare two checkpoints, or what a recipe makes of the first with the second.

    >>> import torch
    >>> found = diff({"w": torch.ones(2, 2)}, {"w": torch.tensor([[1.0, 1.0], [1.0, 1.5]])})
    >>> found.identical, found.values["w"].max_abs, found.values["w"].differing
    (False, 0.5, 1)
    >>> diff({"w": torch.ones(2, 1)}, {"x": torch.ones(1, 2)}, "w [o i] -> x [i o]").identical
    True
    >>> diff({"fc.kernel": torch.ones(2, 3)}, {"linear.weight": torch.zeros(3, 2)}, align="names").values.keys()
    dict_keys(['linear.weight'])

    Headers are compared first; values are read block by block, so memory does not grow with the checkpoints.

    Args:
        a, b: whatever `open` takes.
        recipe: what becomes of `a` before the comparison.
        align: "names" or "values": infer the recipe, as `suggest(by=…)` does; what has no counterpart is in one alone.
        values: False compares headers and ties alone.
        progress: True or False to insist on a bar or on none.

    Raises:
        CheckpointError: one of them cannot be read.
        RecipeError, PlanError: the recipe does not fit `a`, or is given where it is to be inferred.
    """
    if align is not None and recipe is not None:
        text = "a recipe is given, and is to be inferred too"
        raise RecipeError(Diagnostic("bad-argument", text, help="leave out the recipe, or the alignment"))
    with ExitStack() as opened:
        first, second = (_opened(source, opened) for source in (a, b))
        if align is not None:
            return _aligned(first, second, align, values, progress)
        one: ComparedSide = Stored(first) if recipe is None else _made(first, recipe)
        return _compared(one, Stored(second), values, progress)


def _aligned(a: Checkpoint, b: Checkpoint, by: str, values: bool, progress: bool | None) -> Diff:
    """The first in the layout of the second; what the recipe drops stands under its own name."""
    from ..inference.suggesting import suggest

    found = suggest(a, b, by=by)
    result = _compared(_made(a, found.recipe), Stored(b), values, progress)
    return replace(result, only_a={key: a.specs[key] for key in found.unmatched_source}, alignment=found)


def _made(checkpoint: Checkpoint, recipe: RecipeLike) -> ComparedSide:
    """What a recipe makes of a checkpoint."""
    from ..running.runner import plan
    from .made import Made

    return Made(plan(checkpoint, recipe))


def _opened(source: Any, opened: ExitStack) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if checkpoint is not source:
        opened.enter_context(checkpoint)
    return checkpoint


def _compared(a: ComparedSide, b: ComparedSide, values: bool, progress: bool | None) -> Diff:
    with gc_pause():
        pairs = {key: (spec, b.specs[key]) for key, spec in a.specs.items() if key in b.specs}
    alike = [key for key, (one, other) in pairs.items() if one.shape == other.shape]
    found: dict[str, Difference] = {}
    with ByteBar(sum(a.specs[key].nbytes for key in alike), "comparing", progress) as bar:
        for key in alike if values else ():
            apart = difference(a, b, key)
            if apart is not None:
                found[key] = apart
            bar(a.specs[key].nbytes)
    ties_a, ties_b = (_within(side.ties, pairs) for side in (a, b))
    return Diff(
        a.name,
        b.name,
        len(pairs),
        {key: spec for key, spec in a.specs.items() if key not in b.specs},
        {key: spec for key, spec in b.specs.items() if key not in a.specs},
        {key: pair for key, pair in pairs.items() if pair[0].shape != pair[1].shape},
        {key: pair for key, pair in pairs.items() if pair[0].dtype != pair[1].dtype},
        found,
        tuple(sorted(ties_a - ties_b)),
        tuple(sorted(ties_b - ties_a)),
        values,
        alike={key: a.specs[key] for key in alike},
    )


def _within(ties: Groups, keys: Container[str]) -> set[tuple[str, ...]]:
    groups = (tuple(sorted(name for name in names if name in keys)) for names in ties)
    return {names for names in groups if len(names) > 1}


def _spec_json(spec: TensorSpec) -> dict[str, object]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def _section(title: str, items: Mapping[str, Any], said: Any) -> Iterator[str]:
    if not items:
        return
    yield f"{title}: {len(items):,}"
    folded = fold_groups(items, label=lambda key: said(items[key]))
    for group in folded[:_SHOWN]:
        yield f"  {clipped(group.text, _WIDE)}  {said(items[group.first])}"
    if len(folded) > _SHOWN:
        yield f"  … and {len(folded) - _SHOWN} more patterns"
