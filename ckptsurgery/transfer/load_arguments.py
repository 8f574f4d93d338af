"""The arguments of a load, checked by themselves before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError, Remedy
from ..planning.options import DTYPE_POLICIES, LoadOptions
from ..storage.checkpoint import Checkpoint
from ..storage.sources.links import as_device

if TYPE_CHECKING:
    from torch import nn

__all__ = ["asked", "check_assigned", "listed", "own_config", "tolerated_keys", "unused_dims"]


def listed(argument: str, what: Any) -> tuple[str, ...]:
    """The paths that an argument names: one, or several.

    Raises:
        LoadError: they are not strings.
    """
    if what is None or isinstance(what, str):
        return (what,) if what is not None else ()
    paths = tuple(what) if isinstance(what, Iterable) else (what,)
    if not all(isinstance(path, str) for path in paths):
        help = f'{argument}="head", or a list of such paths'
        raise LoadError(Diagnostic("bad-argument", f"{argument}={what!r} names no part of a model", help=help))
    return paths


def asked(
    init: Any, keep: Any, drop: Any, mismatch: str, dtype: str, partial: bool | str, assign: bool | None, device: Any,
    check_values: bool, seed: int, progress: bool | None,
) -> LoadOptions:  # fmt: skip
    """Return the options of a load, after a check of each by itself.

    Raises:
        LoadError: an argument has a value that is not known.
    """
    inits = dict(init) if isinstance(init, Mapping) else dict.fromkeys(listed("init", init), "default")
    _check_paths(inits)
    for name, value, known in (("mismatch", mismatch, ("error", "init", "keep")), ("dtype", dtype, DTYPE_POLICIES)):
        if value not in known:
            near = get_close_matches(str(value), known, 1)
            instead = (Remedy(name, {str(value): near}, kind="instead"),) if near else ()
            advice = "one of " + ", ".join(map(repr, known))
            raise LoadError(Diagnostic("bad-argument", f"{name}={value!r}", remedies=instead, advice=advice))
    if isinstance(partial, str) and partial != "stages":
        stages = Remedy("partial", {partial: ["stages"]}, kind="instead")
        raise LoadError(Diagnostic("bad-argument", f"partial={partial!r}", remedies=(stages,), advice="or True"))
    if not isinstance(seed, int):
        raise LoadError(Diagnostic("bad-argument", f"seed={seed!r} is not an integer", help="seed=0"))
    where = as_device(device) if device is not None else None
    kept, dropped = listed("keep", keep), listed("drop", drop)
    fits = bool(partial) and partial != "stages"
    return LoadOptions(inits, kept, dropped, mismatch, dtype, fits, assign, where, check_values, seed, progress)


def _check_paths(inits: Mapping[Any, Any]) -> None:
    """Refuse initialisers by a module type or an index, which `select` takes and a load does not."""
    odd = next((key for key in inits if not isinstance(key, str)), None)
    if odd is not None:
        shown = getattr(odd, "__name__", repr(odd))
        text = f"init={{{shown}: …}}: a load takes initialisers by path, key or pattern"
        help = f"keep the part, and after the load cs.select(model, {shown}).init_(…)"
        raise LoadError(Diagnostic("bad-argument", text, help=help))


def check_assigned(options: LoadOptions) -> None:
    """Check that what is asked for goes together.

    Raises:
        LoadError: the source's dtypes are asked for, and a copy is made.
    """
    if options.dtype == "source" and not options.assign:
        text = 'dtype="source" keeps the source\'s dtype, which a copy cannot'
        raise LoadError(Diagnostic("bad-argument", text, remedies=(Remedy("assign", True),)))


def unused_dims(dims: Mapping[str, Any] | None) -> list[Diagnostic]:
    """Return a problem for each size that is given without a recipe to ask for it."""
    return [
        Diagnostic("unused-dim", f"a size is given for {name!r}, and nothing asks for it", help="leave it out")
        for name in dims or ()
    ]


def own_config(model: nn.Module) -> Mapping[str, Any] | None:
    """Return the model's own config, where it has one that can be read."""
    to_dict: Any = getattr(getattr(model, "config", None), "to_dict", None)
    return to_dict() if callable(to_dict) else None


def tolerated_keys(checkpoint: Checkpoint, target: Iterable[str]) -> set[str]:
    """Return the counters of a model that files written before they existed do not have."""
    counters = {k for k in target if k.endswith("num_batches_tracked")}
    if not counters or any(k.endswith("num_batches_tracked") for k in checkpoint.specs):
        return set()
    metadata = checkpoint.extras.get("_metadata")
    versions = metadata if isinstance(metadata, Mapping) else {}
    modern = any(isinstance(v, Mapping) and (v.get("version") or 0) >= 2 for k, v in versions.items() if k)
    return set() if modern else {k for k in counters if k.rpartition(".")[2] == "num_batches_tracked"}
