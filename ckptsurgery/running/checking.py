"""Proving an output by reading it back, before it takes its place.

What each proof covers: bytes that only change their name are compared with the source's, one by one. Rearranged
elements are compared with the source's, each at the place that the plan gives it, by views of both files, which is not
the way they were written; and for each rule a fingerprint of all elements, which knows nothing of places, shows that
each is there exactly once. Values that an op made are made again and compared: this finds what the disk or the memory
did to them, and not an op that is wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold
from ..narrowing import present
from ..planning.costing import BUDGET, REGION
from ..planning.plan import Plan
from ..planning.report import Proof
from ..planning.steps import Step
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..wording import counted
from .conserving import conserves, total_of
from .executor.execution import execute
from .executor.strided_views import Elements, equal_at, has_views
from .progress import ByteBar
from .sinks.comparing import WrittenSink

__all__ = ["check_output"]

_MAPPED = 64
Moved = Callable[[int], object]


def check_output(
    plan: Plan,
    checkpoint: Checkpoint,
    written: Checkpoint,
    aliases: Mapping[str, str],
    progress: bool | None = None,
    budget: int = BUDGET,
) -> tuple[Proof, ...]:
    """Prove that a written checkpoint is what the plan makes of its source; what was proved, rule by rule.

    The files are dropped from the page cache first, where the system allows it, so that the disk answers. Memory does
    not grow with the tensors that are moved; an op that wants whole tensors gets them, as it did when they were made.

    Args:
        aliases: names that share the tensor of another.
        budget: bytes that tasks may hold together.

    Raises:
        CheckpointError: the output differs: in its keys, shapes, dtypes, ties, bytes or elements; all of it at once.
    """
    _forget(written.files)
    problems = _headers(plan, written, aliases)
    if problems:
        raise CheckpointError(problems)
    total = sum(spec.nbytes for key, spec in plan.specs.items() if key not in aliases)
    with ByteBar(total, "checking", progress) as bar:
        check = _Check(checkpoint, written, aliases, bar)
        proofs = [check.of(plan, rule, how, steps, budget) for rule, how, steps in _by_rule(plan, aliases)]
    for code, text, keys in (
        ("values-differ", "not what the plan makes", check.wrong),
        ("elements-differ", "not the elements of their sources, each once", check.lost),
    ):
        if keys:
            problems.append(_problem(code, text, list(dict.fromkeys(keys)), written.source))
    if problems:
        raise CheckpointError(problems)
    return tuple(proofs)


def _by_rule(plan: Plan, aliases: Mapping[str, str]) -> Iterator[tuple[tuple[int, ...], str, list[Step]]]:
    """The steps that write something, by rule and by what is to be proved of them."""
    found: dict[tuple[tuple[int, ...], str], list[Step]] = {}
    for step in plan.steps:
        if not all(key in aliases for key in step.targets):
            found.setdefault((step.rules, _HOW[step.kind]), []).append(step)
    for (numbers, how), steps in found.items():
        yield numbers, how, steps


_HOW = {"copy": "copied", "move": "moved", "compute": "computed"}
_WHAT = {
    "copied": "equal bytes",
    "moved": "equal at every place",
    "computed": "made again, equal bytes",
}
_ONCE = ", each element of the sources once"


@dataclass
class _Check:
    """What is compared, and the keys that failed."""

    checkpoint: Checkpoint
    written: Checkpoint
    aliases: Mapping[str, str]
    compared: Moved

    def __post_init__(self) -> None:
        self.wrong: list[str] = []
        self.lost: list[str] = []

    def of(self, plan: Plan, rule: Sequence[int], how: str, steps: Sequence[Step], budget: int) -> Proof:
        """Compare what a rule made, in one of the three ways."""
        keys = [key for step in steps for key in step.targets if key not in self.aliases]
        fingerprint = None
        if how == "moved":
            self._moved([s for s in steps if has_views(s.program)])
            self._made_again([s for s in steps if not has_views(s.program)], budget)
            fingerprint = self._conserved(steps)
        else:
            self._made_again(steps, budget)
        specs = [self.written.specs[key] for key in keys]
        return Proof(
            "  then  ".join(plan.uses[n].text for n in rule),
            how,
            len(keys),
            sum(spec.numel for spec in specs),
            sum(spec.nbytes for spec in specs),
            _WHAT[how] + (_ONCE if fingerprint is not None else ""),
            fingerprint,
        )

    def _moved(self, steps: Sequence[Step]) -> None:
        """Every element of a rearrangement, through views of both sides."""
        for step in steps:
            layout = present(step.program.moves, "the rearrangement of a step that only moves")
            source = lru_cache(_MAPPED)(partial(Elements.of, self.checkpoint))
            for number, key in enumerate(step.targets):
                if key in self.aliases:
                    continue
                made, size = Elements.of(self.written, key), DTYPES[step.program.outputs[number].dtype].itemsize
                for piece in layout.into(number):
                    if not equal_at(source(step.sources[piece.source]), made, piece):
                        self.wrong.append(key)
                        break
                    self.compared(piece.numel * size)

    def _conserved(self, steps: Sequence[Step]) -> str | None:
        """The fingerprint of what a rule's steps moved, where each moves every element of its sources once."""
        if not all(conserves(s.program) and not any(key in self.aliases for key in s.targets) for s in steps):
            return None
        both = [(total_of(self.checkpoint, step.sources), total_of(self.written, step.targets), step) for step in steps]
        self.lost += [key for before, after, step in both if before != after for key in step.targets]
        return f"{sum(before for before, _, _ in both) % (1 << 64):016x}"

    def _made_again(self, steps: Sequence[Step], budget: int) -> None:
        """Carry steps out once more, and compare what comes with what was written."""
        if steps:
            keys = [key for step in steps for key in step.targets if key not in self.aliases]
            sink = WrittenSink(self.written, keys)
            execute(steps, self.checkpoint, sink, self.compared, budget=budget, region=min(REGION, budget))
            self.wrong += [key for key in keys if key in sink.wrong]


def _forget(files: Iterable[str]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _headers(plan: Plan, written: Checkpoint, aliases: Mapping[str, str]) -> list[Diagnostic]:
    specs = {**plan.specs, **{alias: plan.specs[base] for alias, base in aliases.items()}}
    group = {name: number for number, tie in enumerate(written.ties) for name in tie.names}
    found = (
        ("keys-missing", "missing", [k for k in specs if k not in written.specs]),
        ("keys-unexpected", "unexpected", [k for k in written.specs if k not in specs]),
        ("specs-differ", "of another shape or dtype", [k for k, s in specs.items() if written.specs.get(k, s) != s]),
        (
            "ties-lost",
            "no longer tied",
            [a for a, b in aliases.items() if specs[a].numel and group.get(a, a) != group.get(b, b)],
        ),
    )
    return [_problem(code, text, keys, written.source) for code, text, keys in found if keys]


def _problem(code: str, text: str, keys: list[str], path: str) -> Diagnostic:
    return Diagnostic(
        f"check-{code}",
        f"{counted(len(keys), 'output key', 'is')} {text}",
        path,
        notes=tuple(t for t, _ in fold(keys)[:8]),
        help="nothing was put in place; the disk or the memory is failing, or something else wrote to it",
    )
