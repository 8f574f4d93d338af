"""What a model itself would give a tensor at first: its hooks, run on a stage where nothing of the model can be harmed.

On the stage every parameter and buffer is replaced by a meta stand-in, which takes any write and keeps none, and the
one tensor asked for by a scratch tensor. So siblings are not redrawn, no copy of the model is needed, and what is drawn
depends on the seed and the name alone. Then comes what construction does, from the inside out: `reset_parameters` of
each module, then the hooks: `_init_weights(module)` of the nearest module around that has it, or `init_weights()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError, Remedy
from ..narrowing import present
from ..ops.seeding import key_seed, seeded_globals
from .assigning import parameter_like
from .places import Place, place_of, places

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["DefaultInitialisation"]

# A library's mark for "loaded already": its hooks leave such tensors as they are, and here they are to be drawn.
_LOADED_FLAG = "_is_hf_initialized"
_RESETS = ("reset_parameters", "_reset_parameters")
_BUFFER_RESETS = ("init_non_persistent_buffers", "reset_buffers")

Step = tuple[str, Callable[[], Any]]


class DefaultInitialisation:
    """A context in which `draw` runs a model's own initialisation for one tensor; after it the model is as it was."""

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = device
        self._places: dict[str, Place] = {}
        self._tensors: dict[str, Tensor] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._held: list[tuple[nn.Module, dict[str, Any], dict[str, Any], set[str]]] = []

    def __enter__(self) -> DefaultInitialisation:
        self._places = {place.name: place for place in places(self.model)}
        self._tensors = {name: place.tensor for name, place in self._places.items()}
        self._stand_ins = {id(tensor): _stand_in(tensor, None) for tensor in self._tensors.values()}
        for module in self.model.modules():
            hidden = set(module._non_persistent_buffers_set)
            self._held.append((module, dict(module._parameters), dict(module._buffers), hidden))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for module, parameters, buffers, hidden in self._held:
            for registry, held in ((module._parameters, parameters), (module._buffers, buffers)):
                registry.clear()
                registry.update(held)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(hidden)

    def draw(self, name: str, seed: int) -> tuple[Tensor, str]:
        """New values for `name`, and what gave them, such as `"Linear.reset_parameters"`.

        Raises:
            LoadError: nothing initialises the tensor, or what should do so raises.
        """
        try:
            drawn = self._run(name, seed, real=False)
        except Exception:
            # Some hooks read what they write next to; they get copies to read.
            try:
                drawn = self._run(name, seed, real=True)
            except Exception as error:
                raise LoadError(self._failed(name, error)) from error
        if drawn is None:
            raise LoadError(self._nobody(name))
        return drawn

    def _run(self, name: str, seed: int, real: bool) -> tuple[Tensor, str] | None:
        import torch

        original = self._tensors[name]
        device = torch.device(self.device) if original.is_meta else original.device
        scratch = _marked(original, device)
        self._set_up(original, scratch, real)
        gave = ""
        with torch.no_grad(), seeded_globals(key_seed(seed, name), device):
            for steps in (self._steps(name), self._last_steps(name)):
                for label, step in steps:
                    before, version = _sample(self._now(name)), self._now(name)._version
                    step()
                    now = self._now(name)
                    if now._version != version or not torch.equal(before, _sample(now)):
                        gave = label
                if gave and _written(self._now(name)):
                    break
        drawn = self._now(name).detach()
        if not gave or not _written(drawn):
            return None
        if drawn.shape != original.shape or drawn.is_meta:
            raise ValueError(f"{gave} gave {list(drawn.shape)} on {drawn.device} for {list(original.shape)}")
        return drawn.to(original.dtype), gave

    def _now(self, name: str) -> Tensor:
        return place_of(self.model, name).tensor

    def _set_up(self, original: Tensor, scratch: Tensor, real: bool) -> None:
        self._restore()
        actors = dict(self._stand_ins)
        if real:
            actors = {id(tensor): _stand_in(tensor, self.device) for tensor in self._tensors.values()}
        actors[id(original)] = scratch
        for name, place in self._places.items():
            registry: dict[str, Any] = place.owner._buffers if place.is_buffer else place.owner._parameters
            registry[place.leaf] = actors[id(self._tensors[name])]

    def _chain(self, name: str) -> list[nn.Module]:
        """The modules that hold the tensor, innermost first."""
        chain, module = [self.model], self.model
        for part in name.split(".")[:-1]:
            module = present(module._modules[part], f"the module on the way to {name!r}")
            chain.insert(0, module)
        return chain

    def _steps(self, name: str) -> Iterator[Step]:
        chain = self._chain(name)
        resets = (*_BUFFER_RESETS, *_RESETS) if self._places[name].is_buffer else _RESETS
        for module in chain:
            yield from _methods(module, resets)
        for at, module in enumerate(chain):
            if _takes(module, "_init_weights") != 1:
                yield from _methods(module, ("_init_weights", "init_weights"))
            around = next((m for m in chain[at:] if _takes(m, "_init_weights") == 1), None)
            if around is not None:
                hook: Any = around._init_weights
                yield f"{type(around).__name__}._init_weights", partial(hook, module)

    def _last_steps(self, name: str) -> Iterator[Step]:
        """Where `_init_weights(module)` passes a tensor over, the whole model's `init_weights()` may know it."""
        for module in self._chain(name):
            if _takes(module, "_init_weights") == 1:
                yield from _methods(module, ("init_weights",))

    def _nobody(self, name: str) -> Diagnostic:
        owner, tensor = self._places[name].owner, self._places[name].tensor
        drawn = tensor.is_floating_point() or tensor.is_complex()
        return Diagnostic(
            "no-default",
            f"{name!r} has no default: neither a hook of the model nor {type(owner).__name__} initialises it",
            remedies=(Remedy("init", {name: "trunc_normal(std=0.02)" if drawn else "own"}),),
            advice="or zeros, or own() to leave it as it was built",
        )

    def _failed(self, name: str, error: Exception) -> Diagnostic:
        return Diagnostic(
            "init-hook-failed",
            f"the model's own initialisation of {name!r} raised {type(error).__name__}: {error}",
            remedies=(Remedy("init", {name: "trunc_normal(std=0.02)"}),),
        )


