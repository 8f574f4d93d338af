"""What a load must know of a model, gathered once: specs, ties, and what stands apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..specs import TensorSpec, Tie
from .assigning import hooked_modules
from .places import places, require_module, spec_at
from .ties import find_ties

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelFacts", "target_of"]


@dataclass(frozen=True)
class ModelFacts:
    """A model as the target of a plan; no tensor is held.

    Args:
        specs: key -> spec, in state_dict order: parameters and persistent buffers, each under all of its names.
        ties: the tie groups, of names that may include non-persistent buffers.
        parameters: the keys that are parameters.
        buffers: the keys that are persistent buffers.
        trainable: the parameters that take a gradient.
        non_persistent: names of buffers that no state_dict holds.
        meta: names of meta tensors, buffers of every kind included.
        lazy: keys of parameters that have no shape yet; they have no spec.
        hooked: paths of the modules whose loading torch's own machinery has to carry out.
        extra_state: keys of what modules save beside tensors.
    """

    specs: dict[str, TensorSpec]
    ties: tuple[Tie, ...]
    parameters: frozenset[str]
    buffers: frozenset[str]
    trainable: frozenset[str]
    non_persistent: tuple[str, ...]
    meta: frozenset[str]
    lazy: tuple[str, ...]
    hooked: tuple[str, ...]
    extra_state: tuple[str, ...]


def target_of(model: nn.Module) -> ModelFacts:
    """The facts of a model, from its modules alone: neither its `state_dict` hooks nor its values are touched.

    >>> from torch import nn
    >>> facts = target_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)))
    >>> list(facts.specs)
    ['0.weight', '0.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    >>> sorted(facts.parameters), str(facts.specs["0.weight"])
    (['0.bias', '0.weight'], 'F32 [3, 2]')

    Raises:
        LoadError: no module, or a tensor of a dtype that has no name.
    """
    from torch.nn.parameter import is_lazy

    require_module(model)
    found = list(places(model))
    lazy = tuple(p.name for p in found if is_lazy(p.tensor))
    kept = [p for p in found if p.persistent and not is_lazy(p.tensor)]
    return ModelFacts(
        specs={p.name: spec_at(p) for p in kept},
        ties=find_ties(model),
        parameters=frozenset(p.name for p in found if not p.is_buffer),
        buffers=frozenset(p.name for p in kept if p.is_buffer),
        trainable=frozenset(p.name for p in found if not p.is_buffer and p.tensor.requires_grad),
        non_persistent=tuple(p.name for p in found if not p.persistent),
        meta=frozenset(p.name for p in found if p.tensor.is_meta),
        lazy=lazy,
        hooked=hooked_modules(model),
        extra_state=_extra_state(model),
    )


def _extra_state(model: nn.Module) -> tuple[str, ...]:
    from torch import nn
    from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

    return tuple(
        f"{path}.{_EXTRA_STATE_KEY_SUFFIX}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    )
