"""Selections: named tensors of a live model as a value, to be combined, counted, looked at, frozen, filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError
from ..language.folding import fold
from ..language.leaves import by_leaf
from ..notebook_view import TextInNotebooks
from ..specs import TensorSpec, is_lossless
from ..wording import clipped, counted
from .drifting import drifting_norms
from .initialising import Whats, initialise
from .meant_parts import absent_parts, meant_of
from .places import named_tensors, place_of, require_module, require_plain, size_of
from .promises import promised, require_drawn
from .selectors import matching_names
from .statistics import Stats, stats_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..ops.moments import Moments

__all__ = ["Selection", "select"]


def select(
    model: nn.Module,
    *what: object,
    buffers: bool = False,
    allow_empty: bool = False,
    recurse: bool = True,
    remove_duplicate: bool = False,
) -> Selection:
    """Return the tensors of a model that any of `what` means; all of them without `what`.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)))
    >>> select(model, "{rest...}.bias").names
    ('0.bias', '1.0.bias', '1.1.bias')
    >>> select(model, 0).names
    ('0.weight', '0.bias')
    >>> select(model, "1", nn.LayerNorm).names
    ('1.0.weight', '1.0.bias', '1.1.weight', '1.1.bias')
    >>> (select(model, nn.Linear) - select(model, lambda name, p: p.ndim < 2)).freeze().numel
    35

    Args:
        what: an index, for the module that `model[index]` means; the full name of a parameter (`"0.bias"`); the path of
            a module, for its whole subtree (`"1"`); a key pattern over whole names; a module or a parameter of the
            model; a module type or a tuple of types, for all that such modules hold; a predicate of name and tensor;
            another selection.
        buffers: whether buffers count, here and in the complement.
        allow_empty: whether a selection may be empty; a module that is given by its index or itself may hold nothing.
        recurse: whether modules below count; without, only what the model itself holds.
        remove_duplicate: whether a shared tensor counts under its first name alone.

    Raises:
        LoadError: one of `what` matches nothing; the names that come close are listed.
        RecipeError: a pattern does not parse.
    """
    require_module(model)
    everything = named_tensors(model, buffers)
    names = [name for name in everything if recurse or "." not in name]
    if remove_duplicate:
        first = {id(everything[name]): name for name in reversed(names)}
        names = [name for name in names if first[id(everything[name])] == name]
    problems: list[Diagnostic] = []
    found: set[str] = set() if what else set(names)
    for one in what:
        try:
            found.update(matching_names(model, one, buffers, allow_empty))
        except LoadError as error:
            problems += error.diagnostics
    if problems:
        raise LoadError(problems)
    return Selection(model, tuple(name for name in names if name in found), buffers)


@dataclass(frozen=True, eq=False, repr=False)
class Selection(TextInNotebooks, Mapping[str, "Tensor"]):
    """Names of one model's tensors, and by them the tensors as they are at the time of asking.

    A mapping from names to live parameters (and buffers), in state_dict order. Combining selections (`|`, `&`, `-`,
    `^`, `~`) makes new ones; only methods that end in an underscore and `freeze` and `unfreeze` change the model.
    `str` of it is a table of name, shape, dtype, numbers, and whether it is trained.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> sel = select(model, "0")
    >>> sel, len(sel | select(model, "1.bias")), (~sel).names
    (Selection(2 tensors, 6 elements: 0.weight, 0.bias), 3, ('1.weight', '1.bias'))
    """

    model: nn.Module
    names: tuple[str, ...]
    buffers: bool = False
    note: str = ""
    _known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", frozenset(self.names))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        return place_of(self.model, name).tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.model is other.model and self.names == other.names

    def __hash__(self) -> int:
        return hash((id(self.model), self.names))

    def __or__(self, other: Selection) -> Selection:
        return self._combine(other, self._known | other._known)

    def __and__(self, other: Selection) -> Selection:
        return self._combine(other, self._known & other._known)

    def __sub__(self, other: Selection) -> Selection:
        return self._combine(other, self._known - other._known)

    def __xor__(self, other: Selection) -> Selection:
        return self._combine(other, self._known ^ other._known)

    def __invert__(self) -> Selection:
        everything = named_tensors(self.model, self.buffers)
        return Selection(self.model, tuple(n for n in everything if n not in self._known), self.buffers)

    def _combine(self, other: Selection, names: frozenset[str]) -> Selection:
        if self.model is not other.model:
            raise LoadError(Diagnostic("two-models", "the two selections are of different models"))
        return Selection(
            self.model, tuple(n for n in named_tensors(self.model) if n in names), self.buffers or other.buffers
        )

    @property
    def numel(self) -> int:
        """How many elements there are, those of a shared tensor counted once; a lazy parameter has none yet."""
        from torch.nn.parameter import is_lazy

        return sum(tensor.numel() for tensor in self._distinct().values() if not is_lazy(tensor))

    @property
    def nbytes(self) -> int:
        """How many bytes they take, those of a shared tensor counted once.

        Raises:
            LoadError: a tensor does not hold its elements one by one (sparse, nested, quantised).
        """
        names = {id(tensor): name for name, tensor in self.items()}
        return sum(size_of(place_of(self.model, name))[1] for name in names.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> the parameter objects themselves, without buffers."""
        from torch import nn

        return {name: tensor for name, tensor in self.items() if isinstance(tensor, nn.Parameter)}

    def data(self) -> dict[str, Tensor]:
        """Return name -> the values, detached from the graph but sharing memory with the model."""
        return {name: tensor.detach() for name, tensor in self.items()}

    def grads(self) -> dict[str, Tensor | None]:
        """Return name -> the gradient, or None."""
        return {name: tensor.grad for name, tensor in self.items()}

    def stats(self) -> Stats:
        """Return mean, std, min, max, norm, fraction of zeros and count of non-finite values of each tensor.

        Raises:
            LoadError: tensors are meta or lazy, and have no values; or they are not plain memory.
        """
        from torch.nn.parameter import is_lazy

        empty = [name for name, tensor in self.items() if tensor.is_meta or is_lazy(tensor)]
        if empty:
            text = f"{counted(len(empty), 'tensor', 'is')} meta or lazy"
            raise LoadError(Diagnostic("no-values", text, notes=_folded(empty)))
        require_plain(self.items(), "statistics are of plain tensors")
        return stats_of(self)

    def assert_count(self, count: int) -> Selection:
        """Return this selection, if it has `count` names.

        Raises:
            LoadError: it does not; its names are listed.
        """
        if len(self) != count:
            raise LoadError(
                Diagnostic(
                    "wrong-count", f"{counted(count, 'tensor')} expected, {len(self)} selected", notes=_folded(self)
                )
            )
        return self

    def freeze(self) -> Selection:
        """Take the parameters out of training (`requires_grad = False`); a tied one is frozen under all its names.

        Running statistics do not depend on gradients, and change with every batch in training mode. The selection
        lists such modules (`drifting`), and its `repr` names them.

        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        >>> select(net, "0", "1").freeze()
        Selection(4 tensors, 56 elements: {0,1}.weight, {0,1}.bias)
          note: frozen, but running statistics still change in training mode: 1 (BatchNorm1d); .eval() stops them
        """
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
        return self

    @property
    def drifting(self) -> tuple[str, ...]:
        """Paths of norms that are frozen with this selection, and whose running statistics change in training mode.

        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).train()
        >>> backbone = select(net, "0", "1").freeze()
        >>> backbone.drifting
        ('1',)
        >>> for path in backbone.drifting:  # after each call of net.train()
        ...     _ = net.get_submodule(path).eval()
        >>> backbone.drifting
        ()
        """
        return drifting_norms(self.model, self._known)

    def unfreeze(self) -> Selection:
        """Put the parameters into training.

        Raises:
            LoadError: some hold integers, which cannot be trained; nothing is changed.
        """
        parameters = self.parameters()
        fixed = [n for n, p in parameters.items() if not (p.is_floating_point() or p.is_complex())]
        if fixed:
            raise LoadError(
                Diagnostic(
                    "integer-parameter",
                    f"{counted(len(fixed), 'parameter', 'holds')} integers, which cannot be trained",
                    notes=_folded(fixed), help="sel & select(model, lambda name, p: p.is_floating_point())",
                )
            )  # fmt: skip
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return self

    def init_(self, what: Whats, seed: int = 0) -> Selection:
        """Initialise every tensor, by a name, a call (`"normal(std=0.02)"`) or a callable of tensor and generator.

        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sel = select(net, nn.Linear).init_({"weight": "normal(std=0.01)", "bias": "zeros"})
        >>> net[2].bias.item()
        0.0

        The values depend on seed and name alone; the global generators stay as they were. Where nothing is selected,
        nothing happens.

        Args:
            what: one for all, or by the last part of the name, which must then name every tensor selected. A part that
                the selected layers do not have, as `bias` where they were built with `bias=False`, is passed over. A
                formula of fans (`xavier_uniform`, `kaiming_normal`) for a layer means its matrices; what it leaves as
                it is is in the note of the selection returned.

        Raises:
            LoadError: the initialiser does not fit some of them; all are named, and nothing is changed.
        """
        if isinstance(what, Mapping):
            absent = absent_parts(self.model, self.names)
            what = {leaf: each for leaf, each in what.items() if leaf not in absent}
            initialise(self.model, by_leaf(self.names, what), seed)
            return self
        meant = self._meant_by(what)
        initialise(self.model, by_leaf(meant.names, what), seed)
        left = [name for name in self.names if name not in meant]
        note = f"{what} is for matrices; left as they are: {', '.join(_folded(left))}"
        return replace(self, note=clipped(note, 300)) if left else self

    def _meant_by(self, what: Whats) -> Selection:
        """The part of this selection that an initialiser means."""
        return replace(self, names=meant_of(dict(self.items()), what))

    def promised(self, what: Whats) -> dict[str, Moments]:
        """Return name -> the mean and the std that an initialiser promises, with their tolerances.

        >>> from torch import nn
        >>> print(select(nn.Linear(50, 100), "weight").promised("xavier_uniform")["weight"])
        mean 0 ± 0.008, std 0.1155 ± 0.004, within [-0.2, 0.2]

        Raises:
            LoadError: it promises nothing (`default`, `own`, a callable), or cannot fill some of the tensors.
        """
        return promised(self._meant_by(what), what)

    def assert_drawn(self, what: Whats) -> Selection:
        """Return this selection, if mean, std and bounds of each tensor are those that the initialiser promises.

        They may be five standard errors off, for a tensor of that size. It says nothing of the shape of the
        distribution, nor whether the entries are independent.

        Raises:
            LoadError: they are not; each is listed with what it has and what was promised.
        """
        self.stats()  # refuses tensors that hold no values
        require_drawn(self._meant_by(what), what)
        return self

    def assign_(self, name: str, value: Tensor | float, index: Any = None) -> Selection:
        """Set the tensor `name`, or the part of it at `index`, to a number or to a tensor of exactly its shape.

        >>> from torch import nn
        >>> sel = select(nn.Linear(2, 2))
        >>> sel.assign_("weight", 0.5, index=(0, 1))["weight"][0, 1].item()
        0.5

        Raises:
            LoadError: not selected, another shape, an index out of range, or a value that its dtype cannot hold.
        """
        if name not in self._known:
            raise LoadError(Diagnostic("not-selected", f"{name!r} is not selected", notes=_folded(self)))
        tensor = place_of(self.model, name).tensor
        require_plain([(name, tensor)], "assign to it before the model is sharded or quantised")
        _assign(name, tensor, value, index)
        return self

    def _distinct(self) -> dict[int, Tensor]:
        return {id(tensor): tensor for tensor in self.values()}

    def __str__(self) -> str:
        rows = [("name", "shape", "dtype", "numbers", "trainable")]
        for name, tensor in self.items():
            spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
            trainable = "yes" if tensor.requires_grad else "no"
            rows.append((name, str(list(spec.shape)), spec.dtype, f"{spec.numel:,}", trainable))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *self._notes()])

    def __repr__(self) -> str:
        shown = _folded(self)
        more = f", … {len(shown) - 6} more" if len(shown) > 6 else ""
        names = ", ".join(clipped(text) for text in shown[:6])
        text = f"Selection({counted(len(self), 'tensor')}, {self.numel:,} elements: {names}{more})"
        return "\n".join([text, *self._notes()])

    def _notes(self) -> list[str]:
        notes = [self.note] if self.note else []
        norms = [f"{path or 'the model'} ({type(self.model.get_submodule(path)).__name__})" for path in self.drifting]
        if norms:
            drifting = ", ".join(map(clipped, norms[:6])) + (f", … {len(norms) - 6} more" if len(norms) > 6 else "")
            text = f"frozen, but running statistics still change in training mode: {drifting}; .eval() stops them"
            notes.append(text)
        return [f"  note: {note}" for note in notes]


