"""The names of a source in the model's own layout: prefixes, wrapper segments and respellings, no more.

Nothing is guessed from a list of names. A prefix is taken off, put on or replaced when the other side shows the keys
without it. Inside of a name a segment is taken out only where it is an only child (see `only_children`), the other
side shows the name without it, and no other key comes to bear that name. A name that both sides have is never touched.

A respelling is what PyTorch itself renamed, or the other spelling of a norm's scale and shift. It is used only when the
target shows it: the other name exists there, with this shape, and nothing else fills it. Names are compared by whole
segments, so a `weight_gate` is never taken for a `weight_g`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import Diagnostic, LoadError, Remedy
from ..language.captures import escape
from ..language.folding import fold
from ..planning.naming import dropped_keys
from ..planning.only_children import OnlyChildren, Wrappers, candidates, may_replace
from ..planning.plan import Plan, renaming
from ..specs import TensorSpec
from ..wording import counted

__all__ = ["Alignment", "OwnNames", "align", "own_names", "respelled"]

_MOST_SAMPLED = 2048
Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Alignment:
    """A pair of prefixes, and how much it explains.

    Args:
        source, target: prefixes that end in their separator, or "".
        matched: source key -> target key, for all keys that it brings together.
        equal: how many of these have equal shapes.
        bare: source key -> its name without the wrappers inside of it, where these were taken out.
        wrapped: target key without wrappers -> target key, where they were.
    """

    source: str
    target: str
    matched: Mapping[str, str]
    equal: int
    bare: Mapping[str, str] = field(default_factory=dict)
    wrapped: Mapping[str, str] = field(default_factory=dict)

    @property
    def score(self) -> tuple[int, int, int]:
        """Better first: equal shapes, equal names, then short prefixes."""
        return self.equal, len(self.matched), -len(self.source) - len(self.target)

    def name(self, key: str) -> str:
        """The name in the target that a source key stands for, whether or not the target has it."""
        found = self.matched.get(key)
        if found is not None:
            return found
        bare = self.bare.get(key, key)
        moved = self.target + bare[len(self.source) :] if bare.startswith(self.source) else bare
        return self.wrapped.get(moved, moved)

    @property
    def notes(self) -> list[str]:
        """The changes to the names, for people."""
        notes = [str(self)] if self.source or self.target else []
        wrapped = set(self.wrapped.values())
        changed = {k: n for k, n in self.matched.items() if k in self.bare or n in wrapped}
        if changed:
            key, name = next(iter(changed.items()))
            some = list(changed.items())[:: len(changed) // _MOST_SAMPLED + 1]
            gone = _folded(s for k, n in some for s in _extra(k[len(self.source) :], n[len(self.target) :]))
            put = _folded(s for k, n in some for s in _extra(n[len(self.target) :], k[len(self.source) :]))
            what = [f"{names} {done}" for names, done in ((gone, "taken out"), (put, "put in")) if names]
            which = f"{counted(len(changed), 'key')}, such as {key!r} for {name!r}"
            notes.append(f"wrapper {' and '.join(what)} inside of {which}")
        return notes

    def __str__(self) -> str:
        if self.source and self.target:
            return f"prefix {self.source!r} read as {self.target!r}"
        return f"prefix {self.source!r} taken off" if self.source else f"prefix {self.target!r} put on"


def align(source: Specs, target: Specs) -> tuple[Alignment, list[Alignment]]:
    """The alignment that explains most, and its rivals: others that explain as much from other keys.

    >>> a = {"module.fc.weight": TensorSpec([2, 2], "F32"), "module.fc.bias": TensorSpec([2], "F32")}
    >>> b = {"fc.weight": TensorSpec([2, 2], "F32"), "fc.bias": TensorSpec([2], "F32")}
    >>> best, rivals = align(a, b)
    >>> str(best), rivals
    ("prefix 'module.' taken off", [])
    """
    plain = _aligned("", "", source, target)
    if plain.equal == len(source):
        return plain, []  # no prefix can bring more together
    best, rivals = _by_prefix(source, target, plain)
    if len(best.matched) in (len(source), len(target)):
        return best, rivals
    return _unwrapped(source, target, best, rivals)


def _by_prefix(source: Specs, target: Specs, plain: Alignment) -> tuple[Alignment, list[Alignment]]:
    """The best pair of prefixes, which may be none, and its rivals; `plain` is without any."""
    found = [_aligned(a, b, source, target) for a, b in _candidates(source, target)]
    good = [f for f in found if f.equal and _shown(f, source, target)]
    best = max([plain, *good], key=lambda f: f.score)
    if not best.source and not best.target:
        return plain, []
    rivals = [f for f in good if f is not best and _rivals(f, best)]
    return best, rivals


def _unwrapped(
    source: Specs, target: Specs, best: Alignment, rivals: list[Alignment]
) -> tuple[Alignment, list[Alignment]]:
    """The alignment with wrappers taken out as well, where that brings more keys together; else what was found."""
    mine, theirs = OnlyChildren(source), OnlyChildren(target)
    known, before = Wrappers(), -1
    while before < best.equal:  # what is left once one wrapper is out may show another
        before = best.equal
        taken = set(best.matched.values())
        left = [k for k in source if k not in best.matched]
        for more in candidates(mine, theirs, left, [k for k in target if k not in taken]):
            if may_replace(more):
                found, others = _bare(source, target, mine, theirs, known | more)
                if found.equal > best.equal:
                    known, best, rivals = known | more, found, others
    return best, rivals


def _bare(
    source: Specs, target: Specs, mine: OnlyChildren, theirs: OnlyChildren, wrappers: Wrappers
) -> tuple[Alignment, list[Alignment]]:
    """The alignment of the names without wrappers, said in the names as they are; a key that fits as it is stays."""
    bare = _one_to_one({k: mine.bare(k, wrappers.source) for k in source})
    wrapped = {b: k for k, b in _one_to_one({k: theirs.bare(k, wrappers.target) for k in target}).items()}
    one, two = {b: source[k] for k, b in bare.items()}, {b: target[k] for b, k in wrapped.items()}
    found, rivals = _by_prefix(one, two, _aligned("", "", one, two))
    a, b = found.source, found.target
    plain = {k: b + k[len(a) :] for k in source if k.startswith(a) and b + k[len(a) :] in target}
    taken = set(plain.values())
    matched = {k: wrapped[found.matched[n]] for k, n in bare.items() if n in found.matched}
    whole = plain | {k: t for k, t in matched.items() if k not in plain and t not in taken}
    equal = sum(source[k].shape == target[t].shape for k, t in whole.items())
    inside = {k: n for k, n in bare.items() if n != k and k not in plain}
    around = {n: k for n, k in wrapped.items() if n != k}
    return Alignment(a, b, whole, equal, inside, around), rivals


def _one_to_one(names: Mapping[str, str]) -> dict[str, str]:
    """Those of the new names that one key alone comes to bear."""
    uses = Counter(names.values())
    return {k: n for k, n in names.items() if uses[n] == 1}


def _extra(name: str, other: str) -> list[str]:
    """Segments of a name that another one has fewer of."""
    return list((Counter(name.split(".")) - Counter(other.split("."))).elements())


def _folded(segments: Iterable[str]) -> str:
    return " and ".join(map(repr, dict.fromkeys(segments)))


def _aligned(a: str, b: str, source: Specs, target: Specs) -> Alignment:
    matched = {k: b + k[len(a) :] for k in source if k.startswith(a) and b + k[len(a) :] in target}
    equal = sum(source[k].shape == target[t].shape for k, t in matched.items())
    return Alignment(a, b, matched, equal)


def _shown(found: Alignment, source: Specs, target: Specs) -> bool:
    """Whether there is evidence enough: a prefix that is replaced needs more of it than one that is taken off."""
    mine = sum(k.startswith(found.source) for k in source)
    theirs = sum(k.startswith(found.target) for k in target)
    share = max(len(found.matched) / mine, len(found.matched) / theirs)
    if found.source and found.target:
        deep = any(k.count(".", len(found.source)) for k in found.matched)
        return share >= 0.5 and found.equal >= 3 and deep
    return share >= 0.5 or found.equal >= 8


def _rivals(other: Alignment, best: Alignment) -> bool:
    """Whether another alignment explains the same from other keys (student and teacher), or into other keys."""
    if len(other.matched) < 0.9 * len(best.matched) or other.equal < 0.5 * best.equal:
        return False
    apart = not (other.matched.keys() & best.matched.keys())
    into_others = not (set(other.matched.values()) & set(best.matched.values()))
    return apart != into_others


def _candidates(source: Specs, target: Specs) -> Iterator[tuple[str, str]]:
    """Pairs of prefixes that are left over when two keys end alike, most frequent first."""
    tree = _Suffixes(target)
    votes: Counter[tuple[str, str]] = Counter()
    keys = list(source)
    step = max(1, len(keys) // _MOST_SAMPLED)
    for key in keys[::step]:
        for other in tree.nearest(key):
            a, b = _leftover(key, other)
            votes[(a, b)] += 1
    votes.pop(("", ""), None)
    for pair, _ in votes.most_common(32):
        yield pair


class _Suffixes:
    """Keys by their last segments, to find those that share the longest end with another key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.by_suffix: dict[str, list[str]] = {}
        for key in keys:
            at = len(key)
            while at > 0:
                at = key.rfind(".", 0, at)
                self.by_suffix.setdefault(key[at + 1 :], []).append(key)

    def nearest(self, key: str, most: int = 4) -> list[str]:
        """Keys that share the longest end, whole segments; none when they are too many to tell."""
        at = -1
        while True:
            found = self.by_suffix.get(key[at + 1 :])
            if found is not None:
                exact = [k for k in found if k == key[at + 1 :]]
                rest = exact or found
                return rest if len(rest) <= most else []
            at = key.find(".", at + 1)
            if at < 0:
                return []


