"""Adapters in the spellings of PEFT, diffusers and kohya, as one list of updates of a base model's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold
from ..running.carry.state_names import Spelling
from ..specs import TensorSpec
from ..wording import counted
from .adapter_config import AdapterConfig

__all__ = ["AdapterUpdate", "LowRankAdapter", "parsed_names", "read_adapter"]

Specs = Mapping[str, TensorSpec]

_PARTS = {
    "lora_A": "down", "lora_embedding_A": "down", "lora_down": "down", "lora.down": "down",
    "lora_B": "up", "lora_embedding_B": "up", "lora_up": "up", "lora.up": "up",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude", "alpha": "alpha",
}  # fmt: skip
_NAME = re.compile(
    rf"(?P<module>.+?)[._](?P<part>{'|'.join(map(re.escape, _PARTS))})"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_WRAPPER = "base_model.model."
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.(?!weight$|bias$)[^.]+)?|base_layer)(?=\.)")
_STORED = ".base_layer.weight"
_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_FLAT = re.compile(r"lora_(?P<component>[a-z]+\d?)_(?P<rest>.+)")
_HELP = {
    "adapter-unmatched": "name the base that it was trained on, or leave these tensors out of the adapter",
    "adapter-incomplete": "copy or download the adapter again",
    "adapter-ambiguous": "write the rule: base/W, lora/A, lora/B -> W | lora_merge_experts(alpha=16, order=in_out)",
}


@dataclass(frozen=True)
class AdapterUpdate:
    """A low-rank update of one tensor.

    Args:
        key: the base model's. module: what the adapter calls it.
        down, up: the adapter's keys of A and B. magnitude, alpha_key: those of the norms and of a stored alpha.
        stored: the adapter's key of the weight itself, which PEFT stores for embeddings and heads.
        rank: of the update. alpha: where a configuration has it.
        turned: the weight is stored as [in, out]. experts: the order of a stacked weight's dims, or nothing.
        rslora: scale by alpha / sqrt(r).
    """

    key: str
    module: str
    down: str
    up: str
    rank: int
    alpha: float | None = None
    alpha_key: str | None = None
    magnitude: str | None = None
    stored: str | None = None
    turned: bool = False
    experts: str = ""
    rslora: bool = False


@dataclass(frozen=True)
class LowRankAdapter:
    """All that an adapter does to a base model.

    Args:
        updates: of weights. biases: (the base's key, the adapter's key, its update).
        replaced: adapter key -> base key, of tensors that were trained whole.
    """

    updates: tuple[AdapterUpdate, ...]
    biases: tuple[tuple[str, str, AdapterUpdate], ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)


@dataclass
class NamedParts:
    """The adapter's keys of one module, by their part."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)
    bias: str | None = None
    stored: str | None = None
    embedding: bool = False


def parsed_names(keys: Iterable[str]) -> tuple[dict[str, NamedParts], list[str]]:
    """Return the parts of each module's update, and the keys that belong to none.

    >>> modules, others = parsed_names(["m.q.lora_A.weight", "m.q.lora_B.weight", "m.score.weight"])
    >>> modules["m.q"].keys, others
    ({'down': 'm.q.lora_A.weight', 'up': 'm.q.lora_B.weight'}, ['m.score.weight'])
    """
    modules: dict[str, NamedParts] = {}
    others: list[str] = []
    for key in keys:
        match = _NAME.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        module = match["module"].replace(".processor", "")
        parts = modules.setdefault(module, NamedParts(module))
        if match["leaf"] == "bias":
            parts.bias = key
        else:
            parts.keys[_PARTS[match["part"]]] = key
        parts.embedding |= "embedding" in match["part"]
    for key in [key for key in others if key.endswith(_STORED) and key.removesuffix(_STORED) in modules]:
        modules[key.removesuffix(_STORED)].stored = key
        others.remove(key)
    return modules, others


