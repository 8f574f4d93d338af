"""Rules that differ in one place made one: leaves into `{l}`, modules into a choice list, what stays into `rest`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..narrowing import present
from .atoms import Atom, common_head
from .claimed_keys import Book
from .units import split_path

__all__ = ["RuleDraft", "merged", "unmerged"]

_CAPTURE = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"^(?:\d+\*|\d+-)?([a-z]\w*)(?:[+-]\d+)?$")
_COMMON = ("weight", "bias")
_INLINE = 200  # characters of choices that still go into the line itself


@dataclass(frozen=True)
class RuleDraft:
    """The part of a recipe that covers the matched keys.

    Args:
        rules: lines.
        names: choice lists too long for a line.
        dims: sizes.
        rest: the fallback, or "error" where nothing is left to it.
    """

    rules: tuple[str, ...]
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    dims: Mapping[str, Any] = field(default_factory=dict)
    rest: str = "error"

    @property
    def length(self) -> float:
        """How long it is to read."""
        return (
            sum(1 + len(r) / 200 for r in self.rules)
            + 0.5 * sum(map(len, self.names.values()))
            + (self.rest not in ("error", "keep"))
        )


def merged(atoms: Sequence[Atom], keys: Sequence[str], spare: Iterable[str]) -> RuleDraft:
    """The shortest of the drafts, with and without a fallback for what keeps its name.

    Args:
        keys: all source keys that were looked at.
        spare: source keys that nothing claims: no rule may either.
    """
    book = Book(keys, frozenset(spare))
    best = min((_draft(a, book, "error") for a in _versions(atoms, book)), key=lambda d: d.length)
    for head, tail in _fallbacks(atoms):
        rest = "keep" if not head and not tail else f"{head}{{k...}} -> {tail}{{k...}}"
        left = [a for a in atoms if not _same_after(a, head, tail)]
        for version in _versions(left, book):
            draft = _draft(version, book, rest)
            if draft.length < best.length:
                best = draft
    return best


def unmerged(atoms: Sequence[Atom]) -> RuleDraft:
    """A rule for each atom, none taken together."""
    names: dict[str, dict[str, str]] = {}
    dims: dict[str, Any] = {}
    solved = _solved(atoms)
    return RuleDraft(tuple(_rule(_distinct_dims(_ranged(a), dims, solved), names) for a in atoms), names, dims)


def _versions(atoms: Sequence[Atom], book: Book) -> list[Sequence[Atom]]:
    """The atoms as they are, and with towers that are alike, such as an encoder and a decoder, taken together."""
    atoms = _leaf_renames(atoms, book)
    found: list[Sequence[Atom]] = [atoms]
    whole = _subtrees(atoms, book)
    if len(whole) < len(atoms):
        found.append(whole)
    for at in range(2):
        for to in range(3):
            together = _towers(atoms, at, to)
            if together is not None:
                found.append(together)
    return found


def _leaf_renames(atoms: Sequence[Atom], book: Book) -> Sequence[Atom]:
    """Leaves that change their name wherever they stand, under paths that stay, as one rule for any path."""
    groups: dict[tuple[str, str], list[Atom]] = defaultdict(list)
    for atom in atoms:
        (path, leaf), (to, end) = split_path(atom.source), split_path(atom.target)
        if path == to and leaf != end and path.endswith(".") and not atom.left and "{" not in leaf + end:
            groups[leaf, end].append(atom)
    taken: set[int] = set()
    added = []
    for (leaf, end), members in groups.items():
        source = f"{{r...}}.{leaf}"
        own = frozenset().union(*(book.claimed(m.source) for m in members))
        if len(members) > 1 and book.claimed(source) <= own:
            taken |= {id(m) for m in members}
            moves = tuple(n for m in members for n in m.moves)
            added.append(Atom(source, f"{{r...}}.{end}", moves=moves))
    return [*(a for a in atoms if id(a) not in taken), *added]


def _subtrees(atoms: Sequence[Atom], book: Book) -> list[Atom]:
    """Modules whose keys all change in nothing but the path to them, each as one rule; the largest first."""
    groups: dict[tuple[str, str], list[Atom]] = defaultdict(list)
    for atom in atoms:
        if atom.left or atom.right or atom.dims or any(v is not None for v in atom.free.values()):
            continue
        common = common_head([atom.source[::-1], atom.target[::-1]])[::-1]
        for sep in re.finditer(r"[./](?=.)", common):
            start = sep.end() - len(common)
            pair = atom.source[:start], atom.target[:start]
            if "{" not in pair[0] + pair[1]:
                groups[pair].append(atom)
    left = list(atoms)
    added: list[Atom] = []
    for (head, to), members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        here = [m for m in members if any(m is a for a in left)]
        if len(here) < 2 or not book.claimed(head + "{r...}") <= frozenset().union(
            *(book.claimed(m.source) for m in here)
        ):
            continue
        left = [a for a in left if not any(a is m for m in here)]
        added.append(Atom(head + "{r...}", to + "{r...}", moves=tuple(n for m in here for n in m.moves)))
    return [*left, *added]


def _towers(atoms: Sequence[Atom], at: int, to: int) -> list[Atom] | None:
    """Atoms that differ in one segment, `at` on the source's side and `to` on the target's, as one with a choice."""
    groups: dict[Any, list[tuple[str, str, Atom]]] = defaultdict(list)
    for n, atom in enumerate(atoms):
        one, two = _opened(atom.source, at), _opened(atom.target, to)
        key: Any = n
        if one and two:
            key = (one[0], one[2], two[0], two[2], atom.left, atom.right, repr((dict(atom.free), dict(atom.dims))))
        groups[key].append((one[1] if one else "", two[1] if two else "", atom))
    found, gained = [], False
    for key, rows in groups.items():
        ones, twos = [r[0] for r in rows], [r[1] for r in rows]
        if len(rows) < 2 or len(set(ones)) < len(rows) or len(set(twos)) < len(rows):
            found += [r[2] for r in rows]
            continue
        gained = True
        moves = tuple(n for r in rows for n in r[2].moves)
        source = f"{key[0]}{{t:{','.join(ones)}}}{key[1]}"
        target = f"{key[2]}{{t:{','.join(twos)}}}{key[3]}"
        found.append(replace(rows[0][2], source=source, target=target, moves=moves))
    return found if gained else None


def _opened(pattern: str, at: int) -> tuple[str, str, str] | None:
    """The pattern around its segment in a place; None where that is no plain word in front of all captures."""
    parts = re.split(r"([./])", pattern)
    if 2 * at + 1 >= len(parts) or "{" in "".join(parts[: 2 * at + 1]) or not parts[2 * at].isalpha():
        return None
    return "".join(parts[: 2 * at]), parts[2 * at], "".join(parts[2 * at + 1 :])


def _same_after(atom: Atom, head: str, tail: str) -> bool:
    if atom.left or not atom.source.startswith(head) or not atom.target.startswith(tail):
        return False
    return atom.source[len(head) :] == atom.target[len(tail) :]


def _fallbacks(atoms: Sequence[Atom]) -> list[tuple[str, str]]:
    """Pairs of prefixes behind which most rules say the same on both sides."""
    count: dict[tuple[str, str], int] = defaultdict(int)
    for atom in atoms:
        if atom.left:
            continue
        common = common_head([atom.source[::-1], atom.target[::-1]])[::-1]
        for cut in [0, *(m.end() for m in re.finditer(r"[./]", common))]:
            start = len(atom.source) - len(common) + cut, len(atom.target) - len(common) + cut
            pair = atom.source[: start[0]], atom.target[: start[1]]
            if "{" not in pair[0] + pair[1] and all(not p or p[-1] in "./" for p in pair):
                count[pair] += 1
                break
    ranked = sorted(count, key=lambda p: (-count[p], p))
    return [p for p in ranked if count[p] > 1][:4]


def _draft(atoms: Sequence[Atom], book: Book, rest: str) -> RuleDraft:
    ruled = [_ranged(a) for a in atoms]
    rows = _merge_modules(_merge_leaves(ruled, book), book)
    names: dict[str, dict[str, str]] = {}
    dims: dict[str, Any] = {}
    solved = _solved(rows)
    rules = [_rule(_distinct_dims(row, dims, solved), names) for row in rows]
    return RuleDraft(tuple(rules), names, dims, rest)


def _ranged(atom: Atom) -> Atom:
    """The atom with its restrictions written where each variable stands unchanged, on one side."""
    source, target = atom.source, atom.target
    for name, values in atom.free.items():
        if values is None:
            continue
        run = list(values) == list(range(values[0], values[-1] + 1)) and len(values) > 1
        text = f"{values[0]}..{values[-1]}" if run else ",".join(map(str, values))
        if f"{{{name}}}" in source:
            source = source.replace(f"{{{name}}}", f"{{{name}:{text}}}")
        else:
            target = target.replace(f"{{{name}}}", f"{{{name}:{text}}}")
    return replace(atom, source=source, target=target, free={})


def _solved(atoms: Iterable[Atom]) -> frozenset[str]:
    """The names of axes whose sizes some rule reads off its tensors."""
    return frozenset(n for a in atoms for n in re.findall(r"[a-z]\w*", a.left + a.right) if n not in a.dims)


def _distinct_dims(atom: Atom, dims: dict[str, Any], solved: Container[str]) -> Atom:
    """The atom with names for its sizes that no other rule uses for others, or for axes that it solves."""
    for name, value in atom.dims.items():
        fresh, n = name, 1
        while fresh in solved or (fresh in dims and dims[fresh] != value):
            n += 1
            fresh = f"{name}{n}"
        dims[fresh] = value
        if fresh != name:
            swap = re.compile(rf"(?<![\w]){name}(?!\w)")
            atom = replace(
                atom,
                left=swap.sub(fresh, atom.left), right=swap.sub(fresh, atom.right),
                source=_swap_capture(atom.source, name, fresh), target=_swap_capture(atom.target, name, fresh),
            )  # fmt: skip
    return atom


def _swap_capture(pattern: str, name: str, fresh: str) -> str:
    return _CAPTURE.sub(lambda m: "{" + re.sub(rf"\b{name}\b", fresh, m[1]) + "}" if ":" not in m[1] else m[0], pattern)


# Leaves ------------------------------------------------------------------------------------------------------------


def _merge_leaves(atoms: Sequence[Atom], book: Book) -> list[Atom]:
    groups: dict[tuple[str, str, str], list[Atom]] = defaultdict(list)
    for atom in atoms:
        path, _ = split_path(atom.source)
        to, _ = split_path(atom.target)
        groups[path, to, repr(dict(atom.dims))].append(atom)
    found: list[Atom] = []
    for (path, to, _), members in groups.items():
        while members:
            taken = _compatible(members)
            members = [m for m in members if m not in taken]
            found += _one_leaf(path, to, taken, book)
    return found


def _compatible(members: Sequence[Atom]) -> list[Atom]:
    """The first and all whose axes go into one list with its."""
    taken = [members[0]]
    for atom in members[1:]:
        if _axes([*taken, atom]) is not None and not any(
            "{" in split_path(a.source)[1] + split_path(a.target)[1] for a in (atom, taken[0])
        ):
            taken.append(atom)
    return taken


def _axes(atoms: Sequence[Atom]) -> tuple[str, str] | None:
    """One pair of axis lists for leaves of several ranks; None where there is none."""
    pairs = list(dict.fromkeys((a.left, a.right) for a in atoms))
    if len(pairs) == 1:
        return pairs[0]
    if any(p[0] and not p[0].startswith("[") for p in pairs):
        return None
    lists = [tuple(_items(side) for side in p) for p in pairs]
    if all(one and two and one[1:] == two[1:] for one, two in lists):
        heads = {(one[0], two[0]) for one, two in lists}
        if len(heads) == 1:
            ((one_head, two_head),) = heads
            return f"[{one_head} ...]", f"[{two_head} ...]"
    long = max(pairs, key=lambda p: len(p[0]))
    one, two = _items(long[0]), _items(long[1])
    if len(one) != 2 or len(two) != 2:
        return None
    short = [p for p in pairs if p != long]
    if len(short) != 1:
        return None
    wanted = short[0]
    for spare in one:
        if spare not in two or not spare.isalpha():
            continue
        left, right = [x for x in one if x != spare], [x for x in two if x != spare]
        if (wanted == ("", "") and left == right) or wanted == (f"[{left[0]}]", f"[{right[0]}]"):
            return tuple("[" + " ".join(x + "?" if x == spare else x for x in side) + "]" for side in (one, two))  # type: ignore[return-value]
    return None


def _items(axes: str) -> list[str]:
    """The items of an axis list, groups whole."""
    return re.findall(r"\([^)]*\)|[^\s()\[\]]+", axes)


def _one_leaf(path: str, to: str, members: Sequence[Atom], book: Book) -> list[Atom]:
    if len(members) == 1:
        only = members[0]
        leaf = only.source[len(path) :]
        plain = leaf == only.target[len(to) :] and "{" not in leaf and not only.left
        if plain and path and leaf in _COMMON and book.claimed(path + "{l}") <= book.claimed(only.source):
            return [replace(only, source=path + "{l}", target=to + "{l}")]
        return list(members)
    axes = present(_axes(members), "the pair of axis lists of compatible rules")
    pairs = [(split_path(m.source)[1], split_path(m.target)[1]) for m in members]
    moves = tuple(n for m in members for n in m.moves)
    own = frozenset().union(*(book.claimed(m.source) for m in members))
    base = replace(members[0], left=axes[0], right=axes[1], moves=moves)
    if all(a == b for a, b in pairs):
        if book.claimed(path + "{l}") <= own:
            return [replace(base, source=path + "{l}", target=to + "{l}")]
        text = "{l:" + ",".join(a for a, _ in pairs) + "}"
        return [replace(base, source=path + text, target=to + "{l}")]
    one, two = ("{l:" + ",".join(p[i] for p in pairs) + "}" for i in (0, 1))
    return [replace(base, source=path + one, target=to + two)]


# Modules -----------------------------------------------------------------------------------------------------------


def _merge_modules(atoms: Sequence[Atom], book: Book) -> list[Atom]:
    groups: dict[tuple[Any, ...], list[tuple[Atom, str, str]]] = defaultdict(list)
    order: dict[tuple[Any, ...], int] = {}
    for n, atom in enumerate(atoms):
        one, two = _last_variable(atom.source), _last_variable(atom.target)
        (mid, leaf), (to, end) = _middle(atom.source[one:]), _middle(atom.target[two:])
        key: tuple[Any, ...] = (
            atom.source[:one],
            atom.target[:two],
            leaf,
            end,
            atom.left,
            atom.right,
            repr(dict(atom.dims)),
        )
        if "{" in mid + to:
            key = (*key, n)
        groups[key].append((atom, mid, to))
        order.setdefault(key, n)
    found: list[Atom] = []
    for key in sorted(groups, key=lambda k: order[k]):
        found += _one_module(key, groups[key], book)
    return found


def _last_variable(pattern: str) -> int:
    """Where the last capture that is a number or a hole ends; leaves are not looked at."""
    ends = [m.end() for m in _CAPTURE.finditer(pattern) if m[1] != "l" and not m[1].startswith("l:")]
    return ends[-1] if ends else 0


def _middle(text: str) -> tuple[str, str]:
    """A pattern's text behind its last variable: the module with its separator, and the leaf."""
    masked = _CAPTURE.sub(lambda m: "x" * len(m[0]), text)
    cut = max(masked.rfind("."), masked.rfind("/")) + 1
    return text[:cut], text[cut:]


