"""The ledger of a run: one line for every tensor of either side, and a summary that a person reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from ..errors import Diagnostic
from ..language.folding import fold_groups
from ..notebook_view import TextInNotebooks
from ..specs import TensorSpec
from ..wording import brief, clipped, counted

__all__ = ["Proof", "Report", "ReportEntry"]

ACTIONS = ("loaded", "initialised", "kept", "tied", "missing", "dropped", "unexpected")


class ReportEntry(NamedTuple):
    """One line of the ledger.

    Args:
        key: of the target; of the source for what was dropped or unexpected.
        action: one of "loaded", "initialised", "kept", "tied", "missing", "dropped", "unexpected".
        spec: shape and dtype after the action.
        sources: the source keys behind it.
        by: the rule, initialiser, tie or line that decided it.
        cast: `(from, to)` where the dtype changed.
    """

    key: str
    action: str
    spec: TensorSpec | None = None
    sources: tuple[str, ...] = ()
    by: str = ""
    cast: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The line as plain data."""
        return {
            "key": self.key,
            "action": self.action,
            "shape": list(self.spec.shape) if self.spec else None,
            "dtype": self.spec.dtype if self.spec else None,
            "sources": list(self.sources),
            "by": self.by,
            "cast": list(self.cast) if self.cast else None,
        }


@dataclass(frozen=True, slots=True)
class Proof:
    """What reading back proved of the tensors that one rule made.

    Args:
        rule: its text; several where one recipe went on from another.
        how: "copied", "moved" (rearranged) or "computed".
        tensors, elements, nbytes: how many were compared.
        proof: what was found equal to what.
        fingerprint: of all elements whatever their order, the same in source and output; where the rule moved each
            element of its sources once.
    """

    rule: str
    how: str
    tensors: int
    elements: int
    nbytes: int
    proof: str
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The proof as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return f"{self.how:<8} {_columns(self.tensors, self.elements)}  {self.proof}: {self.rule}"


def _columns(tensors: int, elements: int) -> str:
    return f"{counted(tensors, 'tensor'):>14}  {counted(elements, 'element'):>24}"


@dataclass(frozen=True, repr=False)
class Report(TextInNotebooks):
    """The result of a load or a save, tensor by tensor.

    Args:
        ledger: one entry for each tensor.
        source, target: what was read and what was filled, for people.
        notes: what a person should know besides: prefixes taken off, assumed splits.
        files: what was written.
        bytes_read, bytes_written: as they happened.
        proofs: what reading the output back proved, rule by rule, where that was asked for.
    """

    ledger: tuple[ReportEntry, ...]
    source: str = ""
    target: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()
    files: tuple[str, ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0
    proofs: tuple[Proof, ...] = ()

    def keys(self, action: str) -> tuple[str, ...]:
        """Return the keys of one action, such as `"kept"`, in the ledger's order."""
        return tuple(e.key for e in self.ledger if e.action == action)

    @cached_property
    def loaded(self) -> tuple[str, ...]:
        """Target keys that hold values of the source."""
        return self.keys("loaded")

    @cached_property
    def initialised(self) -> tuple[str, ...]:
        """Target keys that were initialised anew."""
        return self.keys("initialised")

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Target keys that stay as the model built them."""
        return self.keys("kept")

    @cached_property
    def tied(self) -> tuple[str, ...]:
        """Target keys that share the tensor of another one."""
        return self.keys("tied")

    @cached_property
    def cast(self) -> tuple[str, ...]:
        """Target keys whose dtype changed on the way."""
        return tuple(e.key for e in self.ledger if e.cast)

    @cached_property
    def dropped(self) -> tuple[str, ...]:
        """Source keys left out on purpose."""
        return self.keys("dropped")

    @cached_property
    def missing_keys(self) -> tuple[str, ...]:
        """Target keys that nothing filled."""
        return self.keys("missing")

    @cached_property
    def unexpected_keys(self) -> tuple[str, ...]:
        """Source keys that found no place."""
        return self.keys("unexpected")

    @cached_property
    def coverage(self) -> float:
        """Share of the target's elements that hold values of the source, tied ones counted once; 0 to 1."""
        sides = [e for e in self.ledger if e.action in ("loaded", "initialised", "kept", "missing") and e.spec]
        total = sum(e.spec.numel for e in sides if e.spec)
        loaded = sum(e.spec.numel for e in sides if e.spec and e.action == "loaded")
        return loaded / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        counts = self._counts()
        return {
            "source": self.source,
            "target": self.target,
            "coverage": self.coverage,
            "counts": {action: counts[action] for action in ACTIONS} | {"cast": len(self.cast)},
            "notes": list(self.notes),
            "warnings": [w.to_json() for w in self.warnings],
            "files": list(self.files),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "proofs": [p.to_json() for p in self.proofs],
            "ledger": [e.to_json() for e in self.ledger],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        counts = self._counts()
        shown = [f"{counts[action]} {action}" for action in ACTIONS if counts[action]]
        return brief("Report", f"{clipped(self.source)} -> {clipped(self.target)}", *(shown or ["nothing"]))

    def _counts(self) -> Counter[str]:
        return Counter(map(attrgetter("action"), self.ledger))

    def _lines(self) -> Iterable[str]:
        yield f"{self.source} -> {self.target}: {self._headline()}"
        by_action: dict[str, list[ReportEntry]] = {action: [] for action in ACTIONS}
        for e in self.ledger:
            by_action[e.action].append(e)
        for action, entries in by_action.items():
            if not entries:
                continue
            numel = sum(e.spec.numel for e in entries if e.spec)
            shown = "written" if self.files and action == "loaded" else action
            yield f"  {shown:<12} {_columns(len(entries), numel)}"
            if action != "loaded":
                yield from self._folded(entries)
        if self.cast:
            kinds: dict[str, int] = {}
            for e in self.ledger:
                if e.cast:
                    kinds[" -> ".join(e.cast)] = kinds.get(" -> ".join(e.cast), 0) + 1
            how = ", ".join(f"{kind} ({n})" for kind, n in kinds.items())
            yield f"  {'cast':<12} {counted(len(self.cast), 'tensor'):>14}  {how}"
        for proof in self.proofs[:16]:
            yield f"  proved  {proof}"
        if len(self.proofs) > 16:
            yield f"  proved  … and {len(self.proofs) - 16} more rules"
        for note in self.notes:
            yield f"  note: {note}"
        for warning in self.warnings:
            yield f"  {warning.severity}: {warning.headline}"
            if warning.remedies and warning.help:
                yield f"    help: {warning.help}"

    def _headline(self) -> str:
        if self.files:
            return f"{counted(len(self.files), 'file')}, {self.bytes_written:,} bytes of tensors"
        if self.coverage == 1:
            return "all of the model's elements loaded"
        # cut off, not rounded: 100.0% would say that nothing is left
        return f"{math.floor(1000 * self.coverage) / 10}% of the model's elements loaded"

    def _folded(self, entries: list[ReportEntry]) -> Iterable[str]:
        by_key = {e.key: e for e in entries}
        folded = fold_groups(by_key, label=lambda k: (by_key[k].spec, by_key[k].by))
        for group in folded[:16]:
            entry = by_key[group.first]
            by = entry.by if entry.by != group.text else ""  # a pattern that is the key says nothing more
            yield "    " + "  ".join(t for t in (clipped(group.text, 200), str(entry.spec or ""), by) if t)
        if len(folded) > 16:
            yield f"    … and {len(folded) - 16} more patterns"
