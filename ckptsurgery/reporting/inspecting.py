"""What a checkpoint holds, for a reader: keys folded by runs of numbers, totals, ties, and all that is no tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold_groups
from ..language.keys import KeyPattern
from ..specs import TensorSpec
from .tables import cut, shown_bytes, shown_count, table
from .trees import tree

if TYPE_CHECKING:
    from ..storage import Checkpoint, Tie

__all__ = ["Inspection", "Line", "inspection"]


@dataclass(frozen=True, slots=True)
class Line:
    """Keys of one shape and dtype that read as one: `layers.{0..31}.w`.

    Args:
        text: the keys, folded.
        spec: shape and dtype of each.
        count: how many keys.
    """

    text: str
    spec: TensorSpec
    count: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer to "what is in this checkpoint?"; `str()` is a table 100 columns wide.

    Args:
        source: where it was read from.
        specs: shape and dtype by key, in the checkpoint's order.
        ties: groups of names that mean one tensor.
        extras: dotted path -> value of what is no tensor of the model.
        metadata: the format's string metadata.
        config: the model's configuration, where one was found.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    ties: tuple[Tie, ...]
    extras: Mapping[str, Any]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None

    @property
    def distinct(self) -> dict[str, TensorSpec]:
        """The tensors, tied ones once."""
        repeated = {name for tie in self.ties for name in tie.names[1:]}
        if not repeated:
            return dict(self.specs)
        return {key: spec for key, spec in self.specs.items() if key not in repeated}

    def lines(self, fold: bool = True) -> list[Line]:
        """The keys, in the checkpoint's order; `fold=False` gives each a line."""
        if not fold:
            return [Line(key, spec, 1) for key, spec in self.specs.items()]
        groups = fold_groups(self.specs, label=self.specs.__getitem__)
        return [Line(group.text, self.specs[group.first], group.count) for group in groups]

    def render(self, width: int = 100, *, fold: bool = True, as_tree: bool = False) -> str:
        """The inspection as text of `width` columns; a key that is longer keeps its line to itself."""
        lines = self.lines(fold)
        body = tree([(line.text, line.spec, line.count) for line in lines], width) if as_tree else _rows(lines, width)
        return "\n".join([cut(self.source, width), "", *body, "", *self._summary(width)])

    def __str__(self) -> str:
        return self.render()

    def _summary(self, width: int) -> Iterator[str]:
        distinct = self.distinct
        yield from _section("tensors", [_totals(len(self.specs), len(distinct), _counted(distinct.values()))], width)
        by_dtype: dict[str, dict[TensorSpec, int]] = {}
        for spec, count in _counted(distinct.values()).items():
            by_dtype.setdefault(spec.dtype, {})[spec] = count
        rows = [(dtype, sum(counts.values()), counts) for dtype, counts in by_dtype.items()]
        yield from _section("dtypes", [f"{dtype}: {_totals(n, n, counts)}" for dtype, n, counts in rows], width)
        yield from _section("ties", [f"{' = '.join(tie.names)}  ({tie.kind})" for tie in self.ties], width)
        yield from _section("extras", _pairs(self.extras), width)
        yield from _section("metadata", _pairs(self.metadata), width)
        if self.config is not None:
            entries = [f"{k}: {v}" for k, v in self.config.items() if isinstance(v, str | int | float)]
            yield from _section("config", [f"{len(self.config)} entries ({', '.join(entries)})"], width)

    def to_json(self) -> dict[str, object]:
        """The inspection as plain data, each tensor apart; sizes in bytes."""
        return {
            "source": self.source,
            "tensors": {
                key: {"dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
                for key, spec in self.specs.items()
            },
            "parameters": sum(spec.numel for spec in self.distinct.values()),
            "nbytes": sum(spec.nbytes for spec in self.distinct.values()),
            "ties": [{"names": list(tie.names), "kind": tie.kind} for tie in self.ties],
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
        ties = tuple(tie for tie, names in zip(ties, kept, strict=True) if len(names) == len(tie.names))
    return Inspection(checkpoint.source, specs, ties, checkpoint.extras, checkpoint.metadata, checkpoint.config)


def _selected(specs: Mapping[str, TensorSpec], pattern: str, source: str) -> dict[str, TensorSpec]:
    wanted = [KeyPattern.parse(pattern)]
    if not pattern.endswith("...}"):
        wanted += [KeyPattern.parse(pattern + separator + "{below...}") for separator in "./"]
    found = {key: spec for key, spec in specs.items() if any(p.readings(key) for p in wanted)}
    if not found:
        raise CheckpointError(
            Diagnostic(
                "no-such-keys",
                f"none of the {len(specs)} keys matches {pattern!r}",
                source,
                notes=tuple(group.text for group in fold_groups(specs)[:6]),
                help="a pattern matches whole keys: --filter 'layers.{i}.{rest...}'",
            )
        )
    return found


def _rows(lines: list[Line], width: int) -> list[str]:
    rows = []
    for line in lines:
        times = f"x{line.count}" if line.count > 1 else ""
        rows.append((line.text, str(line.spec), times, shown_bytes(line.spec.nbytes * line.count)))
    return table(rows, "<<>>", width)


def _counted(specs: Iterable[TensorSpec]) -> dict[TensorSpec, int]:
    """How often each spec occurs; most tensors share theirs with many."""
    found = list(specs)
    objects = {id(spec): spec for spec in found}
    counts: dict[TensorSpec, int] = {}
    for number, count in Counter(map(id, found)).items():
        counts[objects[number]] = counts.get(objects[number], 0) + count
    return counts


def _totals(names: int, distinct: int, specs: Mapping[TensorSpec, int]) -> str:
    counted = f"{names} tensor{'s' if names != 1 else ''}" + (f" ({distinct} distinct)" if distinct != names else "")
    numel = sum(spec.numel * count for spec, count in specs.items())
    nbytes = sum(spec.nbytes * count for spec, count in specs.items())
    return f"{counted}, {shown_count(numel)} numbers, {shown_bytes(nbytes)}"


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
