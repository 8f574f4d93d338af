"""Putting a tensor into a model: by copying into the parameter that is there, or by a new parameter in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ..errors import Diagnostic, LoadError, Remedy, literal
from ..storage.sources.links import moved_to
from .places import Place, place_of, places, places_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["has_meta", "hooked_modules", "move_to", "parameter_like", "set_tensor", "shared_places"]


def set_tensor(
    model: nn.Module, name: str, tensor: Tensor, assign: bool = False, partners: Sequence[Place] | None = None
) -> None:
    """Give the parameter or buffer `name` the values of `tensor`, or the tensor itself.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> set_tensor(model, "bias", torch.tensor([3.0]))
    >>> model.bias
    Parameter containing:
    tensor([3.], requires_grad=True)

    Copied (`assign=False`): into the storage that is there, whose device and dtype stay; every tie holds by itself.
    Assigned: a new parameter of the old one's class and `requires_grad`, of the tensor's device and dtype, put under
    every name that the old one had. Shapes must be equal: nothing is broadcast, and `[1]` is not `[]`. A tie of two
    parameters over one storage is not rebuilt here: see `restore_ties`.

    Args:
        partners: the places of the same object, where the caller knows them (`shared_places`); searched for otherwise.

    Raises:
        LoadError: unknown name, another shape, a copy into a meta tensor or out of one, or a trainable parameter of
            integers.
    """
    import torch

    place = place_of(model, name)
    old = place.tensor
    problem = _problem(place, old, tensor, assign)
    if problem is not None:
        raise LoadError(problem)
    if not assign:
        # a model built under inference_mode can be written to there alone
        with torch.inference_mode() if old.is_inference() else torch.no_grad():
            old.copy_(tensor)  # a subclass may copy in a way of its own, as under `load_state_dict`
        return
    new = tensor.detach() if place.is_buffer else parameter_like(old, tensor)
    for partner in partners if partners is not None else places_of(model, old):
        partner.put(new)


def _problem(place: Place, old: Tensor, tensor: Tensor, assign: bool) -> Diagnostic | None:
    from torch.nn.parameter import is_lazy

    name = place.name
    if is_lazy(old):
        return Diagnostic("lazy-parameter", f"{name!r} has no shape yet", help="run the model on one batch first")
    if old.shape != tensor.shape:
        return Diagnostic(
            "shape-mismatch", f"{name!r} is {list(old.shape)} in the model, and {list(tensor.shape)} is offered"
        )
    if not assign and old.is_meta:
        text = f"{name!r} is a meta tensor, nothing can be copied into it"
        return Diagnostic("meta-target", text, remedies=(Remedy("assign", True),))
    if not assign and tensor.is_meta:
        return Diagnostic("meta-source", f"a meta tensor has no values to give to {name!r}")
    trainable = old.requires_grad and not place.is_buffer
    if assign and trainable and not (tensor.is_floating_point() or tensor.is_complex()):
        return Diagnostic(
            "integer-parameter",
            f"{name!r} is trainable, and {tensor.dtype} tensors cannot be",
            remedies=(Remedy("freeze", f"cs.select(model, {literal(name)}).freeze()", kind="before"),),
            advice="or cast it",
        )
    return None


def parameter_like(old: Tensor, tensor: Tensor) -> nn.Parameter:
    """A parameter over `tensor` of the class of `old`, with its `requires_grad` and the attributes set on it."""
    import torch
    from torch import nn

    plain = type(tensor) in (torch.Tensor, nn.Parameter) and issubclass(type(old), nn.Parameter)
    data = tensor.detach()
    if plain and type(old) is not nn.Parameter:
        # Subclasses of Parameter may want other arguments: this is how Parameter itself makes its instances.
        new = cast(nn.Parameter, torch.Tensor._make_subclass(type(old), data, old.requires_grad))
    else:
        new = nn.Parameter(data, requires_grad=old.requires_grad)
    for key, value in vars(old).items():
        if key != "_is_param":
            setattr(new, key, value)
    return new


def shared_places(model: nn.Module) -> dict[str, tuple[Place, ...]]:
    """Name -> every place of the same object, itself included: found once, for many calls of `set_tensor`."""
    by_object: dict[int, list[Place]] = {}
    for place in places(model):
        by_object.setdefault(id(place.tensor), []).append(place)
    return {p.name: tuple(group) for group in by_object.values() for p in group}


def move_to(model: nn.Module, device: torch.device) -> None:
    """Put what lies elsewhere on a device, by new tensors; names of one object stay so, and meta tensors stay meta."""
    for name, partners in shared_places(model).items():
        old = partners[0].tensor
        if name == partners[0].name and old.device != device and not old.is_meta:
            set_tensor(model, name, moved_to(device, old.detach()), assign=True, partners=partners)


def has_meta(model: nn.Module) -> bool:
    """Return whether a state dict of the model would hold a meta tensor, into which nothing can be copied.

    >>> import torch
    >>> has_meta(torch.nn.Linear(2, 1)), has_meta(torch.nn.Linear(2, 1, device="meta"))
    (False, True)
    """
    return any(place.tensor.is_meta for place in places(model) if place.persistent)


def hooked_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose loading is their own affair, which torch's own machinery has to carry out.

    >>> import torch
    >>> hooked_modules(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    ()
    >>> hooked_modules(torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))))
    ('0',)

    They override `_load_from_state_dict` or carry hooks that run before or after it. torch's norms override it only to
    forgive files of old versions, and count as plain.
    """
    return tuple(path for path, module in model.named_modules(remove_duplicate=False) if _is_hooked(module))


def _is_hooked(module: nn.Module) -> bool:
    from torch import nn
    from torch.nn.modules import batchnorm, instancenorm

    plain = {
        owner._load_from_state_dict for owner in (nn.Module, batchnorm._NormBase, instancenorm._InstanceNorm)
    }  # functions of the classes, compared by identity
    if "_load_from_state_dict" in vars(module) or type(module)._load_from_state_dict not in plain:
        return True
    return bool(module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
