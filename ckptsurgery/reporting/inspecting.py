"""What a checkpoint holds, for a reader: keys folded by runs of numbers, totals, ties, and everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold, fold_items
from ..many_objects import ById, gc_pause
from ..notebook_view import TextInNotebooks
from ..specs import TensorSpec
from ..tables.columns import cut, shown_numbers, table
from ..tables.totals import Total
from ..tables.trees import tree
from ..wording import brief, close_keys, counted, shown_bytes

if TYPE_CHECKING:
    from ..specs import Tie
    from ..storage import Checkpoint

__all__ = ["Inspection", "Line", "inspection"]


class Line(NamedTuple):
    """Keys of one shape and dtype that read as one: `layers.{0..31}.w`.

    Args:
        text: the keys, folded.
        spec: shape and dtype of each.
        times: how many keys.
    """

    text: str
    spec: TensorSpec
    times: int


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(TextInNotebooks):
    """The answer to "what is in this checkpoint?"; `str()` is a table 100 columns wide.

    Args:
        source: where it was read from.
        specs: shape and dtype by key, in the checkpoint's order.
        ties: groups of names that mean one tensor.
        extras: dotted path -> value of everything that is not a tensor of the model.
        metadata: the format's string metadata.
        config: the model's configuration, where one was found.
        unreadable: key -> kind of what was saved as a tensor and cannot be read.
        depth: levels of the tree that `str()` shows; without, it is a table.
        packed: key of a quantised weight's codes -> a description of the weight.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    ties: tuple[Tie, ...]
    extras: Mapping[str, Any]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    unreadable: Mapping[str, str] = field(default_factory=dict)
    depth: int | None = None
    packed: Mapping[str, str] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """How many elements there are, tied tensors counted once."""
        return self._whole().numel

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self._whole().nbytes

    def lines(self, fold: bool = True) -> list[Line]:
        """The keys, in the checkpoint's order; `fold=False` gives each a line."""
        if not fold:
            return list(map(Line, self.specs.keys(), self.specs.values(), repeat(1)))
        return [Line(group.text, self.specs[group.first], group.count) for group in fold_items(self.specs)]

    @gc_pause()
    def render(self, width: int = 100, *, fold: bool = True, as_tree: bool = False, depth: int | None = None) -> str:
        """The inspection as text of `width` columns; a key that is longer keeps its line to itself."""
        lines = self.lines(fold)
        body = tree(lines, width, depth) if as_tree or depth is not None else _rows(lines, width)
        return "\n".join([cut(self.source, width), "", *body, "", *self._summary(lines, width)])

    def __str__(self) -> str:
        return self.render(depth=self.depth)

    def __repr__(self) -> str:
        others = ((self.ties, "tie"), (self.extras, "extra"))
        counts = [counted(len(found), what) for found, what in others if found]
        return brief("Inspection", self.source, counted(len(self.specs), "tensor"), *counts)

    def _totals(self, lines: Iterable[Line]) -> dict[str, Total]:
        """Sums by dtype, tied names counted once."""
        totals: dict[str, Total] = {}
        for _, spec, times in lines:
            totals.setdefault(spec.dtype, Total()).add(spec, times)
        for tie in self.ties:
            spec = self.specs[tie.names[0]]
            totals[spec.dtype].add(spec, 1 - len(tie.names))
        return totals

    def _whole(self) -> Total:
        kinds = ById(self.specs.values())
        times = Counter(kinds.ids)
        return Total(self._totals(Line("", spec, times[n]) for n, spec in kinds.objects.items()).values())

    def _summary(self, lines: Iterable[Line], width: int) -> Iterator[str]:
        totals = self._totals(lines)
        yield from _section("tensors", [_said(Total(totals.values()), len(self.specs))], width)
        yield from _section("dtypes", [f"{dtype}: {_said(total)}" for dtype, total in totals.items()], width)
        yield from _section("packed", list(self._packed()), width)
        yield from _section("ties", [f"{' = '.join(tie.names)}  ({tie.kind})" for tie in self.ties], width)
        yield from _section("unread", [f"{key}: {why}" for key, why in self.unreadable.items()], width)
        yield from _section("extras", _pairs(self.extras), width)
        yield from _section("metadata", _pairs(self.metadata), width)
        if self.config is not None:
            entries = [f"{k}: {v}" for k, v in self.config.items() if isinstance(v, str | int | float)]
            yield from _section("config", [f"{counted(len(self.config), 'entry')} ({', '.join(entries)})"], width)

    def to_html(self, title: str = "inspect") -> str:
        """Make a page that shows the tensors as a tree with their bytes; it is one file that fetches nothing."""
        from .inspection_page import inspection_page  # pages are rare, and their parts are large

        facts = [self.source, counted(len(self.specs), "tensor")]
        facts += [counted(len(self.ties), "tie")] if self.ties else []
        about = {"unread": self.unreadable, "extras": self.extras, "metadata": self.metadata}
        return inspection_page(title, facts, self.specs, self.ties, {**about, "config": self.config or {}})

    def _packed(self) -> Iterator[str]:
        """The quantised weights of one kind, with their keys folded."""
        kinds: dict[str, list[str]] = {}
        for key, text in self.packed.items():
            kinds.setdefault(text, []).append(key)
        for text, keys in kinds.items():
            folded = fold(keys)
            more = f" and {len(folded) - 1} more" if len(folded) > 1 else ""
            yield f"{text}: {counted(len(keys), 'weight')}, {folded[0][0]}{more}"

    @gc_pause()
    def to_json(self) -> dict[str, object]:
        """The inspection as plain data, each tensor apart; sizes in bytes."""
        kinds, whole = ById(self.specs.values()), self._whole()
        facts = kinds.each(lambda spec: (spec.dtype, spec.shape, spec.nbytes))
        return {
            "source": self.source,
            "tensors": {
                key: {"dtype": dtype, "shape": list(shape), "nbytes": nbytes}
                for key, (dtype, shape, nbytes) in zip(self.specs, facts)
            },
            "parameters": whole.numel,
            "nbytes": whole.nbytes,
            "ties": [{"names": list(tie.names), "kind": tie.kind} for tie in self.ties],
            "unreadable": dict(self.unreadable),
            "packed": dict(self.packed),
            "extras": {path: _plain(value) for path, value in self.extras.items()},
            "metadata": dict(self.metadata),
            "config": None if self.config is None else dict(self.config),
        }