def _leftover(key: str, other: str) -> tuple[str, str]:
    a, b = key.split("."), other.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return "".join(s + "." for s in a[: len(a) - same]), "".join(s + "." for s in b[: len(b) - same])


_LEAVES = (
    (("weight_g",), ("parametrizations", "weight", "original0")),
    (("weight_v",), ("parametrizations", "weight", "original1")),
    (("weight_orig",), ("parametrizations", "weight", "original")),
    (("gamma",), ("weight",)),
    (("beta",), ("bias",)),
)


def respelled(
    unmatched: Mapping[str, TensorSpec], free: Mapping[str, TensorSpec], taken: Collection[str] = ()
) -> dict[str, str]:
    """Keys that are in the target under another spelling.

    >>> spec = TensorSpec([4], "F32")
    >>> respelled({"norm.gamma": spec, "norm.gammas": spec}, {"norm.weight": spec})
    {'norm.gamma': 'norm.weight'}

    Args:
        unmatched: keys as the target would have them, that it does not have.
        free: the target's keys that nothing fills so far.
        taken: target keys that are out of bounds.
    """
    found: dict[str, str] = {}
    used: set[str] = set(taken)
    for key, spec in unmatched.items():
        for other in _spellings(key):
            if other in free and other not in used and free[other].shape == spec.shape:
                found[key] = other
                used.add(other)
                break
    return found


