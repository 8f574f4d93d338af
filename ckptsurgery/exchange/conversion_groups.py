"""Which tensors of a model's files become which of the model, by the tables of the transformers library.

The library's own code is asked for every name: it reverts its conversions on tensors of the meta device, so that no
regular expression is interpreted here. What its operations do to axes is read off their classes (`conversion_axes`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ConversionGroup", "conversions_of", "groups_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConversionGroup:
    """Tensors that one conversion connects.

    Args:
        files: for each pattern of the files, the keys that it matches, in the order in which they are merged.
        models: for each pattern of the model, its key.
        shapes: of all of them, by key; `"file:"` stands before those of files.
        transform: the library's converter, from files to model; None where a key is only renamed.
    """

    files: tuple[tuple[str, ...], ...]
    models: tuple[str, ...]
    shapes: Mapping[str, Shape]
    transform: Any = None

    @property
    def renamed(self) -> bool:
        """Whether a name changes."""
        return self.transform is not None or self.files[0][0] != self.models[0]


def conversions_of(model: nn.Module) -> list[Any]:
    """Return the library's transforms for a model, from files to model: those of its load, else those of its table."""
    from transformers import conversion_mapping as table
    from transformers.core_model_loading import PrefixChange

    found: Any = getattr(model, "_weight_conversions", None)
    if found is not None:
        return list(found)
    listed: list[Any] = table.get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    # Nothing shows whether a model that was never loaded had the prefix; the library saves it without.
    return [one for one in listed if not isinstance(one, PrefixChange)]


def groups_of(model: nn.Module, transforms: Sequence[Any]) -> list[ConversionGroup]:
    """Return how the files of a model are named, and what becomes of them, in the order of the model's own keys.

    Args:
        transforms: from files to model, as `conversions_of` gives them.
    """
    import torch
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    forward = list(transforms)[::-1]
    backward = [one.reverse_transform() for one in forward]
    renamings = [one for one in backward if isinstance(one, WeightRenaming)]
    pairs = [(f, b) for f, b in zip(forward, backward) if isinstance(b, WeightConverter)]
    state = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in model.state_dict().items()}
    gathered: dict[str, _Gathered] = {}
    for key in _in_order(state):
        name, pattern, number = _converted(key, [b for _, b in pairs])
        if pattern is None:
            name = _renamed(key, renamings)
        one = gathered.setdefault(name, _Gathered(number))
        one.inputs.setdefault(pattern or key, []).append(key)
    groups = []
    for name, one in gathered.items():
        if one.number is None:
            keys = [key for keys in one.inputs.values() for key in keys]
            shapes = {k: tuple(state[keys[0]].shape) for k in (keys[0], f"file:{name}")}
            groups.append(ConversionGroup(((name,),), (keys[0],), shapes))
        else:
            forth, back = pairs[one.number]
            groups.append(_group(model, name, one, forth, back, renamings, state))
    return groups


@dataclass
class _Gathered:
    """Keys of the model that go into one conversion back."""

    number: int | None

    def __post_init__(self) -> None:
        self.inputs: dict[str, list[str]] = {}


def _in_order(state: Mapping[str, Any]) -> list[str]:
    from transformers.core_model_loading import dot_natural_key

    return sorted(state, key=dot_natural_key)


def _converted(key: str, converters: Sequence[Any]) -> tuple[str, str | None, int | None]:
    """The name after the first converter that matches, the pattern that did, and which converter it was."""
    for number, converter in enumerate(converters):
        name, pattern = converter.rename_source_key(key)
        if pattern is not None:
            return name, pattern, number
    return key, None, None


def _renamed(key: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _group(
    model: nn.Module,
    name: str,
    gathered: _Gathered,
    forth: Any,
    back: Any,
    renamings: Sequence[Any],
    state: Mapping[str, Tensor],
) -> ConversionGroup:
    """Run one conversion back, and sort what it makes by the patterns of the files."""
    working = copy.deepcopy(back)
    for pattern, keys in gathered.inputs.items():
        for key in keys:
            working.add_tensor(name, key, pattern, state[key])
    made = working.convert(name, model=model, config=model.config)
    named = {_renamed(key, renamings): value for key, value in made.items()}
    tensors = {k: v[0] if isinstance(v, list) else v for k, v in named.items()}
    count = len(forth.source_patterns)
    if len(tensors) % count:
        raise ValueError(f"{len(tensors)} tensors of files for {count} patterns")
    keys, each = list(tensors), len(tensors) // count
    files = tuple(tuple(keys[n * each : (n + 1) * each]) for n in range(count))
    models = [key for pattern in back.source_patterns for key in gathered.inputs.get(pattern, ())]
    shapes = {k: tuple(state[k].shape) for k in models}
    shapes |= {f"file:{k}": tuple(t.shape) for k, t in tensors.items()}
    return ConversionGroup(files, tuple(models), shapes, forth)
