"""Initialisers by name: those of torch.nn.init, timm's `trunc_normal_tf` and kin, `default`, `own`, a user's callable.

An initialiser is a small frozen object, checked without torch (`check` takes a spec) and applied with it (`apply` takes
a tensor and a generator). What they fill it with is in `formulas`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..specs import DTYPES, TensorSpec
from .base import OpError
from .formulas import FORMULAS, of_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["INITIALISERS", "Initialiser", "is_word"]

INITIALISERS: tuple[str, ...] = tuple(FORMULAS)
"""The names that `Initialiser.of` knows."""

# How many dimensions a tensor must have, least and most; fans need two.
_DIMENSIONS = {
    "dirac": (3, 5),
    "eye": (2, 2),
    "sparse": (2, 2),
    "orthogonal": (2, 99),
    **{n: (2, 99) for n in INITIALISERS if n.startswith(("xavier", "kaiming", "lecun", "variance"))},
}
_ANY_DTYPE = {"constant", "ones", "zeros", "eye", "dirac", "default", "own"}
_GAINS = ("linear", "conv1d", "conv2d", "conv3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
_CHOICES = {
    "mode": ("fan_in", "fan_out"),
    "distribution": ("normal", "truncated_normal", "uniform"),
    "nonlinearity": (*_GAINS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


@dataclass(frozen=True)
class Initialiser:
    """How one tensor gets its first values.

    >>> Initialiser.of("trunc_normal_", (), {"std": 0.02})
    Initialiser('trunc_normal(std=0.02)')
    >>> str(Initialiser.of("normal", (0.0, 0.02)))
    'normal(std=0.02)'

    `of` reads a name with its arguments, `wrap` takes a callable. `default` and `own` are markers: what the model's own
    hooks give, and what its constructor built; whoever holds the model carries them out.

    Args:
        name: one of `INITIALISERS`, or the callable's name.
        arguments: `(name, value)` pairs in the order of the formula, those that differ from the default.
        function: the user's callable, called with a tensor and a generator.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    function: Callable[..., Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, args: Iterable[Any] = (), keywords: Mapping[str, Any] | None = None) -> Initialiser:
        """The initialiser of this name, its arguments checked; a trailing underscore of the name is tolerated.

        Raises:
            OpError: unknown name or argument (the nearest one is suggested), or a value out of its range.
        """
        plain = name.removesuffix("_")
        if plain not in FORMULAS:
            raise OpError(f"no initialiser is called {name!r}", _near(plain, INITIALISERS))
        given = _bind(plain, tuple(args), dict(keywords or {}))
        _check_values(plain, given)
        defaults = _parameters(plain)
        return cls(plain, tuple((n, given[n]) for n in defaults if n in given and given[n] != defaults[n].default))

    @classmethod
    def wrap(cls, function: Callable[..., Any]) -> Initialiser:
        """A callable as an initialiser: `f(tensor, generator)`, or `f(tensor)`, which draws from the global generators.

        It fills the tensor in place, or returns one of the same shape.
        """
        if not callable(function):
            raise OpError(f"{function!r} is neither an initialiser's name nor a callable")
        return cls(getattr(function, "__name__", type(function).__name__), (), function)

    @property
    def by_module(self) -> bool:
        """Whether only the module that owns the tensor can carry it out."""
        return self.function is None and self.name in ("default", "own")

    @property
    def least_dimensions(self) -> int:
        """How many dimensions a tensor must have: two for a formula of fans."""
        return 0 if self.function is not None else _DIMENSIONS.get(self.name, (0, 99))[0]

    def check(self, spec: TensorSpec) -> None:
        """Whether it can fill a tensor of this spec; no torch here.

        Raises:
            OpError: too few or too many dimensions, or a dtype that it cannot draw.
        """
        if self.function is not None or self.by_module:
            return
        least, most = _DIMENSIONS.get(self.name, (0, 99))
        if not least <= len(spec.shape) <= most:
            wanted = f"at least {least}" if most == 99 else " to ".join(str(n) for n in sorted({least, most}))
            raise OpError(f"{self} needs {wanted} dimensions, and {spec} has {len(spec.shape)}")
        kind = DTYPES[spec.dtype].kind
        given = dict(self.arguments)
        if self.name not in _ANY_DTYPE and kind != "float" and not (kind == "complex" and self.name == "normal"):
            raise OpError(f"{self} draws floating point numbers, and not {spec.dtype}")
        if self.name == "constant" and kind in ("int", "uint", "bool") and given["val"] != int(given["val"]):
            raise OpError(f"{self} cannot be held by {spec.dtype}")
        if self.name == "dirac" and spec.shape[0] % given.get("groups", 1):
            raise OpError(f"{self}: {spec.shape[0]} output channels do not fall into {given['groups']} groups")

    def apply(self, tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fill `tensor` in place and return it.

        The values depend on shape, dtype and the generator's state, not on the tensor's memory layout. For the formulas
        of torch.nn.init they are bit for bit what torch draws with the same generator into a contiguous tensor.

        Raises:
            OpError: as `check`; `default` or `own`; a callable that returns another shape.
        """
        import torch

        self.check(TensorSpec(tuple(tensor.shape), tensor.dtype))
        if self.by_module:
            of_module(tensor, generator)
        if tensor.numel() == 0 or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if self.function is not None:
                self._call(self.function, tensor, generator)
                return tensor
            dtype = self._working_dtype(tensor.dtype)
            direct = tensor.is_contiguous() and dtype == tensor.dtype
            # Drawn values follow memory order: a fresh contiguous tensor makes them independent of the strides.
            work = tensor.detach() if direct else torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
            FORMULAS[self.name](work, generator, **dict(self.arguments))
            if not direct:
                tensor.copy_(work)
        return tensor

    def _working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 where torch has no kernel for the dtype: QR below 32 bits, anything random below 16."""
        import torch

        narrow = 4 if self.name == "orthogonal" else 2
        return torch.float32 if dtype.is_floating_point and dtype.itemsize < narrow else dtype

    def _call(self, function: Callable[..., Any], tensor: Tensor, generator: torch.Generator | None) -> None:
        import torch

        how = _takes_generator(function)
        if how == "keyword":
            made = function(tensor, generator=generator)
        else:
            made = function(tensor, generator) if how == "position" else function(tensor)
        if isinstance(made, torch.Tensor) and made is not tensor:
            if made.shape != tensor.shape:
                raise OpError(f"{self} returned {list(made.shape)} for a tensor of {list(tensor.shape)}")
            tensor.copy_(made)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.name}({shown})" if shown else self.name

    def __repr__(self) -> str:
        return f"Initialiser({str(self)!r})"


