"""What modules save beside tensors (`get_extra_state`): handed to them as torch would hand it, or refused by name.

A file's value is an inert record. Only what can be made of it without running anything of the file is made: plain
values, containers, tensors, dtypes, devices and byte streams.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError, Remedy
from ..language.captures import escape
from ..planning.plan import Plan
from ..planning.steps import cut
from ..running.beside import moved_modules
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Entry
from ..storage.unpickling.inert import Blob, FileBytes, Opaque, Ordered
from ..storage.unpickling.nodes import is_state
from ..wording import counted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ExtraStates", "collected", "states_of"]

_SUFFIX = "_extra_state"
_DEEPEST = 64


@dataclass
class ExtraStates:
    """The extra states of one load.

    Args:
        values: key in the model -> what its module is handed.
        owners: key in the model -> the module that takes one.
        unbuilt: source key -> why nothing can be made of it. unplaced: source keys that no module takes.
        aside: keys in the model that the caller set aside.
    """

    values: dict[str, Any] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)
    unbuilt: dict[str, str] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    def add(self, key: str, source: str, value: Any, checkpoint: Checkpoint) -> None:
        """Take the state of one module, if it takes one."""
        if key not in self.owners:
            self.unplaced.append(source)
            return
        try:
            self.values[key] = _built(value, checkpoint, 0)
        except _UnbuiltError as error:
            self.unbuilt[source] = str(error)

    def problems(self, partial: bool) -> list[Diagnostic]:
        """The states that cannot be made without running what the file says."""
        if not self.unbuilt or partial:
            return []
        return [
            Diagnostic(
                "extra-state-unbuilt",
                f"{counted(len(self.unbuilt), 'extra state')} of the source would take running code of its own",
                notes=tuple(f"{key}: {why}" for key, why in list(self.unbuilt.items())[:8]),
                remedies=(Remedy("drop", [*map(escape, self.unbuilt)], "loads without"),),
            )
        ]

    def notes(self) -> list[str]:
        """What could not go along, and what was set, for people."""
        missing = [k for k in self.owners if k not in self.values and k not in self.aside]
        found = [f"extra state of {_module(k)} set" for k in self.values]
        found += [f"the source has no extra state for {_module(k)}" for k in missing]
        found += [f"left behind: {k}, no module of the model takes it" for k in self.unplaced]
        return found + [f"left behind: {k}, {why}" for k, why in self.unbuilt.items()]

    def under(self, path: str) -> dict[str, Any]:
        """The states of a module and of those below it, by its own names."""
        before = f"{path}." if path else ""
        return {k[len(before) :]: v for k, v in self.values.items() if k.startswith(before)}

    def hand(self, done: Iterable[str], written: Sequence[str]) -> None:
        """Call `set_extra_state` once for each module, but for those that were handed theirs already.

        Args:
            written: the keys that are loaded by now.
        """
        handed = set(done)
        for key, value in self.values.items():
            try:
                if key not in handed:
                    self.owners[key].set_extra_state(value)
            except Exception as error:  # whatever the module's own code raises
                text = f"the tensors are loaded, and {_module(key)} refuses its extra state: {error!r}"
                raise LoadError(Diagnostic("extra-state-refused", text), written=written) from error


def states_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that take extra state, by the key that it has in a state_dict."""
    from torch import nn

    return {
        f"{path}.{_SUFFIX}".lstrip("."): module
        for path, module in model.named_modules()
        if type(module).set_extra_state is not nn.Module.set_extra_state
    }


def collected(
    plan: Plan,
    checkpoint: Checkpoint,
    owners: dict[str, nn.Module],
    named: Collection[str],
    dropped: Collection[str],
    without: Collection[str],
) -> tuple[ExtraStates, Plan]:
    """The extra states that a source holds for the modules of a model, and the plan without those it made as tensors.

    Args:
        owners: as `states_of` finds them. named: what the caller initialises or keeps. dropped: what the source
            holds in vain.
        without: source keys that the caller does without.
    """
    from ..running.executor.programs import run_step

    states = ExtraStates(owners=owners)
    stored = {key: value for key, value in checkpoint.extras.items() if is_state(key) and key not in without}
    moved = moved_modules(plan) if stored else {}
    found: dict[str, tuple[str, Any]] = {}
    for source, value in stored.items():
        path = source.rpartition(".")[0]
        found[f"{moved.get(path, path)}.{_SUFFIX}".lstrip(".")] = source, value
    tensors = owners.keys() & plan.specs.keys()
    for step in plan.steps if tensors else ():
        for key in tensors.intersection(step.targets):
            found[key] = step.sources[0], run_step(step, checkpoint.load)[step.targets.index(key)]
    for key, (source, value) in found.items():
        if any(k == p or k.startswith(p + ".") for p in (*named, *dropped) for k in (key, source)):
            states.aside.append(key)
            if any(k == p or k.startswith(p + ".") for p in dropped for k in (key, source)):
                tensors.discard(key)  # the plan's, to be told with all else that is dropped
        else:
            states.add(key, source, value, checkpoint)
    if not tensors:
        return states, plan
    steps = [part for step in plan.steps for part in cut(step, set(step.targets) - tensors)]
    specs = {k: s for k, s in plan.specs.items() if k not in tensors}
    return states, replace(plan, steps=tuple(steps), specs=specs)


def _module(key: str) -> str:
    return repr(key.rpartition(".")[0]) if "." in key else "the model"


class _UnbuiltError(Exception):
    """Something that only running code of the file could make."""


def _built(value: Any, checkpoint: Checkpoint, depth: int) -> Any:
    """Return the object that torch would have made of a record."""
    if depth > _DEEPEST:
        raise _UnbuiltError("it nests without end")
    kind = type(value)
    if kind is Entry:
        return checkpoint.tensor_at(value)
    if kind is Blob:
        return value.read()
    if kind is Opaque:
        return _object(value, checkpoint, depth)
    if kind is Ordered:
        made = OrderedDict((k, _built(v, checkpoint, depth + 1)) for k, v in value.items())
        vars(made).update(value.attributes)
        return made
    if kind is dict:
        parts = {k: _built(v, checkpoint, depth + 1) for k, v in value.items()}
        return value if all(a is b for a, b in zip(parts.values(), value.values())) else parts
    if kind in (list, tuple):
        items = [_built(v, checkpoint, depth + 1) for v in value]
        return value if all(a is b for a, b in zip(items, value)) else kind(items)
    if isinstance(value, FileBytes):
        return bytes(value)
    return value


def _object(value: Opaque, checkpoint: Checkpoint, depth: int) -> Any:
    import torch

    if value.path in ("_io.BytesIO", "io.BytesIO") and value.args == () and type(value.state) is tuple:
        content, position, *_ = (_built(part, checkpoint, depth + 1) for part in value.state)
        if isinstance(content, bytes) and type(position) is int and position >= 0:
            stream = io.BytesIO(content)
            stream.seek(position)
            return stream
    if value.module == "torch" and value.args is None:
        found = getattr(torch, value.name, None)
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
    args = value.args if value.path == "torch.device" and type(value.args) is tuple else ()
    if args and type(args[0]) is str and all(type(a) is int for a in args[1:]):
        try:
            return torch.device(*args)
        except RuntimeError as error:
            raise _UnbuiltError(str(error).splitlines()[0]) from None
    raise _UnbuiltError(f"it holds {value!r}")
