"""What an op is: a small frozen object that infers specs without torch and runs on tensors with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ..errors import Remedy
from ..specs import TensorSpec
from .listing import Listing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AxisPlace",
    "BlockFacts",
    "ElementRun",
    "Op",
    "OpError",
    "OpPart",
    "SourceNote",
    "Specs",
    "Tensors",
    "Unchanged",
]

Specs = tuple[TensorSpec, ...]
Tensors = tuple["Tensor", ...]


class BlockFacts(Protocol):
    """Facts of a block, a number, a tensor or a tuple, which add up to those of whole tensors."""

    def __add__(self, other: Any, /) -> Any: ...


class OpError(ValueError):
    """An op cannot take these arguments or these specs; the planner adds rule and key.

    Args:
        instead: a word that was misspelt -> the words that are like it.
        lacks: a name or a formula that has no number.
        code: of the diagnostic, with its help, where another one than `bad-op` names the problem.
    """

    def __init__(
        self,
        text: str,
        instead: Mapping[str, Sequence[str]] | None = None,
        lacks: str | None = None,
        code: str = "bad-op",
        help: str | None = None,
    ) -> None:
        super().__init__(text)
        self.code, self.help = code, help
        self.instead = dict(instead or {})
        self.lacks = lacks

    def remedies(self, argument: str) -> tuple[Remedy, ...]:
        """Return the words that are like a misspelt one, to be put into an argument in its place."""
        return (Remedy(argument, self.instead, kind="instead"),) if self.instead else ()


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """Where an axis is in a tensor: alone in a dimension, or between others that are merged with it.

    Args:
        dim: the dimension.
        outer, size, inner: elements of the axes before it in the dimension, of itself, and of those after it.
    """

    dim: int
    outer: int
    size: int
    inner: int


@dataclass(frozen=True, slots=True)
class SourceNote:
    """BlockFacts about a source tensor beside its spec, for an op that reads ahead.

    Args:
        content: the bytes of the tensor, where it is small.
        packing: the name of the blocks that its bytes are, where the format has one, such as `"Q4_K"`.
    """

    content: bytes | None = None
    packing: str | None = None


@dataclass(frozen=True, slots=True)
class ElementRun:
    """A run of a tensor's elements.

    Args:
        start: the first element.
        spec: shape and dtype of the run, as an op takes or makes it.
    """

    start: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class OpPart:
    """An op that makes a run of each result of another op, of a run of each of its sources."""

    op: Op
    sources: tuple[ElementRun, ...]
    results: tuple[ElementRun, ...]


@dataclass(frozen=True)
class Op:
    """Base of the value ops: subclass as a frozen dataclass whose fields are the op's arguments.

    A unary op (`joins = False`) is applied to each tensor alone: `infer` and `run` get one and return one. A joining op
    gets all tensors of its side at once, in the order of the rule's text.

    An op over an axis (`axis_role`) names an axis that stands on one side of the rule only. `"reduce"`: the tensor
    arrives with that axis in front and leaves without it. `"repeat"`: the axis is added by the rearrangement itself,
    nothing runs. `"along"`: the axis stands on both sides and gets another size; planning calls `placed` with its place
    and runs what that returns.
    """

    name: ClassVar[str] = ""
    joins: ClassVar[bool] = False
    axis_role: ClassVar[Literal["reduce", "repeat", "along"] | None] = None
    elementwise: ClassVar[bool] = False
    """Whether each element of the result depends on the same element of one tensor alone: such ops run in chunks."""
    reads_ahead: ClassVar[tuple[int, ...]] = ()
    """Places of sources whose notes planning passes to `told`, where a shape depends on more than specs."""
    undone_by: ClassVar[str | None] = None
    """What stands before the op's only argument in its inverse, where the argument is a name or a formula: `"-"`."""

    def infer(self, specs: Specs) -> Specs:
        """Return the specs after the op from those before it, without torch.

        Raises:
            OpError: the op cannot take these specs.
        """
        raise OpError(f"{self.name or type(self).__name__} does not say what it makes of {', '.join(map(str, specs))}")

    def run(self, tensors: Tensors) -> Tensors:
        """Return the tensors after the op, contiguous or not, of exactly the specs that `infer` returned."""
        raise OpError(f"{self.name or type(self).__name__} cannot run")

    def run_into(self, tensors: Tensors, rooms: Sequence[Tensor | None]) -> Tensors:
        """Return the results of `run`, made in given memory where the op can do that.

        Args:
            rooms: contiguous memory of each result's spec, or None.
        """
        return self.run(tensors)

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        """Return ops on runs of the sources that make the results run by run, or None where it needs whole tensors.

        Args:
            specs: of the sources.
            limit: elements of a result that a part should make.
        """
        return None

    def packing(self) -> str | None:
        """Return the type of the blocks that the result's bytes form, such as `"Q8_0"`; None for plain elements."""
        return None

    def surveys(self, specs: Specs) -> int:
        """How often an elementwise op that joins reads whole tensors before it runs: 0 for most.

        Each pass gives blocks to `survey`, in any order, and the sum of its results, in the blocks' order, to `after`.
        """
        return 0

    def survey(self, tensors: Tensors) -> BlockFacts:
        """BlockFacts of blocks of the tensors."""
        raise OpError(f"{self.name} surveys nothing")

    def after(self, facts: BlockFacts) -> Op:
        """The op with the facts of whole tensors, which surveys once less."""
        raise OpError(f"{self.name} surveys nothing")

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        """Return the op that undoes this one, or None.

        Without `inputs` the question is symbolic: would the formula's inverse undo it but for rounding? With `inputs`,
        the specs this op ran on, the answer must be exact, bit for bit.
        """
        return None

    def on_moments(self) -> Op | None:
        """Return the op that a parameter's moments undergo where the parameter undergoes this one, or None.

        A moment is a running mean of gradients, or of their squares, that starts at zero. None where no op is exact:
        where values are mixed or scaled, or where one entry becomes several, each with a gradient of its own.
        """
        return None

    @classmethod
    def undone_as(cls, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """Return name and arguments of the inverse where some of the arguments are names, or None.

        Args:
            given: the arguments as the rule writes them, by field.
        """
        return None

    def ordered(self, choices: Sequence[tuple[str, ...]]) -> Op:
        """The op with arguments by choice in the order of the choices, of an op over an axis.

        Args:
            choices: the lists of choices of its axis, as either side of the rule spells them.
        """
        return self

    def told(self, notes: Sequence[SourceNote]) -> Op:
        """The op with what follows from notes on its sources, one for each place in `reads_ahead`.

        Raises:
            OpError: a source that is not what the op takes.
        """
        return self

    def placed(self, place: AxisPlace) -> Op:
        """The op for an axis at this place of each tensor, of an op whose `axis_role` is `"along"`."""
        raise OpError(f"{self.name} does not work along an axis")

    def __str__(self) -> str:
        """The op as a rule writes it: arguments that have their default are left out."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        shown = [f"{name}={_argument(getattr(self, name))}" for name in given]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class Unchanged(Op):
    """Pass tensors on; what becomes of moments where an op changes a parameter, and not its gradient."""

    joins = True

    def infer(self, specs: Specs) -> Specs:
        return specs

    def run(self, tensors: Tensors) -> Tensors:
        return tensors


def _argument(value: object) -> str:
    if isinstance(value, Listing):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str):
        return value if value.isidentifier() else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
