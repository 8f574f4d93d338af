"""The initialisers that the caller of a load names, tensor by tensor where a layer has tensors of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CkptSurgeryError, Diagnostic
from ..language.folding import fold
from ..modeling.initialising import read_initialiser
from ..modeling.meant_parts import absent_parts, meant_of
from ..planning.naming import below
from ..wording import clipped

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["meant_inits"]


class MeantInits(NamedTuple):
    """What the initialisers of a load mean.

    Args:
        inits: path, key or pattern -> initialiser.
        notes: what they leave as built, for people.
        problems: those that are no initialisers.
    """

    inits: Mapping[str, Any]
    notes: Sequence[str] = ()
    problems: Sequence[Diagnostic] = ()


def meant_inits(model: nn.Module, tensors: Mapping[str, Tensor], inits: Mapping[str, Any]) -> MeantInits:
    """Return the initialisers by what each means for the layers it names, and notes of what it leaves as built.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    >>> meant_inits(net, net.state_dict(), {"0": "xavier_uniform"}).inits
    {'0.weight': 'xavier_uniform', '0.bias': 'own'}
    >>> meant_inits(net, net.state_dict(), {"1": {"weight": "ones", "bias": "zeros"}}).inits
    {'1': {'weight': 'ones'}}

    Args:
        tensors: those of the model by name, buffers too.
        inits: path, key or pattern -> initialiser. Entries that name nothing are returned as they are.
    """
    problems = list(chain.from_iterable(map(_problems, inits.values())))
    if problems:
        return MeantInits(inits, problems=problems)
    named = {path: _named(path, tensors) for path in inits}
    chosen = {path: meant_of({name: tensors[name] for name in named[path]}, what) for path, what in inits.items()}
    whole = {name for path in inits if len(chosen[path]) == len(named[path]) for name in named[path]}
    meant: dict[str, Any] = {}
    notes = []
    for path, what in inits.items():
        left = [name for name in named[path] if name not in chosen[path] and name not in whole]
        if len(chosen[path]) < len(named[path]):
            meant |= dict.fromkeys(chosen[path], what)
            meant |= {name: "default" if tensors[name].is_meta else "own" for name in left}
        elif isinstance(what, Mapping):
            absent = absent_parts(model, named[path])
            meant[path] = {leaf: each for leaf, each in what.items() if leaf not in absent}
        else:
            meant[path] = what
        if left:
            shown = ", ".join(text for text, _ in fold(left))
            notes.append(clipped(f"{what} is for matrices; as constructed: {shown}", 300))
    return MeantInits(meant, notes)


def _named(path: str, tensors: Mapping[str, Tensor]) -> list[str]:
    try:
        return below(path, tensors)
    except CkptSurgeryError:  # told with the other problems of the load
        return []


def _problems(what: Any) -> Iterator[Diagnostic]:
    for each in what.values() if isinstance(what, Mapping) else (what,):
        try:
            read_initialiser(each)
        except CkptSurgeryError as error:
            yield from error.diagnostics