def _spellings(key: str) -> Iterator[str]:
    segments = tuple(key.split("."))
    for one, other in (*_LEAVES, *((b, a) for a, b in _LEAVES)):
        if segments[-len(one) :] == one:
            yield ".".join((*segments[: -len(one)], *other))


@dataclass(frozen=True)
class OwnNames:
    """The names that a model has for the tensors of a source in its own layout.

    Args:
        plan: copies each tensor to its name. notes: what was done to the names, for people.
        problems: two tensors that come to one name. away: paths of `drop` that settle all of theirs.
    """

    plan: Plan
    notes: list[str]
    problems: list[Diagnostic]
    away: Collection[str] = ()


def own_names(source: Specs, target: Specs, drop: Sequence[str] = ()) -> OwnNames:
    """Plan the copies that bring a source's keys to the model's names: prefixes and respellings, no more.

    >>> spec = TensorSpec([2], "F32")
    >>> found = own_names({"module.norm.gamma": spec, "module.norm.bias": spec},
    ...                   {"norm.weight": spec, "norm.bias": spec})
    >>> found.notes
    ["prefix 'module.' taken off", "1 key in another spelling, such as 'norm.gamma' for 'norm.weight'"]
    >>> list(found.plan.specs)
    ['norm.weight', 'norm.bias']

    Args:
        drop: what the caller leaves out, so that it is no evidence for a prefix.

    Raises:
        LoadError: two parts of one side fit the other equally well.
    """
    dropped = dropped_keys(drop, source, {}, []) if drop else {}
    best, rivals = align({k: s for k, s in source.items() if k not in dropped} if dropped else source, target)
    if rivals:
        raise _ambiguous(best, rivals)
    notes = best.notes
    # a key that the model has under its own name stays, whatever prefix the others carry
    names = {k: k if k not in best.matched and k in target else best.name(k) for k in source}
    named = set(names.values())
    left = {n: source[k] for k, n in names.items() if n not in target}
    other = respelled(left, {k: s for k, s in target.items() if k not in named}) if left else {}
    if other:
        one, two = next(iter(other.items()))
        notes.append(f"{len(other)} key{'s' * (len(other) > 1)} in another spelling, such as {one!r} for {two!r}")
        names = {k: other.get(n, n) for k, n in names.items()}
    twice, away = _twice(names, dropped) if len(set(names.values())) < len(names) else ({}, {})
    kept = {k: n for k, n in names.items() if k not in away and k not in twice}
    text = f"{escape(best.source)}{{k...}} -> {escape(best.target)}{{k...}}"
    plan = replace(renaming(source, kept, text), dropped={k: f"drop = {path!r}" for k, path in away.items()})
    settled = {*away.values()} - {path for k, path in dropped.items() if k not in away}
    return OwnNames(plan, notes, [_made_twice(twice)] if twice else [], settled)


