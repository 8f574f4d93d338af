"""The table of a model: the tree of its modules, and the columns that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from ..errors import Diagnostic, LoadError

__all__ = ["COLUMNS", "ModuleRow", "Shapes", "check_columns", "model_table"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module.

    Args:
        name: its path, `""` for the model.
        type: the name of its class.
        depth: how deep it lies.
        output: the shapes of the tensors that it returned at its first call; empty where it was not run.
        input: the shapes of the tensors that it was given then.
        kernel: the size of a convolution's kernel.
        mult_adds: multiplications with additions of that call in its own parameters: for a convolution, parameters
            times positions of the output; for other layers with a matrix, parameters times rows of the output.
        params: how many parameters it holds itself, those that an earlier row holds left out.
        trainable: how many of these take a gradient.
        nbytes: the bytes of its parameters and buffers, counted as `params`.
        repeated: whether the same module stands in an earlier row.
    """

    name: str
    type: str
    depth: int
    output: Shapes
    params: int
    trainable: int
    nbytes: int
    repeated: bool
    input: Shapes = ()
    kernel: tuple[int, ...] = ()
    mult_adds: int = 0


Cell = Callable[[ModuleRow, int], str]
"""Called with a row and the parameters of the whole model, returns the text of a cell."""


def _shape(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(map(str, map(list, shapes[:1]))) or "--"


def _share(row: ModuleRow, whole: int) -> str:
    return f"{row.params / whole:.2%}" if row.params and whole else "--"


def _trainable(row: ModuleRow, whole: int) -> str:
    if not row.params:
        return "--"
    return "yes" if row.trainable == row.params else "partly" if row.trainable else "no"


def _params(row: ModuleRow, whole: int) -> str:
    return "(shared)" if row.repeated else f"{row.params:,}" if row.params else "--"


COLUMNS: dict[str, tuple[str, Cell]] = {
    "input_size": ("Input Shape", lambda row, _: _shape(row.input)),
    "output_size": ("Output Shape", lambda row, _: _shape(row.output)),
    "num_params": ("Param #", _params),
    "params_percent": ("Param %", _share),
    "kernel_size": ("Kernel Shape", lambda row, _: str(list(row.kernel)) if row.kernel else "--"),
    "mult_adds": ("Mult-Adds", lambda row, _: f"{row.mult_adds:,}" if row.mult_adds else "--"),
    "trainable": ("Trainable", _trainable),
}
"""The columns by the names that torchinfo gives them: heading, and what a row has there."""


def check_columns(names: Sequence[str]) -> None:
    """Check that columns are known.

    Raises:
        LoadError: one is not.
    """
    for name in names:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            text = f"col_names: no column is called {name!r}"
            raise LoadError(Diagnostic("bad-argument", text, help=f"{meant}one of: {', '.join(COLUMNS)}"))


def model_table(listed: Sequence[ModuleRow], params: int, depth: int | None, col_names: Sequence[str]) -> list[str]:
    """Return the lines of the table, its heading first."""
    columns = [COLUMNS[name] for name in col_names]
    rows = [("Layer (type:depth-idx)", *(heading for heading, _ in columns))]
    for label, row in _labelled(_cut(listed, depth)):
        rows.append((label, *(cell(row, params) for _, cell in columns)))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return ["    ".join(cell.ljust(wide) for cell, wide in zip(row, widths)).rstrip() for row in rows]


def _cut(rows: Sequence[ModuleRow], depth: int | None) -> list[ModuleRow]:
    """The rows down to a depth; those at the last one stand for all below them."""
    shown: list[ModuleRow] = []
    for row in rows:
        if depth is None or row.depth <= depth:
            shown.append(row)
        elif not row.repeated:
            last = shown[-1]
            shown[-1] = replace(
                last,
                params=last.params + row.params,
                trainable=last.trainable + row.trainable,
                mult_adds=last.mult_adds + row.mult_adds,
                nbytes=last.nbytes + row.nbytes,
            )
    return shown


def _labelled(rows: Sequence[ModuleRow]) -> Iterator[tuple[str, ModuleRow]]:
    """The tree: bars for what goes on below, an elbow for the last child, depth and number as torchinfo counts them."""
    numbers: dict[int, int] = {}
    for at, row in enumerate(rows):
        numbers[row.depth] = numbers.get(row.depth, 0) + 1
        bars = ["│    " if _goes_on(rows, at, depth) else "     " for depth in range(1, row.depth)]
        elbow = ("├─" if _goes_on(rows, at, row.depth) else "└─") if row.depth else ""
        name = row.name.rpartition(".")[2]
        named = f" ({name})" if name and not name.isdecimal() else ""
        label = f"{row.type}{named}: {row.depth}-{numbers[row.depth]}" if row.depth else row.type
        yield "".join(bars) + elbow + label, row


def _goes_on(rows: Sequence[ModuleRow], at: int, depth: int) -> bool:
    """Whether a later row lies at `depth` before one lies above it."""
    for row in rows[at + 1 :]:
        if row.depth <= depth:
            return row.depth == depth
    return False