def _one_module(key: tuple[Any, ...], rows: Sequence[tuple[Atom, str, str]], book: Book) -> list[Atom]:
    head, to_head, leaf, end = key[:4]
    if len(rows) == 1:
        return [rows[0][0]]
    ones, twos = [r[1] for r in rows], [r[2] for r in rows]
    moves = tuple(n for r in rows for n in r[0].moves)
    own = frozenset().union(*(book.claimed(r[0].source) for r in rows))
    base = replace(rows[0][0], moves=moves)
    if ones == twos and leaf == end and not base.left:
        lead = common_head(ones)[:1] if all(o[:1] in "./" and o for o in ones) else ""
        whole = f"{head}{lead}{{r...}}"
        if (lead or not head or head[-1] in "./") and book.claimed(whole) <= own:
            return [replace(base, source=whole, target=f"{to_head}{lead}{{r...}}")]
    (a, one, b), (c, two, d) = _trimmed(ones), _trimmed(twos)
    if sum(len(t) + 1 for t in (*one, *two)) - 2 > _INLINE:
        parts = _by_part(rows)
        if len(parts) > 1:
            return [atom for part in parts for atom in _one_module(key, part, book)]
    # Equal spellings on one side would be one choice for two modules.
    if len(set(one)) < len(one) or len(set(two)) < len(two) or any("," in t for t in (*one, *two)):
        return [r[0] for r in rows]
    source, target = (f"{{m:{','.join(side)}}}" for side in (one, two))
    candidate = f"{head}{a}{source}{b}{leaf}"
    wanted = f"{to_head}{c}{target}{d}{end}"
    if any("}{" in text for text in (candidate, wanted)) or not book.claimed(candidate) <= own:
        return [r[0] for r in rows]
    return [replace(base, source=candidate, target=wanted)]


