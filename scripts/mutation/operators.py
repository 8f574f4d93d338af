"""List the mutants of a source file: mutmut's operators, and four that remove or fix a decision.

A mutant is one small change of one statement. mutmut's own runner neither draws a sample nor reaches functions with
decorators (properties, context managers), so its operators are applied here without it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

_WORDING = (cst.Raise, cst.FormattedString, cst.Assert)
"""Text inside these is wording: a message, or a claim about the code itself."""


def _operands(node: cst.BooleanOperation) -> Iterator[cst.BaseExpression]:
    """Drop one operand: `a and b` becomes `a`, and `b`."""
    yield from (node.left, node.right)


def _fixed(node: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Fix a condition: always false; for all but `while`, always true as well."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    sides: list[tuple[cst.BaseBooleanOp, str]] = [(cst.And(), "False"), (cst.Or(), "True")]
    for operator, value in sides[: 1 if isinstance(node, cst.While) else 2]:
        yield node.with_changes(test=cst.BooleanOperation(left=test, operator=operator, right=cst.Name(value)))


def _statement(node: cst.Expr | cst.Raise) -> Iterator[cst.CSTNode]:
    """Delete a call whose result is not used, a yield, or a raise."""
    if not isinstance(node, cst.Expr) or not isinstance(node.value, cst.SimpleString | cst.ConcatenatedString):
        yield cst.Pass()


def _comparison(node: cst.ComparisonTarget) -> Iterator[cst.CSTNode]:
    """Turn an ordering into its opposite; mutmut only moves its boundary."""
    opposite = {
        cst.LessThan: cst.GreaterThanEqual,
        cst.LessThanEqual: cst.GreaterThan,
        cst.GreaterThan: cst.LessThanEqual,
        cst.GreaterThanEqual: cst.LessThan,
    }.get(type(node.operator))
    if opposite is not None:
        yield node.with_changes(operator=opposite())


_OPERATORS = [
    *mutators.mutation_operators,
    (cst.BooleanOperation, _operands),
    (cst.If, _fixed),
    (cst.While, _fixed),
    (cst.CompIf, _fixed),
    (cst.Expr, _statement),
    (cst.Raise, _statement),
    (cst.ComparisonTarget, _comparison),
]


_LINES_A_MUTANT = 6
"""Lines that are looked at for each mutant: many hold nothing that can be changed."""


@dataclass(frozen=True)
class Site:
    """A node that can be changed, what it can become, and by which operator. `line` counts from one."""

    file: str
    function: str
    line: int
    operator: str
    node: cst.CSTNode
    changed: cst.CSTNode


@dataclass(frozen=True)
class Mutant:
    """One change: the whole text of the changed file, the lines that it touches, and the diff."""

    file: str
    function: str
    lines: tuple[int, ...]
    text: str
    diff: str

    @property
    def change(self) -> tuple[str, ...]:
        """The removed and the added lines, without indentation: what a note is found by when lines move."""
        return tuple(f"{line[0]} {line[1:].strip()}" for line in self.diff.splitlines() if line[:1] in "+-")

    @property
    def id(self) -> str:
        """A name that stays the same when other lines of the file change."""
        return hashlib.sha256("\n".join((self.file, self.function, *self.change)).encode()).hexdigest()[:12]


class _Sites(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, file: str, lines: set[int]) -> None:
        super().__init__()
        self.file = file
        self.lines = lines
        self.found: list[Site] = []
        self._names: list[str] = []
        self._wording = 0
        self._functions = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom | cst.TypeAlias):
            return False
        if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.append(node.name.value)
            self._functions += isinstance(node, cst.FunctionDef)
        else:
            self._add(node)
        self._wording += _is_wording(node)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.pop()
            self._functions -= isinstance(node, cst.FunctionDef)
        self._wording -= _is_wording(node)

    def _add(self, node: cst.CSTNode) -> None:
        position = self.get_metadata(PositionProvider, node, None)
        if position is None or position.start.line not in self.lines:
            return
        if isinstance(node, cst.BaseString) and (self._wording or " " in cst.Module([]).code_for_node(node)):
            return
        if not self._functions and not isinstance(node, cst.BaseNumber):
            return  # what runs on import: only the constants are of interest
        function, line = ".".join(self._names), position.start.line
        for kind, operator in _OPERATORS:
            if isinstance(node, kind):
                self.found += [Site(self.file, function, line, operator.__name__, node, new) for new in operator(node)]


def _is_wording(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "Diagnostic":
        return True
    return isinstance(node, _WORDING)


def sample(root: Path, packages: Iterable[str], size: int, seed: int) -> list[Mutant]:
    """Return `size` mutants of the packages, one a line at most, drawn by the seed.

    Lines are drawn by a hash of their text, so that a change of one line leaves the choice of the others as it was.
    On a line, first the operator is drawn, then the mutant: a call with many arguments has many mutants that any test
    would kill, and these would outnumber the others.
    """
    ranked = sorted(
        (rank, path, line)
        for package in packages
        for path in (root / "ckptsurgery" / package).rglob("*.py")
        for rank, line in _ranked(path.read_text(), path.relative_to(root).as_posix(), seed)
    )
    wanted: dict[Path, set[int]] = {}
    for _, path, line in ranked[: _LINES_A_MUTANT * size]:
        wanted.setdefault(path, set()).add(line)
    parsed = {path: _sites(path, path.relative_to(root).as_posix(), lines) for path, lines in wanted.items()}
    made: dict[str, Mutant] = {}
    for rank, path, line in ranked[: _LINES_A_MUTANT * size]:
        if len(made) == size:
            break
        module, sites = parsed[path]
        group = [site for site in sites if site.line == line]
        if not group:
            continue
        chance = random.Random(rank)
        operator = chance.choice(sorted({site.operator for site in group}))
        mutant = _mutant(module, chance.choice([site for site in group if site.operator == operator]))
        if mutant is not None:
            made[mutant.id] = mutant
    return list(made.values())


def _ranked(code: str, file: str, seed: int) -> Iterator[tuple[str, int]]:
    """Give each line a place in the order of drawing."""
    functions: dict[int, str] = {}

    def name(body: ast.AST, before: tuple[str, ...]) -> None:
        for node in ast.iter_child_nodes(body):
            inside = before
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inside = (*before, node.name)
                functions.update(dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), ".".join(inside)))
            name(node, inside)

    name(ast.parse(code), ())
    seen: Counter[tuple[str, str]] = Counter()
    for number, line in enumerate(code.splitlines(), 1):
        key = (functions.get(number, ""), line.strip())
        seen[key] += 1
        yield hashlib.sha256(repr((seed, file, *key, seen[key])).encode()).hexdigest(), number


def _sites(path: Path, file: str, lines: set[int]) -> tuple[cst.Module, list[Site]]:
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
    visitor = _Sites(file, lines)
    wrapper.visit(visitor)
    return wrapper.module, visitor.found


def _mutant(module: cst.Module, site: Site) -> Mutant | None:
    """Return the mutant, or None where the change gives the same or no valid code."""
    before = module.code
    replaced = module.deep_replace(site.node, site.changed)
    assert isinstance(replaced, cst.Module)
    after = replaced.code
    try:
        compile(after, site.file, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    if before == after:
        return None
    old, new = before.splitlines(), after.splitlines()
    touched = [
        line
        for tag, low, high, _, _ in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
        for line in range(low + 1, max(high, low + 1) + 1)
    ]
    diff = "\n".join(list(difflib.unified_diff(old, new, lineterm="", n=0))[3:])
    return Mutant(site.file, site.function, _statements(before, touched), after, diff)


def _statements(code: str, lines: list[int]) -> tuple[int, ...]:
    """Return all lines of the statements that the lines belong to: only some of them count as run."""
    found = set(lines)
    for line in lines:
        within: list[range] = []
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.stmt | ast.match_case | ast.ExceptHandler):
                first = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
                body = getattr(node, "body", None)
                last = max(first, body[0].lineno - 1) if body else getattr(node, "end_lineno", first)
                if line in range(first, last + 1):
                    within.append(range(first, last + 1))
        found.update(min(within, key=len, default=()))
    return tuple(sorted(found))