def is_word(text: str) -> bool:
    """Whether a text names a choice of an argument, such as a mode or a nonlinearity.

    >>> is_word("fan_in"), is_word("width")
    (True, False)
    """
    return text in {"fan_avg", *(word for words in _CHOICES.values() for word in words)}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(FORMULAS[name]).parameters.items())[2:])


def _bind(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    wanted = _parameters(name)
    takes = f"{name} takes {', '.join(wanted)}" if wanted else f"{name} takes no arguments"
    if len(args) > len(wanted):
        raise OpError(f"{len(args)} arguments are too many: {takes}")
    given = dict(zip(wanted, args))
    for key, value in keywords.items():
        if key not in wanted:
            raise OpError(f"{name} has no argument {key!r}; {takes}", _near(key, wanted))
        if key in given:
            raise OpError(f"{name} is given {key!r} twice")
        given[key] = value
    missing = [n for n, p in wanted.items() if p.default is p.empty and n not in given]
    if missing:
        raise OpError(f"{name} needs {', '.join(missing)}, as in {name}({missing[0]}=0.5)")
    return given


def _check_values(name: str, given: dict[str, Any]) -> None:
    for key, value in given.items():
        choices = _CHOICES.get(key, _GAINS if key == "gain" and isinstance(value, str) else ())
        if key == "mode" and name == "variance_scaling":
            choices = (*choices, "fan_avg")
        if choices:
            if value not in choices:
                text = f"{name}: {key} is one of {', '.join(choices)}, not {value!r}"
                raise OpError(text, _near(value, choices))
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OpError(f"{name}: {key} is a finite number, not {value!r}")
    if given.get("std", 1.0) < 0 or (given.get("std") == 0 and name == "trunc_normal"):
        raise OpError(f"{name}: std is above 0, not {given['std']}")
    if not 0 <= given.get("sparsity", 0.0) <= 1:
        raise OpError(f"{name}: sparsity is a fraction from 0 to 1, not {given['sparsity']}")
    groups = given.get("groups", 1)
    if not isinstance(groups, int) or groups < 1:
        raise OpError(f"{name}: groups is a positive integer, not {groups!r}")
    if given.get("scale", 1.0) <= 0:
        raise OpError(f"{name}: scale is above 0, not {given['scale']}")
    parameters = _parameters(name)
    if {"a", "b"} <= parameters.keys():
        a, b = (given.get(n, parameters[n].default) for n in ("a", "b"))
        if a > b or (a == b and name != "uniform"):
            raise OpError(f"{name}: a is below b, and {a} is not below {b}")


def _takes_generator(function: Callable[..., Any]) -> str | None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    if "generator" in parameters:
        return "keyword"
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return "position" if len(places) >= 2 and places[1].default is inspect.Parameter.empty else None


def _near(word: object, known: Iterable[str]) -> dict[str, list[str]]:
    near = difflib.get_close_matches(str(word), list(known), 1, 0.6)
    return {str(word): near} if near else {}
