"""Merging adapters into a base: the recipe that adds their updates, and the plan that runs it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..catalog import RecipeLike, as_recipe
from ..errors import CheckpointError, Diagnostic
from ..language.captures import escape
from ..language.config_edits import ConfigEdits
from ..language.recipe import Recipe
from ..ops.low_rank_pairs import alpha_divisor
from ..planning.plan import Plan
from ..running.runner import plan
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .adapter_config import config_of
from .pair_reading import AdapterUpdate, LowRankAdapter, read_adapter

__all__ = ["merge"]

_NAMES = "ijkmn"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=/)\d+(?=\.)")
_BASE = "base/"
_TIES = "tie_word_embeddings"


def merge(base: Any, *adapters: Any, weights: Sequence[float] | None = None, recipe: RecipeLike | None = None) -> Plan:
    """Plan the base model with adapters merged into it; what they do not change is copied.

    >>> import torch, ckptsurgery as cs
    >>> base = {"q.weight": torch.zeros(2, 2), "k.weight": torch.ones(2, 2)}
    >>> lora = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
    >>> merged = cs.adapters.merge(base, lora, weights=[0.5])
    >>> merged.state_dict()["q.weight"].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    >>> print(merged.recipe.rules[0])
    base/q.weight & lora/q.lora_A.weight & lora/q.lora_B.weight -> q.weight | lora_merge(alpha=0.5)

    An adapter is a PEFT folder, or a file in the spelling of PEFT, diffusers or kohya. Alpha, its patterns, rsLoRA,
    DoRA, `fan_in_fan_out`, `target_parameters` and modules that were trained whole are as in `adapter_config.json`
    beside it; without one, alpha is what the file stores for each module, and an update without alpha is not scaled.
    Several adapters are added at once, W + Σ w[k] · s[k] · B[k]·A[k], and rounded once.

    Args:
        base, adapters: whatever `open` takes.
        weights: of each adapter; 1 where left out.
        recipe: from the layout of weights that the adapters were trained on to the base's, where these differ, such as
            for a base with fused projections. The base is taken apart by its inverse, merged, and put together again,
            in one pass. So an adapter of some of the fused parts, or one with other ranks for each, is merged exactly.

    Returns:
        a plan over the mounts `base/` and `lora/` (`lora0/`, `lora1/` of several); its `recipe` can be written down.

    Raises:
        CheckpointError: tensors of an adapter that no rule would take, such as those of modules that the base does not
            have; methods other than LoRA; adapters that exclude each other.
    """
    given = [1.0] * len(adapters) if weights is None else list(map(float, weights))
    if len(given) != len(adapters) or not adapters:
        text = f"{len(given)} weights for {len(adapters)} adapters" if adapters else "no adapter was named"
        raise CheckpointError(Diagnostic("bad-argument", text, help="weights=[1.0, 0.5], one for each adapter"))
    whole = open_checkpoint(base)
    opened = [open_checkpoint(adapter) for adapter in adapters]
    names = ["lora/"] if len(opened) == 1 else [f"lora{n}/" for n in range(len(opened))]
    layout = as_recipe(recipe) if recipe is not None else None
    specs = whole.specs if layout is None else plan(whole, layout.inverse(), config=whole.config).specs
    config = whole.config or {}
    ties = config.get(_TIES) is True and not whole.ties
    read = [
        read_adapter(one.specs, specs, config_of(source, one), one.source, ties)
        for source, one in zip(adapters, opened)
    ]
    made = _AdapterMerge(dict(zip(names, zip(read, opened, given))), specs)
    merging = made.recipe()
    if layout is not None:
        merging = _in_layout(merging, layout)
    if ties and made.untied:
        merging = merging.replace(config=ConfigEdits(set={_TIES: False}))
    planned = plan({_BASE: whole, **dict(zip(names, opened))}, merging, config=whole.config)
    told = made.tied_updates(config.get("vocab_size")) if ties and not made.untied else []
    return replace(planned, warnings=(*planned.warnings, *told)) if told else planned


def _in_layout(merging: Recipe, layout: Recipe) -> Recipe:
    """The recipe of a merge for a base in another layout: to the adapters' layout before it, and back behind it."""
    back = layout.inverse()
    apart = [stage.scoped(_BASE, _BASE).replace(rest="keep") for stage in (back.replace(stages=()), *back.stages)]
    stages: list[Recipe] = [*apart, merging, layout.replace(stages=()), *layout.stages]
    summary = f"{merging.summary}, in the layout of: {layout.summary}"
    return stages[0].replace(stages=tuple(stages[1:]), summary=summary)