def _by_part(rows: Sequence[tuple[Atom, str, str]]) -> list[list[tuple[Atom, str, str]]]:
    """Modules apart by the part of the layer that they stand in; those that stand in none together."""
    groups: dict[str, list[tuple[Atom, str, str]]] = defaultdict(list)
    for row in rows:
        segments = [s for s in re.split(r"[./]", row[1]) if s]
        groups[segments[0] if len(segments) > 1 else ""].append(row)
    return list(groups.values())


def _trimmed(texts: Sequence[str]) -> tuple[str, list[str], str]:
    """What the texts share at either end, as whole words, and what is left of each: nothing, if need be, of none."""
    head = common_head(list(texts))
    while head and head[-1] not in "./_-":
        head = head[:-1]
    rest = [t[len(head) :] for t in texts]
    tail = common_head([t[::-1] for t in rest])[::-1]
    while tail and tail[0] not in "./_-":
        tail = tail[1:]
    mids = [t[: len(t) - len(tail)] if tail else t for t in rest]
    if not all(mids) and tail:
        return head, rest, ""
    return head, mids, tail


def _rule(atom: Atom, names: dict[str, dict[str, str]]) -> str:
    source, target = atom.source, atom.target
    one, two = re.search(r"\{m:([^{}]*)\}", source), re.search(r"\{m:([^{}]*)\}", target)
    if one and two and len(one[1]) + len(two[1]) > _INLINE:
        name, n = "m", 1
        while name in names:
            n += 1
            name = f"m{n}"
        names[name] = dict(zip(one[1].split(","), two[1].split(",")))
        source, target = source.replace(one[0], f"{{{name}}}"), target.replace(two[0], f"{{{name}}}")
    for choice in re.finditer(r"\{([a-z]):([^{}]*)\}", source):
        if ".." not in choice[2] and choice[0] in target:
            target = target.replace(choice[0], f"{{{choice[1]}}}")  # the same spellings need no second list
    left, right = (" " + atom.left if atom.left else ""), (" " + atom.right if atom.right else "")
    return f"{source}{left} -> {target}{right}"