def _methods(module: nn.Module, names: tuple[str, ...]) -> Iterator[Step]:
    for name in names:
        if _takes(module, name) == 0:
            yield f"{type(module).__name__}.{name}", getattr(module, name)


def _takes(module: nn.Module, name: str) -> int | None:
    """How many arguments a module's method must be given; None where there is no such method."""
    method = getattr(module, name, None)
    if not callable(method):
        return None
    needed = 0
    for parameter in inspect.signature(method).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            needed += 1
    return needed


def _marked(original: Tensor, device: torch.device) -> Tensor:
    """A scratch tensor filled with what no initialisation gives, so that one sees whether it was written."""
    import torch

    scratch = torch.empty(original.shape, dtype=original.dtype, device=device)
    mark = _mark(original.dtype)
    if mark is not None:
        scratch.fill_(mark)
    return _dressed(original, scratch)


def _mark(dtype: torch.dtype) -> float | int | None:
    import torch

    if dtype.is_floating_point or dtype.is_complex:
        return None if dtype.itemsize == 1 else float("nan")
    return None if dtype == torch.bool else torch.iinfo(dtype).max - 2


def _written(tensor: Tensor) -> bool:
    mark = _mark(tensor.dtype)
    if mark is None or tensor.numel() == 0 or tensor.is_meta:
        return True
    return not bool(tensor.isnan().any() if mark != mark else (tensor == mark).all())


def _sample(tensor: Tensor) -> Tensor:
    """The bits of a few elements, to see a write that the version counter does not: `tensor.data` has its own."""
    import torch

    if tensor.is_meta or tensor.numel() == 0:
        return torch.empty(0)
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 256)].contiguous().clone().view(torch.uint8)


def _stand_in(tensor: Tensor, copy_to: torch.device | str | None) -> Tensor:
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return tensor
    if copy_to is None:
        return _dressed(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    if tensor.is_meta:
        return _dressed(tensor, torch.zeros(tensor.shape, dtype=tensor.dtype, device=copy_to))
    return _dressed(tensor, tensor.detach().clone())


def _dressed(original: Tensor, data: Tensor) -> Tensor:
    """`data` as a parameter where the original is one, with its attributes but the mark of being loaded."""
    from torch import nn

    if not isinstance(original, nn.Parameter):
        return data
    dressed = parameter_like(original, data)
    if hasattr(dressed, _LOADED_FLAG):
        delattr(dressed, _LOADED_FLAG)
    return dressed