@dataclass(frozen=True)
class _AddedUpdate:
    """An update under its mount, with the weight of its adapter."""

    mount: str
    update: AdapterUpdate
    weight: float


@dataclass
class _AdapterMerge:
    """Makes the rules of a merge.

    Args:
        adapters: mount -> the adapter, its checkpoint and its weight.
        base: headers of the base, in the layout of the adapters.
        read: stored alphas that the rules have as numbers.
        stored: keys of the base whose weight an adapter stores as well; the adapter's is taken.
        same: a stored weight, under its mount -> the base's key that it must equal.
        untied: keys of the output that the base lacks, since its config ties them to others.
    """

    adapters: Mapping[str, tuple[LowRankAdapter, Checkpoint, float]]
    base: Mapping[str, TensorSpec]
    problems: list[Diagnostic] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)

    def recipe(self) -> Recipe:
        """The recipe."""
        rows = [self.row(added) for added in self.by_key().values()]
        rules = [*folded(rows), *self.biases()]
        whole = {}
        for mount, (adapter, _, _) in self.adapters.items():
            for key, name in adapter.replaced.items():
                if name in whole:
                    self.clash(name, "two adapters bring it whole")
                whole[name] = f"{escape(mount + key)} -> {escape(name)}"
        left = [*whole, *self.stored]
        kept = [_BASE + name for name in left if name in self.base]
        drop = [escape(key) for key in (*kept, *dict.fromkeys(self.read))]
        self.untied = [name for name in left if name not in self.base]
        if self.problems:
            raise CheckpointError(self.problems)
        names = ", ".join(self.adapters)
        return Recipe(
            [*rules, *whole.values()],
            drop=drop,
            rest=f"{_BASE}{{k...}} -> {{k...}}",
            same=self.same,
            summary=f"{names} merged into base/",
        )

    def by_key(self) -> dict[str, list[_AddedUpdate]]:
        """The updates of each tensor of the base."""
        found: dict[str, list[_AddedUpdate]] = {}
        for mount, (adapter, _, weight) in self.adapters.items():
            for update in adapter.updates:
                found.setdefault(update.key, []).append(_AddedUpdate(mount, update, weight))
        return found

    def row(self, added: Sequence[_AddedUpdate]) -> tuple[tuple[str, ...], str, str]:
        """Sources, target and op of a tensor's rule."""
        update = added[0].update
        alone = len(added) == 1
        special = any(one.update.magnitude or one.update.experts for one in added)
        if special and not alone:
            self.clash(update.key, "only one adapter can change what has a magnitude, or stacked experts")
        keys = [self.weight(added)]
        for one in added:
            keys += [one.mount + one.update.down, one.mount + one.update.up]
        if alone and special:
            return self.special(added[0], keys)
        if not alone:
            scales = ", ".join(repr(self.scale(one)) for one in added)
            return tuple(keys), update.key, f"lora_add([{scales}]{', fan_in_fan_out=true' * update.turned})"
        extra = ", fan_in_fan_out=true" * update.turned + ", rslora=true" * update.rslora
        if update.alpha_key is not None and added[0].weight == 1:
            keys.append(added[0].mount + update.alpha_key)
            return tuple(keys), update.key, f"lora_merge({extra[2:]})" if extra else "lora_merge"
        return tuple(keys), update.key, f"lora_merge(alpha={_number(self.alpha(added[0]))}{extra})"

    def weight(self, added: Sequence[_AddedUpdate]) -> str:
        """The source of the weight: the adapter's, where it stores one, or the base's where several store it."""
        update = added[0].update
        if len(added) == 1 and update.stored is not None:
            self.stored.append(update.key)
            return added[0].mount + update.stored
        for one in added:
            if one.update.stored is None:
                continue
            if update.key not in self.base:
                self.clash(update.key, "the base does not have it, and several adapters store it")
            self.same[escape(one.mount + one.update.stored)] = escape(_BASE + update.key)
        return _BASE + update.key

    def tied_updates(self, count: object) -> list[Diagnostic]:
        """A warning for each update of a tensor that the base's config ties to one without a name of its own.

        Args:
            count: rows of the tensors that are tied.
        """
        changed = {update.key for adapter, _, _ in self.adapters.values() for update in adapter.updates}
        changed |= {name for adapter, _, _ in self.adapters.values() for name in adapter.replaced.values()}
        keys = [key for key in sorted(changed) if self.base[key].shape[:1] == (count,)]
        help = "give the base its head as a tensor of its own, by a rule '+ EMBEDDING -> HEAD', and merge into that"
        text = "is tied to the head, which the merge changes with it; the adapter was trained beside an unchanged head"
        return [Diagnostic("adapter-tied", f"{key!r} {text}", help=help, severity="warning") for key in keys]

    def special(self, added: _AddedUpdate, keys: list[str]) -> tuple[tuple[str, ...], str, str]:
        """The rule of what has a magnitude, or of stacked experts."""
        update = added.update
        alpha = _number(self.alpha(added))
        extra = ", rslora=true" * update.rslora
        if update.experts:
            return tuple(keys), update.key, f"lora_merge_experts(alpha={alpha}, order={update.experts}{extra})"
        if added.weight != 1:
            self.clash(update.key, "an update with a magnitude (DoRA) has no weight")
        extra += ", fan_in_fan_out=true" * update.turned
        return (*keys, f"{added.mount}{update.magnitude}"), update.key, f"dora_merge(alpha={alpha}{extra})"

    def alpha(self, added: _AddedUpdate) -> float:
        """Alpha times the adapter's weight; one that the file stores is read."""
        update = added.update
        alpha = update.alpha
        if alpha is None and update.alpha_key is not None:
            alpha = self.adapters[added.mount][1].load(update.alpha_key).item()
            self.read.append(added.mount + update.alpha_key)
        return (alpha or 0) * added.weight

    def scale(self, added: _AddedUpdate) -> float:
        """The number that multiplies B·A."""
        return self.alpha(added) / alpha_divisor(added.update.rank, added.update.rslora)

    def biases(self) -> list[str]:
        """The rules of biases that updates have."""
        rules: dict[str, str] = {}
        for mount, (adapter, _, weight) in self.adapters.items():
            for key, source, update in adapter.biases:
                if key in rules:
                    self.clash(key, "two adapters change this bias")
                scale = self.scale(_AddedUpdate(mount, update, weight))
                rules[key] = f"{escape(_BASE + key)}, {escape(mount + source)} -> {escape(key)} | apply({scale!r})"
        return list(rules.values())

    def clash(self, key: str, why: str) -> None:
        """Note adapters that exclude each other."""
        text = f"{key!r} cannot be merged: {why}"
        self.problems.append(Diagnostic("adapter-clash", text, help="merge them one after another, with weight 1"))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def folded(rows: Sequence[tuple[tuple[str, ...], str, str]]) -> list[str]:
    """Return rules, one for all layers where these differ in their numbers alone.

    >>> folded([((f"base/h.{n}.w", f"l/h.{n}.a"), f"h.{n}.w", "op") for n in range(3)])
    ['base/h.{i}.w & l/h.{i}.a -> h.{i}.w | op']
    """
    groups: dict[tuple[tuple[str, ...], str, str], list[tuple[tuple[str, ...], str, str]]] = {}
    for sources, target, op in rows:
        shapes = [_shape(key) for key in (*sources, target)]
        alike = len({numbers for _, numbers in shapes}) == 1 and len(shapes[-1][1]) <= len(_NAMES)
        names = tuple(name for name, _ in shapes) if alike else (*map(escape, sources), escape(target))
        groups.setdefault((names[:-1], names[-1], op), []).append((sources, target, op))
    wanted = [target for _, target, _ in groups]
    rules = []
    for (names, name, op), members in groups.items():
        if wanted.count(name) == 1:
            rules.append(f"{' & '.join(names)} -> {name} | {op}")
        else:  # other layers have another rule
            rules += [f"{' & '.join(map(escape, s))} -> {escape(t)} | {op}" for s, t, _ in members]
    return rules


def _shape(key: str) -> tuple[str, tuple[str, ...]]:
    """A key's pattern, with a capture for each number between dots, and the numbers."""
    numbers = tuple(_NUMBER.findall(key))
    if not numbers or len(numbers) > len(_NAMES):
        return escape(key), numbers
    parts = _NUMBER.split(key)
    spelled = "".join(f"{escape(part)}{{{name}}}" for part, name in zip(parts, _NAMES[: len(numbers)]))
    return spelled + escape(parts[-1]), numbers
