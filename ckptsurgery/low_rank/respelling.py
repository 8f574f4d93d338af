"""Converting an adapter between the spellings of PEFT, diffusers and kohya, alpha of each module included."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..language.captures import escape
from ..language.recipe import Recipe
from ..running.runner import plan
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .adapter_config import CONFIG_FILE, config_of, peft_config
from .pair_reading import AdapterUpdate, LowRankAdapter, read_adapter

__all__ = ["convert"]

_STYLES = ("peft", "kohya", "diffusers")
_COMPONENTS = {"text_encoder": "te1", "text_encoder_2": "te2"}


def convert(adapter: Any, base: Any, path: str | os.PathLike[str], to: str, *, prefix: str | None = None) -> str:
    """Write an adapter in another spelling; B·A times its scale stays the same for every module.

    >>> import tempfile, torch, ckptsurgery as cs
    >>> base = {"mid.q.weight": torch.zeros(2, 2)}
    >>> lora = {"mid.q.lora_A.weight": torch.ones(1, 2), "mid.q.lora_B.weight": torch.ones(2, 1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = cs.adapters.convert(lora, base, folder + "/x.safetensors", "kohya")
    ...     print(*sorted(cs.open(made)))
    lora_mid_q.alpha lora_mid_q.lora_down.weight lora_mid_q.lora_up.weight

    "peft" is a folder with `adapter_config.json`, where ranks and alphas that differ are patterns. "kohya" is a file
    with flat names, in which each module has its alpha. "diffusers" is a file with the modules' own names and no alpha:
    where a scale is not 1, B is multiplied by it, in float32 with one rounding. rsLoRA becomes the alpha of the same
    scale. Updates of stacked experts have the names of the parameters in "diffusers", and are nested in "peft", the
    first parameter of a module in the base's order innermost: name the model or its state dict as the base. Those of
    PEFT before 0.19 are turned to the order of later ones.

    Args:
        adapter, base: whatever `open` takes; the base has the module names that flat names are read with.
        path: the folder or file to come.
        to: "peft", "kohya" or "diffusers".
        prefix: before module names, such as "lora_te1"; without, "lora" before kohya's, and nothing before the others.

    Raises:
        CheckpointError: tensors of the adapter without a place in the base or in the spelling; an output that exists.
    """
    if to not in _STYLES:
        text = f"to={to!r} is not one of {', '.join(_STYLES)}"
        raise CheckpointError(Diagnostic("bad-argument", text, help='to="peft"'))
    place = Path(path)
    if place.exists():
        raise CheckpointError(Diagnostic("output-exists", f"{str(path)!r} exists already", help="name a new one"))
    source, whole = open_checkpoint(adapter), open_checkpoint(base)
    config = config_of(adapter, source)
    read = read_adapter(source.specs, whole.specs, config, source.source)
    made = _Respelling(read, source, to, prefix, tuple(whole.specs), config.turns_experts)
    recipe = made.recipe()
    if to != "peft":
        plan(source, recipe).save(place)
        return str(place)
    place.mkdir(parents=True)
    plan(source, recipe).save(place / "adapter_model.safetensors")
    told = peft_config(made.ranks, made.alphas, sorted(read.replaced.values()), made.turned, made.parameters)
    (place / CONFIG_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return str(place)


@dataclass
class _Respelling:
    """Makes the recipe of a respelling.

    Args:
        keys: of the base, in its order.
        turns: whether stacked experts are stored as PEFT did before 0.19.
        ranks, alphas: of each module, by the base's name.
        parameters: those of them that are stacked experts.
    """

    adapter: LowRankAdapter
    source: Checkpoint
    to: str
    prefix: str | None
    keys: tuple[str, ...] = ()
    turns: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    scaled: dict[float, dict[str, str]] = field(default_factory=dict)
    init: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    @property
    def turned(self) -> bool:
        """Whether weights are stored as [in, out]."""
        return any(update.turned and not self.embeds(update) for update in self.adapter.updates)

    def recipe(self) -> Recipe:
        """The recipe: one rule for all names, and one for each scale that B is multiplied by."""
        self.refuse()
        for update in self.adapter.updates:
            self.add(update)
        if self.to == "peft":
            self.names |= {key: f"base_model.model.{name}" for key, name in self.adapter.replaced.items()}
        tables: dict[str, Mapping[str, str]] = {"k": self.names} if self.names else {}
        rules = ["{k} -> {k}"] if self.names else []
        for number, (scale, names) in enumerate(self.scaled.items()):
            tables[f"b{number}"] = names
            rules.append(f"{{b{number}}} -> {{b{number}}} | mul({scale!r})")
        return Recipe(
            [*rules, *self.swapped],
            drop=self.drop,
            init=self.init,
            dims=self.dims,
            names=tables,
            summary=f"adapter in the spelling of {self.to}",
        )

    def add(self, update: AdapterUpdate) -> None:
        """The names of an update's tensors, and its alpha."""
        module = update.key.removesuffix(".weight")
        alpha = self.alpha(update)
        self.ranks[module], self.alphas[module] = update.rank, alpha
        if update.alpha_key is not None:
            self.drop.append(escape(update.alpha_key))
        name, (down, up) = self.spelled(module), self.parts(update)
        if update.experts:
            self.parameters.append(module)
            name = self.nested(module) if self.to == "peft" else name
        if update.experts == "in_out" and (self.turns or self.to != "peft"):
            self.swap(update, name, alpha / update.rank)
            return
        self.names[update.down] = f"{name}.{down}"
        scale = alpha / update.rank
        if self.to == "diffusers" and scale != 1:
            self.scaled.setdefault(scale, {})[update.up] = f"{name}.{up}"
        else:
            self.names[update.up] = f"{name}.{up}"
        if self.to == "kohya":
            self.init[f"{escape(name)}.alpha [] F32"] = f"constant({float(alpha)!r})"
        if update.stored is not None:
            self.names[update.stored] = f"{name}.base_layer.weight"
        if update.magnitude is not None:
            self.names[update.magnitude] = f"{name}.lora_magnitude_vector.weight"

    def nested(self, key: str) -> str:
        """The module of a stacked parameter, as PEFT nests several of one module."""
        module = key.rpartition(".")[0]
        updated = {update.key for update in self.adapter.updates if update.experts}
        others = [one for one in self.keys if one in updated and one.rpartition(".")[0] == module]
        return self.spelled(module) + ".base_layer" * (len(others) - 1 - others.index(key))

    def swap(self, update: AdapterUpdate, name: str, scale: float) -> None:
        """The update of experts [in, out] as one of [out, in]: Bᵀ is A, and Aᵀ is B."""
        count = self.source.specs[update.down].shape[0] // update.rank
        e = f"e{count}"
        self.dims[e] = count
        factor = f" | mul({scale!r})" if self.to == "diffusers" and scale != 1 else ""
        self.swapped += [
            f"{escape(update.up)} [o (r {e})] -> {escape(name)}.lora_A.weight [({e} r) o]",
            f"{escape(update.down)} [({e} r) i] -> {escape(name)}.lora_B.weight [i (r {e})]{factor}",
        ]

    def alpha(self, update: AdapterUpdate) -> float:
        """Alpha over r is the scale, for rsLoRA too."""
        alpha = update.alpha
        if alpha is None and update.alpha_key is not None:
            alpha = float(self.source.load(update.alpha_key).item())
        return (alpha or 0) * (math.sqrt(update.rank) if update.rslora else 1)

    def parts(self, update: AdapterUpdate) -> tuple[str, str]:
        """The ends of the names of A and B."""
        if self.to == "kohya":
            return "lora_down.weight", "lora_up.weight"
        if self.embeds(update):
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    def cannot_stack(self, update: AdapterUpdate) -> bool:
        """Whether the spelling has no place for an update of stacked experts."""
        return self.to == "kohya" or len(self.source.specs[update.down].shape) == 3

    def embeds(self, update: AdapterUpdate) -> bool:
        """Whether an update is that of an embedding."""
        return "embedding" in update.down

    def spelled(self, module: str) -> str:
        """A module's name in the spelling."""
        if self.to == "peft":
            return f"base_model.model.{module}"
        if self.to == "diffusers":
            return f"{self.prefix or ''}{module}"
        component, dot, rest = module.partition(".")
        flat = f"{_COMPONENTS.get(component, component)}{dot}{rest}" if self.prefix is None else module
        return f"{self.prefix or 'lora'}_{flat.replace('.', '_')}"

    def refuse(self) -> None:
        """Refuse tensors that the spelling has no place for."""
        odd = {u.up: "stacked experts" for u in self.adapter.updates if u.experts and self.cannot_stack(u)}
        odd |= {key: "biases" for _, key, _ in self.adapter.biases}
        if self.to != "peft":
            odd |= {u.magnitude: "magnitudes" for u in self.adapter.updates if u.magnitude is not None}
            odd |= dict.fromkeys(self.adapter.replaced, "whole tensors")
            odd |= {u.stored: "whole tensors" for u in self.adapter.updates if u.stored is not None}
        if self.to == "kohya":
            odd |= {u.down: "embeddings" for u in self.adapter.updates if self.embeds(u)}
        flat = [self.spelled(update.key.removesuffix(".weight")) for update in self.adapter.updates]
        twice = sorted({name for name in flat if flat.count(name) > 1}) if len(set(flat)) < len(flat) else []
        if not odd and not twice:
            return
        why = ", ".join(sorted(set(odd.values()))) or "two modules of one name"
        text = f"the spelling of {self.to} has no place for {why}"
        notes = tuple(re.sub(r"\s+", " ", key) for key in (*odd, *twice))[:8]
        help = "merge it into the base with cs.adapters.merge"
        raise CheckpointError(Diagnostic("adapter-unsupported", text, notes=notes, help=help))