def _twice(names: Mapping[str, str], dropped: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Source keys whose name another one has: those that nothing settles, and those that the caller drops."""
    twice: dict[str, str] = {}
    away: dict[str, str] = {}
    taken: set[str] = set()
    for key in sorted(names, key=dropped.__contains__):
        if names[key] not in taken:
            taken.add(names[key])
        elif key in dropped:
            away[key] = dropped[key]
        else:
            twice[key] = names[key]
    return twice, away


def _made_twice(twice: Mapping[str, str]) -> Diagnostic:
    key, name = next(iter(twice.items()))
    return Diagnostic(
        "made-twice",
        f"{counted(len(twice), 'source tensor', 'has')} the same name in the model as another one: {key!r} as {name!r}",
        notes=tuple(text for text, _ in fold(list(twice))[:8]),
        remedies=(Remedy("drop", [escape(k) for k in twice], "takes the other"),),
    )


def _ambiguous(best: Alignment, rivals: Sequence[Alignment]) -> LoadError:
    found = [best, *rivals]
    notes = tuple(
        f"{f.source or f.target or '(no prefix)'}  {counted(len(f.matched), 'key')}, {f.equal} with equal shapes"
        for f in found
    )
    source = [f.source.rstrip(".") for f in found if f.source]
    one = tuple(Remedy("subtree", path) for path in source[:1])
    advice = None if one else "load into the submodule that is meant: load_into(model.part, …)"
    return LoadError(
        Diagnostic(
            "ambiguous-prefix",
            f"{len(found)} parts fit equally well: which one is meant?",
            notes=notes,
            remedies=one,
            advice=advice,
        )
    )
