"""`[data]` of a recipe: lists of numbers in files beside it, read when an op asks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from ..errors import CkptSurgeryError, Diagnostic, RecipeError
from ..language.dims import is_number
from ..language.recipe import Recipe
from ..ops.listing import Listing
from ..specs import DTYPES

__all__ = ["DataEntry", "Numbers", "data_as_names", "data_given"]

Numbers = Listing | dict[str, Listing]
"""A list, or a table of lists by choice or index."""

_LARGEST = 256 << 20  # bytes of a text file
_KINDS = {"int": "i", "uint": "u", "float": "f"}


@dataclass(frozen=True)
class DataEntry:
    """One entry of `[data]`.

    >>> DataEntry("ids", [3, 1]).numbers, DataEntry("keep", {"0": [1], "1": [0, 2]}).numbers["1"][1]
    (<Listing ids: 2 numbers>, 2)

    Args:
        name: the entry's name.
        value: the path of a file, or in Python the numbers: a list, an array, a tensor, or a table of them.
        place: the file of the recipe; paths are relative to its folder.
    """

    name: str
    value: Any
    place: str | None = field(default=None, compare=False)

    @cached_property
    def numbers(self) -> Numbers:
        """The numbers.

        Raises:
            RecipeError: the file is missing, is not one of numbers, or lies outside of the recipe's folder.
        """
        found = self._read(self.value) if isinstance(self.value, str | os.PathLike) else self.value
        if isinstance(found, Mapping):
            return {str(key): self._listing(part, f"{self.name}.{key}") for key, part in found.items()}
        return self._listing(found, self.name)

    def _listing(self, value: Any, name: str) -> Listing:
        rows = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(map(is_number, rows)):
            raise self._error(f"{name} is not a list of numbers")
        whole = all(type(number) is int for number in rows)
        return Listing(rows if whole else map(float, rows), self.name)

    def _read(self, value: str | os.PathLike[str]) -> Any:
        path, _, key = os.fspath(value).partition("#")
        whole = self._located(path)
        try:
            match whole.suffix:
                case ".json" | ".txt":
                    if whole.stat().st_size > _LARGEST:
                        raise self._error(f"{path!r} is larger than {_LARGEST >> 20} MiB")
                    text = whole.read_text(encoding="utf-8")
                    return json.loads(text) if whole.suffix == ".json" else _numbers_in(text)
                case ".npy":
                    return _tensor(whole, "tensor")
                case ".safetensors" if key:
                    return _tensor(whole, key)
        except (OSError, ValueError, RecursionError) as error:
            raise self._error(f"{path!r} cannot be read: {error}") from None
        except CkptSurgeryError as error:
            raise self._error(error.diagnostics[0].headline) from None
        raise self._error(f"{os.fspath(value)!r} is not a file of numbers")

    def _located(self, path: str) -> Path:
        if self.place is None:
            return Path(path)
        inside = PurePath(path)
        if inside.is_absolute() or ".." in inside.parts:
            raise self._error(f"{path!r} is not in the folder of the recipe")
        return Path(self.place).parent / inside

    def _error(self, text: str) -> RecipeError:
        kinds = "a .npy, .json or .txt file of numbers beside the recipe, or file.safetensors#key"
        return RecipeError(Diagnostic("bad-data", f"data.{self.name}: {text}", place=self.place, help=kinds))


def data_as_names(recipe: Recipe) -> tuple[Recipe, list[dict[str, Any]]]:
    """Return a recipe whose `[data]` has names only, and the numbers of its parts, which `data_given` puts back.

    Raises:
        RecipeError: a file that is not there, or is not one of numbers.
    """
    told: list[dict[str, Any]] = []

    def names(one: Recipe) -> Mapping[str, Any]:
        found = {name: DataEntry(name, value, one.place).numbers for name, value in one.data.items()}
        told.append({n: {k: [*v] for k, v in x.items()} if isinstance(x, dict) else [*x] for n, x in found.items()})
        return {name: name for name in one.data}

    return _with_data(recipe, names), told if any(told) else []


def data_given(recipe: Recipe, numbers: Sequence[Mapping[str, Any]]) -> Recipe:
    """Return a recipe with these numbers as its `[data]`, those of its own, of its scopes, and of its stages."""
    given = iter(numbers)
    return _with_data(recipe, lambda one: next(given, {})) if numbers else recipe


def _with_data(recipe: Recipe, data: Callable[[Recipe], Mapping[str, Any]]) -> Recipe:
    own = data(recipe)
    scopes = tuple(replace(scope, recipe=_with_data(scope.recipe, data)) for scope in recipe.scopes)
    return recipe.replace(data=own, scopes=scopes, stages=tuple(_with_data(stage, data) for stage in recipe.stages))


def _numbers_in(text: str) -> list[int | float]:
    return [int(word) if word.lstrip("+-").isdecimal() else float(word) for word in text.split()]


def _tensor(path: Path, key: str) -> Any:
    """The numbers of a tensor of one dimension, as numpy has them."""
    import numpy as np

    from ..storage.places.opening import open as open_checkpoint

    with open_checkpoint(path) as checkpoint:
        spec = checkpoint[key].spec
        row = DTYPES[spec.dtype]
        if row.kind not in _KINDS or len(spec.shape) != 1 or (row.kind == "float" and spec.dtype[0] == "B"):
            raise ValueError(f"{key!r} is {spec}, and not a list of numbers")
        code = f"{_KINDS[row.kind]}{row.itemsize}"
        return np.frombuffer(checkpoint.read(key), code)