def _folded(names: Mapping[str, Any] | list[str]) -> tuple[str, ...]:
    return tuple(text for text, _ in fold(names))


def _assign(name: str, tensor: Tensor, value: Tensor | float, index: Any) -> None:
    import torch

    target = tensor.detach()
    where = name if index is None else f"{name}[{index}]"
    try:
        part = target if index is None else target[index]
    except (IndexError, TypeError) as error:
        raise LoadError(Diagnostic("bad-index", f"{where}: {error}")) from error
    if isinstance(value, torch.Tensor):
        mine, given = (TensorSpec(tuple(t.shape), t.dtype) for t in (part, value))
        if mine.shape != given.shape:
            raise LoadError(Diagnostic("shape-mismatch", f"{where} is {mine}, and {given} is offered"))
        if not is_lossless(given.dtype, mine.dtype):
            help = f"cast it yourself: value.to({tensor.dtype})"
            raise LoadError(Diagnostic("lossy-cast", f"{where} is {mine}, and {given} may not fit", help=help))
    elif not _holds(target.dtype, value):
        raise LoadError(Diagnostic("lossy-cast", f"{where} is {target.dtype}, which cannot hold {value}"))
    elif target.is_floating_point():
        value = float(value)  # torch refuses integers from 2^63 on
    with torch.no_grad():
        target.__setitem__(... if index is None else index, value)


def _holds(dtype: Any, value: float) -> bool:
    """Whether a number goes into the dtype with no more than rounding."""
    import torch

    if dtype.is_complex or dtype.is_floating_point:
        # inf and nan are values that one may well want; what overflows to them is not.
        return value != value or abs(value) == float("inf") or abs(value) <= torch.finfo(dtype).max
    if dtype == torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return value == value and abs(value) != float("inf") and int(value) == value and limits.min <= value <= limits.max
