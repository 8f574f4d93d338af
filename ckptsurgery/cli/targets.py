"""From `--target` to what must result: a checkpoint, a model that a callable builds, or specs in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import ckptsurgery as cs

from ..named_objects import names_object, object_at

if TYPE_CHECKING:
    from torch import nn

__all__ = ["built", "loaded", "target_from"]


def target_from(text: str | None) -> Any:
    """What `cs.plan` takes as a target."""
    if text is None:
        return None
    if names_object(text) and not Path(text).exists():
        return built(text)
    if text.endswith(".json") and not text.endswith(".index.json"):
        return _specs(Path(text))
    return text


def built(place: str, option: str = "--target") -> nn.Module:
    """The model that `module:callable` builds, without weights where its constructor allows that.

    A module beside the user, in the working directory, is found too.

    Args:
        place: where it is. option: what it was given by, for what may be wrong with it.

    Raises:
        LoadError: what is there cannot be imported, called, or is no model.
    """
    from torch import nn

    factory = _callable(place, option)
    try:
        return cs.skeleton(factory)
    except cs.LoadError:
        pass
    except Exception as error:  # whatever the user's own code raises
        text = f"{place}() failed: {type(error).__name__}: {error}"
        raise cs.LoadError(cs.Diagnostic("cannot-build", text)) from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise cs.LoadError(cs.Diagnostic("cannot-build", f"{place}() gives a {type(model).__name__}, no nn.Module"))
    return model


def loaded(place: str, option: str = "--model") -> nn.Module:
    """The model that `module:callable` returns, with whatever it loaded into it.

    Raises:
        LoadError: the call fails, or returns no model.
    """
    from torch import nn

    call = _callable(place, option)
    try:
        model = call()
    except Exception as error:  # whatever the user's own code raises
        text = f"{place}() failed: {type(error).__name__}: {error}"
        raise cs.LoadError(cs.Diagnostic("cannot-build", text)) from error
    if not isinstance(model, nn.Module):
        text = f"{place}() returns {type(model).__name__}, and an nn.Module is needed"
        raise cs.LoadError(cs.Diagnostic("cannot-build", text))
    return model


def _callable(place: str, option: str) -> Any:
    """What `module:callable` names; a module in the working directory is found too."""
    try:
        return object_at(place)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{place}: {error}", param_hint=option) from None


def _specs(path: Path) -> dict[str, cs.TensorSpec]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tensors = data.get("tensors", data)
        return {key: cs.TensorSpec(said["shape"], said["dtype"]) for key, said in tensors.items()}
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--target") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        shape = '{"key": {"shape": [2, 3], "dtype": "F32"}}, or what `inspect --json` prints'
        raise typer.BadParameter(f"{path} does not read like {shape}", param_hint="--target") from None