def read_adapter(
    specs: Specs, base: Specs, config: AdapterConfig, place: str = "the adapter", ties: bool = False
) -> LowRankAdapter:
    """Return what an adapter does to a base model.

    Args:
        specs, base: headers of both. place: what messages call the adapter.
        ties: whether the base's config ties tensors, so that a module of the adapter may have none of its own there.

    Raises:
        CheckpointError: tensors that belong to nothing in the base, or parts that are missing; all at once.
    """
    modules, others = parsed_names(specs)
    reader = _AdapterReader(specs, base, config, modules, ties)
    updates = [update for parts in modules.values() if (update := reader.update(parts)) is not None]
    biases = [
        (key, parts.bias, update)
        for parts, update in ((modules[update.module], update) for update in updates)
        if parts.bias is not None and (key := reader.bias(parts.bias, update)) is not None
    ]
    replaced = {key: name for key in others if (name := reader.whole(key)) is not None}
    problems = [
        Diagnostic(code, f"{place}: {text}", notes=_shown(keys), help=_HELP[code])
        for (code, text), keys in reader.wrong.items()
    ]
    if problems:
        raise CheckpointError(problems)
    return LowRankAdapter(tuple(updates), tuple(biases), replaced)


@dataclass
class _AdapterReader:
    specs: Specs
    base: Specs
    config: AdapterConfig
    modules: Mapping[str, NamedParts]
    ties: bool = False
    wrong: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f"{_plain(module)}.weight" for module in self.modules]
        names += [_plain(_SAVED.sub("", key)) for key in self.specs if _NAME.fullmatch(key) is None]
        names += [_plain(module) for module in self.modules]
        names += [
            f"{_plain(module).replace('.base_layer', '')}.{name.rpartition('.')[2]}"
            for module in self.modules
            for name in self.config.parameters
        ]
        self.spelling = Spelling.of(names, self.base)
        self.flat = {key.removesuffix(".weight").replace(".", "_"): key for key in self.base}
        self.experts = self._named_experts() | (self._experts() if self.config.parameters else {})

    def problem(self, code: str, text: str, key: str) -> None:
        self.wrong.setdefault((code, text), []).append(key)

    def update(self, parts: NamedParts) -> AdapterUpdate | None:
        """The update of one module."""
        missing = [name for name in ("down", "up") if name not in parts.keys]
        if missing:
            self.problem("adapter-incomplete", f"tensors without their partner (no {missing[0]})", parts.module)
            return None
        down = self.specs[parts.keys["down"]]
        expert = self.experts.get(parts.module)
        key = expert[0] if expert else self.key(parts.module, parts.stored is not None)
        if key is None:
            self.problem("adapter-unmatched", "updates of modules that the base does not have", parts.module)
            return None
        plain = _plain(parts.module)
        weight = self.specs[parts.stored] if parts.stored else self.base[key]
        rank = down.shape[0] // (weight.shape[0] if expert else 1) if down.shape else 0
        rank = down.shape[1] if expert and len(down.shape) == 3 else rank
        alpha_key = parts.keys.get("alpha")
        alpha = self.config.alpha_of(key if expert else plain) if alpha_key is None else None
        if alpha is None and alpha_key is None:
            alpha = rank  # what has no alpha is not scaled
        if self.config.dora and "magnitude" not in parts.keys:
            self.problem("adapter-incomplete", "updates without their magnitude", parts.module)
        turned = self.config.turned or (parts.embedding and len(weight.shape) == 2)
        return AdapterUpdate(
            key, parts.module, parts.keys["down"], parts.keys["up"], rank, alpha,
            alpha_key, parts.keys.get("magnitude"), parts.stored, turned,
            expert[1] if expert else "", self.config.rslora,
        )  # fmt: skip

    def bias(self, key: str, update: AdapterUpdate) -> str | None:
        """The base's bias that an update's bias is added to."""
        name = update.key.removesuffix(".weight") + ".bias"
        if name in self.base:
            return name
        self.problem("adapter-unmatched", "biases of layers that have none in the base", key)
        return None

    def whole(self, key: str) -> str | None:
        """The base's key of a tensor that was trained whole."""
        name = self.spelling.key(_plain(_SAVED.sub("", key)))
        if name in self.base and self.base[name].shape == self.specs[key].shape:
            return name
        if name not in self.base and self.ties and (self.config.tied or self._is_whole(name)):
            return name
        self.problem("adapter-unmatched", "tensors that are not updates, and none of the base's", key)
        return None

    def key(self, module: str, stored: bool = False) -> str | None:
        """The base's key of a module's weight, or the key to come of one that the adapter stores for a tied base."""
        if "." not in module:
            return self._of_flat(module)
        name = self.spelling.key(f"{_plain(module)}.weight")
        return name if name in self.base or (stored and self.ties) else None

    def _of_flat(self, module: str) -> str | None:
        match = _FLAT.fullmatch(module)
        rest = match["rest"] if match else module
        component = match["component"] if match else ""
        for name in (f"{_COMPONENTS.get(component, component)}_{rest}", rest, module.removeprefix("lora_")):
            if name in self.flat:
                return self.flat[name]
        ends = [key for name, key in self.flat.items() if name.endswith(f"_{rest}")]
        return ends[0] if len(ends) == 1 else None

    def _experts(self) -> dict[str, tuple[str, str]]:
        """Module of the adapter -> the base's parameter, and the order of its dims.

        Several parameters of one module are nested as `m.base_layer`, and their names are not stored: shapes decide.
        """
        nested: dict[str, list[str]] = {}
        for module in self.modules:
            nested.setdefault(module.replace(".base_layer", ""), []).append(module)
        found: dict[str, tuple[str, str]] = {}
        for module, wrappers in nested.items():
            ends = dict.fromkeys(name.rpartition(".")[2] for name in self.config.parameters)
            names = {self.spelling.key(f"{_plain(module)}.{end}"): end for end in ends}
            keys = [key for key in names if key in self.base and self._is_targeted(key)]
            if not keys:
                continue
            ways = [
                tuple(zip(some, orders))
                for some in permutations(keys, len(wrappers))
                for orders in product(*(self._orders(one, key) for one, key in zip(wrappers, some)))
                if len(set(orders)) == 1  # a module stores all of its parameters in one order
            ]
            if len(ways) > 1:
                text = "updates of stacked parameters that fit several of them, or in two ways"
                self.problem("adapter-ambiguous", text, module)
            found.update(zip(wrappers, ways[0]) if ways else ())
        return found

    def _named_experts(self) -> dict[str, tuple[str, str]]:
        """Modules of the adapter that are called as a stacked parameter is."""
        found: dict[str, tuple[str, str]] = {}
        for module in self.modules:
            key = self.spelling.key(_plain(module))
            if key in self.base and (orders := self._orders(module, key)):
                found[module] = key, orders[0]
        return found

    def _is_whole(self, key: str) -> bool:
        module = f".{key.rpartition('.')[0]}"
        return any(module.endswith(f".{name}") for name in self.config.whole)

    def _is_targeted(self, key: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in self.config.parameters)

    def _orders(self, module: str, key: str) -> list[str]:
        """The orders of a stacked weight's dims that fit its update; what is called as the weight itself is out_in."""
        keys, shape = self.modules[module].keys, self.base[key].shape
        if "down" not in keys or "up" not in keys or len(shape) != 3:
            return []
        down, up = (self.specs[keys[part]].shape for part in ("down", "up"))
        inside, out = down[-1], up[-2] if len(up) > 1 else 0
        orders = [name for name, sides in (("out_in", (out, inside)), ("in_out", (inside, out))) if shape[1:] == sides]
        return [order for order in orders if order == "in_out" or not self.config.turns_experts]


def _plain(module: str) -> str:
    return module.removeprefix(_WRAPPER)


def _shown(keys: Sequence[str]) -> tuple[str, ...]:
    shown = [text for text, _ in fold(keys)]
    return tuple([*shown[:8], f"and {counted(len(shown) - 8, 'more line')}"] if len(shown) > 8 else shown)