def inspection(checkpoint: Checkpoint, pattern: str | None = None) -> Inspection:
    """What a checkpoint holds; with `pattern`, only the keys it matches and what lies below the modules it matches.

    Raises:
        CheckpointError: nothing matches the pattern.
        RecipeError: the pattern does not parse.
    """
    specs: Mapping[str, TensorSpec] = checkpoint.specs
    ties = checkpoint.ties
    if pattern is not None:
        specs = _selected(specs, pattern, checkpoint.source)
        kept = (tuple(name for name in tie.names if name in specs) for tie in ties)
        ties = tuple(replace(tie, names=names) for tie, names in zip(ties, kept, strict=True) if len(names) > 1)
    lost = checkpoint.unreadable
    extras = {path: value for path, value in checkpoint.extras.items() if path not in lost}
    facts = (checkpoint.metadata, checkpoint.config, lost)
    return Inspection(checkpoint.source, specs, ties, extras, *facts, packed=_packed_in(checkpoint, specs))


_CODED = ("F8", "F4", "I8", "U8", "I32")
"""Dtypes of codes, as `planning.packed_weights` has them; that is imported where there are such tensors."""


def _packed_in(checkpoint: Checkpoint, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
    """Key of a quantised weight's codes -> a description of the weight."""
    if not any(spec.dtype.startswith(_CODED) for spec in set(specs.values())):
        return {}
    from ..running.dequantising import packed_in

    return {key: weight.text for key, weight in packed_in(checkpoint, specs).items()}


def _selected(specs: Mapping[str, TensorSpec], pattern: str, source: str) -> dict[str, TensorSpec]:
    from ..language.keys import KeyPattern

    wanted = [KeyPattern.parse(pattern)]
    if not pattern.endswith("...}"):
        wanted += [KeyPattern.parse(pattern + separator + "{below...}") for separator in "./"]
    found = {key: spec for key, spec in specs.items() if any(p.readings(key) for p in wanted)}
    if not found:
        parents = {key[:end] for key in specs for end, sign in enumerate(key) if sign in "./"}
        near = close_keys(pattern, sorted(parents | specs.keys()), 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise CheckpointError(
            Diagnostic(
                "no-such-keys",
                f"none of {counted(len(specs), 'key')} matches {pattern!r}",
                source,
                notes=tuple(text for text, _ in fold(specs)[:6]),
                help=f"{meant}a pattern matches whole keys, such as 'layers.{{i}}.{{rest...}}'",
            )
        )
    return found


def _rows(lines: list[Line], width: int) -> list[str]:
    rows = [
        (text, str(spec), f"x{times}" if times > 1 else "", shown_bytes(spec.nbytes * times))
        for text, spec, times in lines
    ]
    return table(rows, "<<>>", width)


def _said(total: Total, names: int | None = None) -> str:
    """A sum in words; `names` where they may be more than the tensors."""
    apart = f" ({total.count:,} distinct)" if names not in (None, total.count) else ""
    tensors = counted(total.count if names is None else names, "tensor")
    return f"{tensors}{apart}, {shown_numbers(total.numel)}, {shown_bytes(total.nbytes)}"


def _section(title: str, items: list[str], width: int) -> Iterator[str]:
    for i, item in enumerate(items):
        yield cut(f"{title if i == 0 else '':<10}{item}", width)


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"{path}: {_plain(value)}" for path, value in values.items()]


def _plain(value: Any) -> Any:
    """A value that JSON can hold: itself, or what it is."""
    if isinstance(value, int) and value.bit_length() > 1 << 10:
        return f"an integer of {value.bit_length()} bits"  # too long to be spelt
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
