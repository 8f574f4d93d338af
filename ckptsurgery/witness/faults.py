"""The ways in which a tensor of a model can be wrong after a load, and how they are reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Diagnostic, LoadError, Remedy
from ..language.covering import exact_paths
from ..language.folding import fold_groups
from ..planning.report import Report
from ..specs import TensorSpec
from ..wording import counted

__all__ = ["Fault", "NotAsPlanned", "diagnostics_of"]


@dataclass(frozen=True)
class Fault:
    """One tensor that is not what the source says.

    Args:
        key: its name in the model.
        kind: the code of the diagnostic, one of `KINDS`.
        text: what it holds instead.
        spec: its shape and dtype.
        sources: the source keys that should be there.
    """

    key: str
    kind: str
    text: str = ""
    spec: TensorSpec | None = None
    sources: tuple[str, ...] = ()


KINDS: Mapping[str, tuple[str, str, str]] = {
    "never-loaded": ("is", "not loaded: nothing in the source fills them", "keep"),
    "left-as-built": ("holds", "first values instead of the source's", "load"),
    "shape-differs": ("has", "another shape than the source", "keep"),
    "holds-another": ("holds", "the values of another tensor", "load"),
    "rearranged": ("holds", "the source's values in another arrangement", "recipe"),
    "partly-loaded": ("holds", "only a part of the source's values", "load"),
    "rounded": ("holds", "values that went through a narrower dtype", "load"),
    "cast": ("has", "a dtype that cannot hold the source exactly", "dtype"),
    "unscaled-codes": ("has", "quantised codes for a source, which nothing scales", "recipe"),
    "overlapping": ("shares", "some memory with another tensor", "load"),
    "untied": ("is", "not tied, and should be", "tie"),
    "no-data": ("is", "on the meta device, without data", "load"),
    "buffer-differs": ("is", "not what the module computes, and in no file", "keep"),
    "other-values": ("holds", "other values than the source", "load"),
}
"""Code -> the verb and the rest of the headline, and what settles it."""

_ADVICE = {
    "load": "cs.load_into(model, source) loads and accounts for every tensor",
    "recipe": "a recipe says how the source is arranged; `ckptsurgery suggest` infers one",
}


class NotAsPlanned(LoadError):
    """A model does not hold what its source says.

    `.faults` lists every wrong tensor; `.report` accounts for all of them, the right ones too.
    """

    def __init__(self, diagnostics: Sequence[Diagnostic], faults: Sequence[Fault], report: Report) -> None:
        super().__init__(diagnostics)
        self.faults = tuple(faults)
        self.report = report


def diagnostics_of(faults: Iterable[Fault], known: Iterable[str]) -> list[Diagnostic]:
    """Return one diagnostic for each kind of fault, the keys folded.

    >>> spec = TensorSpec([2], "F32")
    >>> print(diagnostics_of([Fault("fc.bias", "never-loaded", "", spec)], ["fc.bias", "fc.weight"])[0])
    error[never-loaded]: 1 model tensor is not loaded: nothing in the source fills them
       fc.bias  F32 [2]
     = help: keep=["fc.bias"] accepts it as built

    Args:
        known: all names of the model, so that a path in a remedy covers the wrong ones alone.
    """
    by_kind: dict[str, list[Fault]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    names = list(known)
    return [_diagnostic(kind, by_kind[kind], names) for kind in KINDS if kind in by_kind]


def _diagnostic(kind: str, faults: Sequence[Fault], known: Sequence[str]) -> Diagnostic:
    verb, headline, settled = KINDS[kind]
    of = {fault.key: fault for fault in faults}
    groups = fold_groups(of, label=lambda key: (of[key].spec, of[key].text))
    lines = ["  ".join(t for t in (g.text, str(of[g.first].spec or ""), of[g.first].text) if t) for g in groups]
    more = (f"… and {len(lines) - 12} more patterns",) if len(lines) > 12 else ()
    keys = list(of)
    remedies: tuple[Remedy, ...] = ()
    if settled == "keep":
        remedies = (Remedy("keep", exact_paths(keys, known), "accepts it as built"),)
    elif settled == "dtype":
        remedies = (Remedy("dtype", "model", "accepts the model's own"),)
    elif settled == "tie":
        remedies = (Remedy("untied", keys, "says that it is meant"),)
    return Diagnostic(
        kind,
        f"{counted(len(keys), 'model tensor', verb)} {headline}",
        notes=(*lines[:12], *more),
        remedies=remedies,
        advice=_ADVICE.get(settled),
    )
