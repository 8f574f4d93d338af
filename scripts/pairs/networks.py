"""What the networks of all libraries are made with: their sizes, and names and tensors as another layout has them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from pairing import Network, Numbers, numbered
from torch import nn

warnings.filterwarnings("ignore")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 53,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TINY, "num_key_value_heads": 2}


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The floating-point tensors of a state dict, by shape."""
    return {k: tuple(t.shape) for k, t in tensors.items() if t.is_floating_point()}


def backwards(model: nn.Module, revert: Callable[[Numbers], Numbers]) -> Network:
    """A network whose library writes the old layout: the way back, element by element."""
    made = numbered(shapes(model.state_dict()))
    old = {k: t.detach() for k, t in revert(dict(made)).items()}
    places = torch.cat([t.reshape(-1) for t in old.values()]).long()

    def convert(given: Numbers) -> Numbers:
        flat = torch.full((sum(t.numel() for t in made.values()),), -1.0, dtype=torch.float64)
        flat[places] = torch.cat([given[k].reshape(-1) for k in old])
        return {k: flat[t.long()] for k, t in made.items()}

    return Network(shapes(old), convert)


def hub(model: nn.Module) -> Network:
    """The layout on the hub and the one in transformers."""
    from transformers.core_model_loading import revert_weight_conversion

    return backwards(model, lambda numbers: revert_weight_conversion(model, numbers))


def filled(model: nn.Module, numbers: Numbers) -> nn.Module:
    """A model that holds the numbers."""
    model = model.double()
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in numbers:
                tensor.data.copy_(numbers[key])
    return model


def named(model: nn.Module, rename: Callable[[str], str | None]) -> Network:
    """A converter that changes names alone."""
    return Network(shapes(model.state_dict()), lambda g: {n: t for k, t in g.items() if (n := rename(k)) is not None})
