"""Make small adapters with PEFT, and what PEFT itself merges them to.

    pip install peft && python scripts/formats/make_adapters.py

Each folder holds `base.safetensors`, PEFT's own folder `adapter`, and `merged.safetensors`, the state dict after
`merge_and_unload`. Made with PEFT 0.21.2 and torch 2.13.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parents[2] / "tests" / "data" / "adapters"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6)


class Network(nn.Module):
    """Embedding, layers, a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.conv = nn.Conv2d(3, 5, 3)
        self.turned = Conv1D(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Experts(nn.Module):
    """Experts as two stacked parameters; `is_transposed` marks them as [experts, in, out]."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        sides = ((6, 10), (5, 6)) if is_transposed else ((10, 6), (6, 5))
        self.gate_up, self.down = (nn.Parameter(torch.randn(3, *side)) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": Experts(is_transposed), "router": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tokens(nn.Module):
    """An embedding and a head under the names whose weights PEFT stores beside their updates."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Attention(nn.Module):
    """Grouped-query attention of 4 heads and 2 groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 6)


class Decoder(nn.Module):
    """One layer of attention and of stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": Attention(), "experts": Experts(False)})])

    def forward(self, x: Tensor) -> Tensor:
        return x


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (Network, {"target_modules": ["q", "k"], "r": 2, "lora_alpha": 3}),
    "patterns": (
        Network,
        {"target_modules": ["q", "k", "o"], "r": 2, "lora_alpha": 3, "rank_pattern": {"layers.1.q": 3, "o": 1},
         "alpha_pattern": {"k": 5, "layers.0.q": 7}},
    ),
    "rslora": (Network, {"target_modules": ["q"], "r": 2, "lora_alpha": 3, "use_rslora": True}),
    "dora": (Network, {"target_modules": ["q", "o"], "r": 2, "lora_alpha": 3, "use_dora": True}),
    "turned": (Network, {"target_modules": ["turned"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True}),
    "turned_dora": (
        Network, {"target_modules": ["turned"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "use_dora": True}
    ),
    "embedding": (Network, {"target_modules": ["embed", "q"], "r": 2, "lora_alpha": 3}),
    "embedding_dora": (Network, {"target_modules": ["embed"], "r": 2, "lora_alpha": 3, "use_dora": True}),
    "conv": (Network, {"target_modules": ["conv"], "r": 2, "lora_alpha": 3}),
    "conv_dora": (Network, {"target_modules": ["conv"], "r": 2, "lora_alpha": 3, "use_dora": True}),
    "whole": (Network, {"target_modules": ["q"], "r": 2, "lora_alpha": 3, "modules_to_save": ["head"]}),
    "biases": (Network, {"target_modules": ["q"], "r": 2, "lora_alpha": 3, "lora_bias": True}),
    "trained_biases": (Network, {"target_modules": ["q"], "r": 2, "lora_alpha": 3, "bias": "lora_only"}),
    "experts": (Mixture, {"target_modules": [], "r": 2, "lora_alpha": 3,
                          "target_parameters": ["mlp.experts.down", "mlp.experts.gate_up"]}),
    "experts_in_out": (lambda: Mixture(True), {"target_modules": ["router"], "r": 2, "lora_alpha": 3,
                                               "target_parameters": ["experts.gate_up", "experts.down"]}),
    "stored": (Tokens, {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "lora_alpha": 3}),
    "decoder": (
        Decoder,
        {"target_modules": ["q", "k", "v", "o"], "r": 2, "lora_alpha": 3, "rank_pattern": {"q": 3, "experts.down": 1},
         "alpha_pattern": {"v": 5, "experts.gate_up": 7}, "target_parameters": ["experts.gate_up", "experts.down"]},
    ),
}  # fmt: skip


def main() -> None:
    """Write all cases."""
    for number, (name, (make, arguments)) in enumerate(CASES.items()):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        torch.manual_seed(number)
        model = make()
        save_file(_copied(model.state_dict()), folder / "base.safetensors")
        tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **arguments))
        for key, parameter in tuned.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in key or "magnitude" in key or key.endswith("bias")):
                parameter.data += torch.rand(parameter.shape)
        tuned.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        place = folder / "adapter" / "adapter_config.json"
        config = json.loads(place.read_text())
        kept = {key: value for key, value in config.items() if value not in (None, {}, [], False)}
        place.write_text(json.dumps(kept, indent=1) + "\n")
        save_file(_copied(tuned.merge_and_unload().state_dict()), folder / "merged.safetensors")


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


if __name__ == "__main__":
    main()
