"""A forward pass watched: which modules run, in which order, and what each gives. Hooks and modes are put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CkptSurgeryError, Diagnostic, LoadError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..specs import TensorSpec

__all__ = ["ModuleCall", "by_use", "called", "evaluating", "tensors_in", "tried", "watched"]


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Args:
        module: its name in the model; empty for the model itself.
        kind: its class.
        outputs: its output tensors, copied.
        leaf: whether it has no modules inside.
    """

    module: str
    kind: str
    outputs: tuple[Tensor, ...]
    leaf: bool


def watched(model: nn.Module, inputs: Any) -> tuple[tuple[Tensor, ...], list[ModuleCall]]:
    """A model's outputs and all calls of its modules, in the order in which they end; in eval mode, no gradients."""
    import torch

    calls: list[ModuleCall] = []
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(_hook(name, module, calls)))
        with torch.no_grad(), evaluating(model):
            result = called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(tensors_in(result)), calls


def tried(model: nn.Module, inputs: Any, name: str) -> tuple[tuple[Tensor, ...], list[ModuleCall]]:
    """What a model gives, from the same random state each time; a failure says whose it is.

    Raises:
        LoadError: the model fails on the inputs.
    """
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            return watched(model, inputs)
        except CkptSurgeryError:
            raise
        except Exception as error:  # whatever the user's own code raises
            text = f"{name} fails on the inputs: {type(error).__name__}: {error}"
            raise LoadError(Diagnostic("forward-failed", text)) from error


def by_use(model: nn.Module, inputs: Any, specs: Mapping[str, TensorSpec], name: str) -> dict[str, TensorSpec]:
    """A model's specs in the order in which a forward pass uses its modules; what it does not use comes last."""
    rank: dict[str, int] = {}
    for n, call in enumerate(tried(model, inputs, name)[1]):
        rank.setdefault(call.module, n)
    listed = list(specs)
    order = {k: (_rank(k, rank), n) for n, k in enumerate(listed)}
    return {k: specs[k] for k in sorted(listed, key=order.__getitem__)}


def _rank(key: str, rank: Mapping[str, int]) -> int:
    """When the module of a tensor was called or, where it is used without a call, the module around it."""
    path = key.rpartition(".")[0]
    while path and path not in rank:
        path = path.rpartition(".")[0]
    return rank.get(path, len(rank) + 1)


def _hook(name: str, module: nn.Module, calls: list[ModuleCall]) -> Any:
    leaf = next(module.children(), None) is None

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        copies = tuple(t.detach().clone() for t in tensors_in(output))
        calls.append(ModuleCall(name, type(module).__name__, copies, leaf))

    return hook


def called(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a mapping of named arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; each module's own mode is put back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested containers, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from tensors_in(item)
