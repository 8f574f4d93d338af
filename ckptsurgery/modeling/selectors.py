"""Which tensors of a model a word means: a name, a module's path, a pattern, a type, a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError, Remedy
from ..language.folding import fold
from ..language.keys import KeyPattern
from .places import close_names, named_tensors, places

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["matching_modules", "matching_names"]


def matching_names(model: nn.Module, what: object, buffers: bool = False, allow_empty: bool = False) -> list[str]:
    """The names that `what` means, in state_dict order.

    Args:
        what: the full name of a tensor; the path of a module, for its whole subtree; a key pattern; a module or a
            parameter of this model; a module type or a tuple of types; a predicate of name and tensor; or a mapping
            whose keys are names, such as another selection.
        buffers: whether buffers count.
        allow_empty: whether nothing is an answer.

    Raises:
        LoadError: nothing matches; the names that come close are listed.
        RecipeError: the pattern does not parse.
    """
    tensors = named_tensors(model, buffers)
    found = _found(model, what, tensors)
    if not found and not allow_empty and not _is_one_module(model, what):
        raise LoadError(_nothing(model, what, tensors, buffers))
    return [name for name in tensors if name in found]


def _is_one_module(model: nn.Module, what: object) -> bool:
    """Whether a module is named by its index or by itself: then an empty one is meant."""
    from torch import nn

    if isinstance(what, int) and not isinstance(what, bool):
        return True
    return isinstance(what, nn.Module) and any(module is what for module in model.modules())


def _found(model: nn.Module, what: object, tensors: Mapping[str, Tensor]) -> set[str]:
    from torch import Tensor, nn

    if isinstance(what, str):
        return _by_text(model, what, tensors)
    if isinstance(what, int) and not isinstance(what, bool):
        return _below(tensors, [_child(model, what)])
    if isinstance(what, Tensor):
        return {name for name, tensor in tensors.items() if tensor is what}
    if isinstance(what, nn.Module):
        return _below(tensors, (p for p, m in model.named_modules(remove_duplicate=False) if m is what))
    if isinstance(what, Mapping):
        return set(what) & tensors.keys()
    if isinstance(what, type | tuple):
        types = what if isinstance(what, tuple) else (what,)
        wrong = [t for t in types if not (isinstance(t, type) and issubclass(t, nn.Module))]
        if wrong or not types:
            raise _unusable(wrong[0] if wrong else what)
        return _below(tensors, (p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, types)))
    if callable(what):
        predicate: Callable[[str, Any], Any] = what
        return {name for name, tensor in tensors.items() if predicate(name, tensor)}
    raise _unusable(what)


def _by_text(model: nn.Module, text: str, tensors: Mapping[str, Tensor]) -> set[str]:
    if text in tensors:
        return {text}
    if text and any(path == text for path, _ in model.named_modules(remove_duplicate=False)):
        return _below(tensors, [text])
    if "{" not in text and "\\" not in text:
        return set()
    pattern = KeyPattern.parse(text)
    # A name that can be read in two ways is matched all the same: the captures are not used.
    return {name for name in tensors if pattern.readings(name)}


def matching_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Path -> module for the modules whose whole path matches, in the order in which the model holds them."""
    parsed = KeyPattern.parse(pattern)
    return {path: module for path, module in model.named_modules() if path and parsed.readings(path)}


def _child(model: nn.Module, index: int) -> str:
    """Return the name of the child that `model[index]` means."""
    names = [name for name, module in model._modules.items() if module is not None]  # a shared one under each name
    if -len(names) <= index < len(names):
        return names[index]
    text = f"the model has {len(names)} modules at its top, and none with the index {index}"
    raise LoadError(Diagnostic("nothing-selected", text, facts=(("modules", ", ".join(names[:12])),)))


def _below(tensors: Mapping[str, Tensor], paths: Iterable[str]) -> set[str]:
    prefixes = tuple(path + "." if path else "" for path in paths)
    return {name for name in tensors if name.startswith(prefixes)} if prefixes else set()


def _unusable(what: object) -> LoadError:
    return LoadError(
        Diagnostic(
            "bad-selector",
            f"{what!r} selects nothing: it is no name, pattern, module, module type or predicate",
            help='"encoder.{rest...}.bias", nn.Linear, or lambda name, p: p.ndim > 1',
        )
    )


def _nothing(model: nn.Module, what: object, tensors: Mapping[str, Tensor], buffers: bool) -> Diagnostic:
    kind = "parameter or buffer" if buffers else "parameter"
    if not isinstance(what, str):
        shown = (
            " or ".join(t.__name__ for t in what) if isinstance(what, tuple) else getattr(what, "__name__", repr(what))
        )
        types = sorted({type(m).__name__ for m in model.modules()})
        return Diagnostic(
            "nothing-selected", f"no {kind} is selected by {shown}", facts=(("module types", ", ".join(types)),),
            remedies=(Remedy("allow_empty", True, "if that is meant"),),
        )  # fmt: skip
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    hidden = _by_text(model, what, {p.name: p.tensor for p in places(model)}) if not buffers else set()
    if hidden:
        names = ", ".join(text for text, _ in fold(hidden))
        return Diagnostic(
            "nothing-selected", f"{what!r} names buffers only: {names}", remedies=(Remedy("buffers", True),)
        )
    if what in modules:
        return Diagnostic(
            "nothing-selected",
            f"module {what!r} ({type(modules[what]).__name__}) holds no {kind}",
            remedies=(Remedy("allow_empty", True, "if that is meant"),),
        )
    near = close_names(what, [*tensors, *modules])
    meant = (Remedy("what", {what: near[:1]}, kind="instead"),) if near else ()
    if "{" in what and any(KeyPattern.parse(what).readings(path) for path in modules):
        below = f"{what}.{{rest...}}"
        meant = (Remedy("what", {what: below}, "matches what the modules hold that it matches", kind="instead"),)
    return Diagnostic(
        "nothing-selected",
        f"no {kind} and no module matches {what!r}",
        facts=(("close", ", ".join(near)),) if near else (("first", ", ".join(t for t, _ in fold(tensors)[:4])),),
        remedies=meant,
        advice=None if meant else "a pattern matches the whole name, never a part of it",
    )
