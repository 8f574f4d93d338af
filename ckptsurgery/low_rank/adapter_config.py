"""An adapter's configuration, as PEFT writes it: alpha, rank and form of each module's update."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..storage.checkpoint import Checkpoint
from ..storage.json_text import parse_json

__all__ = ["CONFIG_FILE", "AdapterConfig", "config_of", "peft_config"]

CONFIG_FILE = "adapter_config.json"
_VERSION = re.compile(r"\d+")
_UNKNOWN = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter's modules.

    >>> config = AdapterConfig.of({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 32}})
    >>> config.alpha_of("model.layers.0.q_proj"), config.alpha_of("model.layers.0.k_proj")
    (32, 16)

    Args:
        alpha: the scaling's numerator; None without a configuration, where the file itself may have it.
        rslora: scale by alpha / sqrt(r). dora: rows have learnt norms. turned: weights are stored as [in, out].
        alphas: regular expression of the end of a module's path -> its alpha.
        parameters: ends of the paths of parameters that have updates themselves, such as stacked experts.
        whole: ends of the paths of modules that were trained whole.
        tied: modules that the model ties to others are stored beside these.
        version: of PEFT, (major, minor), where it is known.
    """

    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    turned: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    tied: bool = False
    version: tuple[int, ...] | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any], place: str = CONFIG_FILE) -> AdapterConfig:
        """Return the configuration that plain data describes.

        Raises:
            CheckpointError: another method than LoRA, or a variant whose update has another formula.
        """
        kind = str(data.get("peft_type", "LORA")).rpartition(".")[2].upper()
        odd = [name for name in _UNKNOWN if data.get(name)]
        if kind != "LORA" or odd:
            text = f"{kind} is another method than LoRA" if kind != "LORA" else f"{', '.join(odd)} is not merged here"
            help = "merge it with the library that trained it"
            raise CheckpointError(Diagnostic("adapter-unsupported", text, place, help=help))
        return cls(
            data.get("lora_alpha", 8),
            bool(data.get("use_rslora")),
            bool(data.get("use_dora")),
            bool(data.get("fan_in_fan_out")),
            dict(data.get("alpha_pattern") or {}),
            tuple(data.get("target_parameters") or ()),
            tuple(data.get("modules_to_save") or ()),
            bool(data.get("ensure_weight_tying")),
            tuple(map(int, _VERSION.findall(str(data.get("peft_version", "")))[:2])) or None,
        )

    @property
    def turns_experts(self) -> bool:
        """Whether stacked experts [e, out, in] are stored as [e, in, out] are now: PEFT did so before 0.19."""
        return self.version is not None and self.version < (0, 19)

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module's update."""
        for pattern, alpha in self.alphas.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


def config_of(source: Any, checkpoint: Checkpoint) -> AdapterConfig:
    """Return the configuration of an adapter; one without has none of its settings.

    Args:
        source: what was opened; a folder, or a file in it, may have the configuration beside.

    Raises:
        CheckpointError: it cannot be read, or is not a configuration of LoRA.
    """
    known = checkpoint.config
    if known is not None and ("lora_alpha" in known or "peft_type" in known):
        return AdapterConfig.of(known, checkpoint.source)
    if not isinstance(source, str | os.PathLike):
        return AdapterConfig()
    path = Path(source)
    beside = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not beside.is_file():
        return AdapterConfig()
    try:
        data = parse_json(beside.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        text = f"{str(beside)!r} cannot be read: {error}"
        raise CheckpointError(Diagnostic("bad-config", text, str(beside), help="download it again")) from None
    if not isinstance(data, Mapping):
        text = f"{str(beside)!r} is not a JSON object"
        raise CheckpointError(Diagnostic("bad-config", text, str(beside), help="download it again"))
    return AdapterConfig.of(data, str(beside))


def peft_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    whole: Sequence[str] = (),
    turned: bool = False,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter; what differs from the largest rank and alpha becomes patterns.

    >>> made = peft_config({"q": 8, "k": 4}, {"q": 16, "k": 16})
    >>> made["r"], made["lora_alpha"], made["rank_pattern"], made["alpha_pattern"]
    (8, 16, {'k': 4}, {})

    Args:
        ranks, alphas: of each module.
        whole: keys of tensors that are stored whole. turned: weights are stored as [in, out].
        parameters: which of the modules are parameters themselves, such as stacked experts.
    """
    rank, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1)
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
        "target_modules": sorted(ranks.keys() - set(parameters)),
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != alpha},
        "lora_dropout": 0.0, "fan_in_fan_out": turned,
    }  # fmt: skip
    if parameters:
        config["target_parameters"] = list(parameters)
    if whole:
        config["modules_to_save"] = sorted({key.rpartition(".")[0] for key in whole})
    return config
