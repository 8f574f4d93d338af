"""The arguments of each module of a model, identified by moments that do not depend on a tensor's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .forward_pass import called, evaluating, tensors_in

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DataCall", "Flow", "TensorMoments", "flow_of", "owners"]

_CLOSE = 1e-4  # relative difference up to which two moments are the same


@dataclass(frozen=True)
class TensorMoments:
    """The size of a tensor and some sums over its elements, which no transposition or reshaping changes.

    Args:
        size: how many elements there are.
        sums: of the absolute values, of the values, and of two functions that are neither odd nor even.
    """

    size: int
    sums: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMoments:
        """The moments of a tensor; it is not kept."""
        import torch

        values = tensor.detach().reshape(-1).to(torch.float64)
        values = torch.nan_to_num(values, nan=3.0, posinf=5.0, neginf=-5.0)
        listed = values.abs(), values, (values - 0.5).square(), torch.sin(2.0 * values + 0.3)
        return cls(values.numel(), tuple(float(x.sum()) for x in listed))

    def near(self, other: TensorMoments) -> bool:
        """Whether two tensors hold the same values as far as the moments show."""
        if self.size != other.size:
            return False
        scale = max(self.sums[0], other.sums[0], 1e-6 * max(1, self.size))
        return all(abs(a - b) <= _CLOSE * scale for a, b in zip(self.sums, other.sums))


@dataclass(frozen=True)
class DataCall:
    """One call of a module that holds parameters and no other modules.

    Args:
        module: its name.
        inputs: the moments of the tensors that it is called with.
    """

    module: str
    inputs: tuple[TensorMoments, ...]

    def near(self, other: DataCall) -> bool:
        """Whether two calls are made with the same tensors."""
        return len(self.inputs) == len(other.inputs) and all(a.near(b) for a, b in zip(self.inputs, other.inputs))


@dataclass(frozen=True)
class Flow:
    """A forward pass.

    Args:
        calls: in the order in which they begin.
        outputs: what the model returns.
    """

    calls: Sequence[DataCall]
    outputs: tuple[TensorMoments, ...]


def owners(model: nn.Module) -> list[str]:
    """The modules that hold parameters and no other modules, by name."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None
    ]


def flow_of(model: nn.Module, inputs: Any) -> Flow:
    """Run a model in eval mode and record what its modules are called with; nothing is copied."""
    import torch

    calls: list[DataCall] = []
    handles = []
    modules = dict(model.named_modules())
    try:
        for name in owners(model):
            handles.append(modules[name].register_forward_pre_hook(_hook(name, calls), with_kwargs=True))
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
            torch.manual_seed(0)
            result = called(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Flow(calls, tuple(TensorMoments.of(t) for t in tensors_in(result)))


def _hook(name: str, calls: list[DataCall]) -> Any:
    def hook(module: nn.Module, inputs: Any, named: Any) -> None:
        calls.append(DataCall(name, tuple(TensorMoments.of(t) for t in tensors_in((inputs, named)))))

    return hook
