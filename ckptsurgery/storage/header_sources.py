"""Specs without data as a checkpoint: to plan, to match and to infer, where the tensors themselves are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import CheckpointError, Diagnostic
from ..specs import TensorSpec
from .contents import Contents, Entry

__all__ = ["NoData", "is_headers", "read_headers"]


@dataclass(frozen=True, slots=True)
class NoData:
    """Stands for a tensor of which only the header is known; to ask for its values is an error."""

    key: str

    def __call__(self) -> NoReturn:
        raise CheckpointError(
            Diagnostic(
                "no-data",
                f"of {self.key!r} only shape and dtype are known",
                self.key,
                help="open the checkpoint itself",
            )
        )


def is_headers(source: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds specs and nothing else.

    >>> is_headers({"w": TensorSpec([2], "F32")}), is_headers({})
    (True, False)
    """
    return bool(source) and all(type(value) is TensorSpec for value in source.values())


def read_headers(specs: Mapping[str, TensorSpec]) -> Contents:
    """A checkpoint of specs."""
    return Contents({key: Entry(spec, tensor=NoData(key)) for key, spec in specs.items()})
