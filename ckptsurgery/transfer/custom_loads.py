"""Modules whose loading is their own affair: what the source holds for them goes through torch's own machinery.

A trial on a copy shows, before the model is touched, what the module makes of it: which of its tensors it fills, from
what, which it lacks, what it has no use for. The copy is on the meta device, and takes the tensors by assignment, so
the trial costs no memory; only a module that will not be tried so is copied with its values.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic
from ..modeling.assigning import set_tensor
from ..modeling.places import places
from ..modeling.saved_names import loads_its_own, trial_copy
from ..specs import TensorSpec, dtype_name
from ..storage.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CustomLoad", "renamed_versions"]


@dataclass
class CustomLoad:
    """What one module is handed, and what it makes of it.

    Args:
        path: where it stands in the model.
        tensors: its part of the source, by its own names. sources: the source keys behind each.
        read: gives the tensors as the source holds them, once more.
        versions: the `_metadata` of the source, by its own paths.
        borrowed: names of tensors that the caller's own state_dict holds.
        states: the extra states of the module and of those below it.
        taken: target key -> what the trial left there. missing: target keys that it did not fill.
        unused: names of `tensors` that it has no place for. strays: names that its hooks made up, and has no place for.
        unfit: names of `tensors` that it refused, with their shape.
        casts: target key -> (from, to). refused: whether it cannot be loaded so at all.
        given: what the last trial was handed. assigned: whether its copy took the tensors themselves.
    """

    path: str
    tensors: dict[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    read: Callable[[], dict[str, Tensor]]
    versions: Mapping[str, Any] = field(default_factory=dict)
    borrowed: Collection[str] = ()
    states: Mapping[str, Any] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unfit: dict[str, Tensor] = field(default_factory=dict)
    casts: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)
    assigned: bool = True

    def unversioned(self, model: nn.Module) -> list[str]:
        """Modules whose own code goes by the version of the file, which tells none."""
        inside = model.get_submodule(self.path).named_modules()
        found = [(f"{self.path}.{p}".strip("."), m._version) for p, m in inside if loads_its_own(m)]
        return [f"{p or 'the model'!r} is of version {v}" for p, v in found if v not in (None, 1) and not self.versions]

    @property
    def title(self) -> str:
        """The module, for people."""
        return repr(self.path) if self.path else "the model"

    def key(self, name: str) -> str:
        """The name in the model."""
        return f"{self.path}.{name}" if self.path else name

    def trial(self, model: nn.Module, target: Mapping[str, TensorSpec]) -> list[Diagnostic]:
        """Load into a copy, and say what stands against it, but for what is missing, unused or unfit."""
        module = model.get_submodule(self.path)
        error = self._attempt(module)
        odd = [n for n, t in self.tensors.items() if _shape(target.get(self.key(n)), t) != tuple(t.shape)]
        if error is not None and odd:
            self.unfit = {n: self.tensors.pop(n) for n in odd}
            error = self._attempt(module)
        if error is not None:
            self.refused = True
            lines = str(error).splitlines() or [type(error).__name__]
            text = f"{self.title} loads in its own way, and refuses: {lines[0]}"
            return [Diagnostic("own-loading-failed", text, notes=tuple(lines[1:8]))]
        return []

    def _attempt(self, module: nn.Module) -> Exception | None:
        error: Exception | None = None
        for real in (False, True):
            given = self._state(trial=True)
            counts = {n: t._version for n, t in self.tensors.items() if n not in self.borrowed}
            try:
                twin = trial_copy(module, real)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of values that go nowhere, on the meta device
                    result = twin.load_state_dict(given, strict=False, assign=not real)
            except Exception as raised:  # a module's own code may raise anything
                error = raised
                continue
            finally:
                self._read_again([n for n, count in counts.items() if self.tensors[n]._version != count])
            missing = set(result.missing_keys)
            self.missing = [self.key(k) for k in result.missing_keys]
            self.unused = [k for k in result.unexpected_keys if k in self.tensors]
            self.strays = [
                self.key(k) for k in result.unexpected_keys if k not in self.tensors and k not in self.states
            ]
            self.given = {n: t for n, t in given.items() if n in self.tensors}
            self.assigned = not real
            self.taken = {self.key(p.name): p.tensor for p in places(twin) if p.persistent and p.name not in missing}
            return None
        return error

    def _read_again(self, names: Collection[str]) -> None:
        """Read tensors anew that the module's own code changed in place: it must find them as they were."""
        if names:
            fresh = self.read()
            self.tensors.update((n, fresh[n]) for n in names)

    def _state(self, trial: bool = False) -> OrderedDict[str, Any]:
        # what the caller's own state_dict holds may be changed in place by nobody
        state: OrderedDict[str, Any] = OrderedDict(
            (n, t.clone() if n in self.borrowed else t) for n, t in self.tensors.items()
        )
        state.update(copy.deepcopy(dict(self.states)) if trial else self.states)  # a trial may read a stream to its end
        if self.versions:
            state._metadata = OrderedDict(self.versions)  # type: ignore[attr-defined]
        return state

    def specs(self, target: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Each key of the model that the module took -> its spec there, in the dtype that its own code left it in."""
        found: dict[str, TensorSpec] = {}
        for key, tensor in self.taken.items():
            if key in target:
                # what is assigned keeps the dtype that the module's code left it in; a copy is cast to the module's
                arrived = tensor if self.assigned else self.tensors.get(self.name(key), tensor)
                found[key] = TensorSpec(target[key].shape, dtype_name(arrived.dtype))
        return found

    def name(self, key: str) -> str:
        """The module's own name of a key of the model."""
        return key[len(self.path) + 1 :] if self.path else key

    def behind(self, key: str) -> str | None:
        """Which of `tensors` a key was taken from: told by the name, or by the memory it lies in."""
        if self.name(key) in self.tensors:
            return self.name(key)
        tensor = self.taken[key]
        if tensor.is_meta or not tensor.numel():
            return None
        return next((n for n, t in self.given.items() if t.data_ptr() == tensor.data_ptr()), None)

    def origin(self, key: str) -> tuple[str, ...]:
        """The source keys behind a key that the module took, where that can be told."""
        name = self.behind(key)
        return self.sources[name] if name is not None else ()

    def withhold(self, keys: Collection[str]) -> list[Diagnostic]:
        """Take back what would fill these keys; a problem for each that the module fills all the same."""
        names = {k: self.behind(k) for k in keys}
        for key, name in names.items():
            if name is not None:
                self.tensors.pop(name, None)
                del self.taken[key]
        return [
            Diagnostic("own-loading-fills", f"{self.title} loads in its own way, and makes {key!r} of several tensors",
                       help="drop what it is made of in the source")
            for key, name in names.items() if name is None and key in self.taken
        ]  # fmt: skip

    def load(self, model: nn.Module, assign: bool) -> None:
        """Load for good."""
        self.given = {}
        state = self._state()
        for name in self.unused:
            del state[name]
        model.get_submodule(self.path).load_state_dict(state, strict=False, assign=assign)
        if assign and self.casts:
            now = {p.name: p.tensor for p in places(model)}
            for key, (_, want) in self.casts.items():
                set_tensor(model, key, now[key].detach().to(torch_dtype(want, key)), assign=True)


def _shape(spec: TensorSpec | None, tensor: Tensor) -> tuple[int, ...]:
    return tuple(spec.shape) if spec is not None else tuple(tensor.shape)


def renamed_versions(metadata: Mapping[Any, Any], sources: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """A state_dict's `_metadata` under other names: those of the modules whose tensors came to be called so.

    >>> renamed_versions({"module.fc": {"version": 2}, "module": {}}, {"fc.weight": ("module.fc.weight",)})
    {'fc': {'version': 2}, '': {}}
    """
    found: dict[str, Any] = {}
    for name, keys in sources.items():
        theirs, mine = keys[0].split("."), name.split(".")
        if len(keys) > 1 or theirs.pop() != mine.pop():
            continue
        while True:
            if ".".join(theirs) in metadata:
                found.setdefault(".".join(mine), metadata[".".join(theirs)])
            if not (mine and theirs and mine.pop() == theirs.pop()):
                break
    return found
