"""Recipes read from the conversion tables of the transformers library: from the files of a model to the model."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from ..catalog import load_recipe
from ..errors import CkptSurgeryError, Diagnostic, RecipeError, Remedy
from ..language.recipe import Recipe
from ..modeling.skeletons import skeleton
from ..planning.options import PlanOptions
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.record import Target
from ..specs import TensorSpec
from .conversion_axes import NotSayable, axes_of
from .conversion_groups import ConversionGroup, conversions_of, groups_of
from .key_rules import FLAT, KeyPair, Kind, generalised, spread
from .small_configs import config_makers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["classes_of", "from_transformers", "recipe_of_model", "transformers_types"]

_GIVEN = "config=… gives one"
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
)


def transformers_types() -> list[str]:
    """Return the names in the library's conversion table: model types, and classes with a table of their own."""
    from transformers import conversion_mapping as table

    known: Mapping[str, Any] = table._build_checkpoint_conversion_mapping()  # type: ignore[no-untyped-call]
    return sorted(known)


def from_transformers(model_type: str | nn.Module, config: Any = None) -> Recipe:
    """Return the recipe from a model's files to the model in memory, as the transformers library converts them.

    Its inverse is what `save_pretrained` does. Nothing is downloaded: a model of the type is built without weights, and
    the library's own code is asked what its names are in files.

    Args:
        model_type: a model type such as `config.json` has it, the name of a class, or a model that is there.
        config: a config of the type, where its own defaults are not to be taken.

    Raises:
        RecipeError: an unknown type; one that cannot be built from its defaults; a conversion that no rule can say. The
            reason is named.
    """
    if not isinstance(model_type, str):
        return recipe_of_model(model_type)
    if model_type == "legacy":
        return _legacy()
    problems: list[str] = []
    for kind, make_config in _candidates(model_type, config):
        try:
            model = _empty(kind, make_config())
        except Exception as error:  # a constructor is the library's code, and may raise anything
            text = " ".join(str(error).split())
            problems.append(f"{kind.__name__}: {type(error).__name__}: {text}"[:300])
            continue
        return recipe_of_model(model)
    text = f"no model of the type {model_type!r} can be built without a config of its own"
    raise RecipeError(
        Diagnostic("cannot-build", text, notes=tuple(dict.fromkeys(problems))[:6], help="config=… gives one")
    )


def _legacy() -> Recipe:
    """What the library reads of files of every type that are from before its names changed."""
    from transformers import conversion_mapping as table

    transforms: Any = table.get_checkpoint_conversion_mapping("legacy")  # type: ignore[no-untyped-call]
    rules = []
    for transform in transforms:
        for pattern in transform.source_patterns:
            before, after = pattern.replace("\\.", "."), transform.target_patterns[0]
            ends = ("", ".{s...}") if before.startswith("^") else ("{r...}.", "")
            sides = (f"{ends[0]}{text.strip('^.')}{ends[1]}" for text in (before, after))
            rules.append("? " + " -> ".join(sides))
    return Recipe(rules, rest="keep", summary="files of old names -> those of today, as transformers reads them")


def recipe_of_model(model: nn.Module, sized: bool = False) -> Recipe:
    """Return the recipe from the files of one model to the model, exact for its keys.

    Args:
        sized: put the sizes of unequal parts into the recipe, so that it needs no target that shows them.

    Raises:
        RecipeError: a conversion that no rule can say.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise RecipeError(
            Diagnostic("not-sayable", f"{type(model).__name__} is not a model of the transformers library")
        )
    name = config.model_type or type(model).__name__
    summary = f"files of {name} -> the model, as transformers converts them"
    problem: str | None = None
    try:
        groups = groups_of(model, conversions_of(model))
        for counted in (False, True):
            recipe = _written(groups, config, summary, counted, sized)
            problem = _disproof(recipe, groups, config.to_dict())
            if problem is None:
                return recipe
    except NotSayable as reason:
        raise RecipeError(Diagnostic("not-sayable", f"{name!r} needs what no rule can say: {reason}")) from None
    text = f"the rules for {name!r} do not say what the library does: {problem}"
    raise RecipeError(Diagnostic("not-sayable", text))


def _candidates(name: str, config: Any) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Classes of a type, heads first, each with what makes its config: the defaults, then small ones."""
    import transformers

    if config is not None:
        name = config.model_type
    if name in transformers.CONFIG_MAPPING:
        kind: Any = transformers.CONFIG_MAPPING[name]
        classes = classes_of(name)
    else:
        one = getattr(transformers, name, None) or _hidden(name)
        kind = getattr(one, "config_class", None)
        if kind is None:
            raise _unknown(name)
        classes = [one]
    for make in config_makers(kind) if config is None else (lambda: config,):
        yield from ((one, make) for one in classes)


def classes_of(model_type: str) -> list[Any]:
    """Return the model classes of a type: those that the library's tables name, heads first, and those beside them."""
    import transformers
    from transformers.models.auto import modeling_auto as tables

    kind: Any = transformers.CONFIG_MAPPING[model_type]
    named: list[str] = []
    for table in _HEADS:
        found = getattr(tables, table, {}).get(model_type)
        named += [found] if isinstance(found, str) else list(found or ())
    classes = [one for name in dict.fromkeys(named) if (one := getattr(transformers, name, None)) is not None]
    classes += [one for one in _own_classes(kind) if one not in classes]
    # A class with a config of its own comes first: one that is borrowed from another type converts as that type does.
    return sorted(classes, key=lambda one: getattr(one, "config_class", kind) is not kind)


def _unknown(name: str) -> RecipeError:
    import transformers

    known = [*transformers_types(), *transformers.CONFIG_MAPPING]
    near = [one for one in difflib.get_close_matches(name, known, 4) if one != name]
    meant = (Remedy("model_type", {name: near}, kind="instead"),) if near else ()
    return RecipeError(Diagnostic("unknown-model-type", f"transformers has no model type {name!r}", remedies=meant))


def _own_classes(config: Any) -> list[Any]:
    """The model classes beside a config, those with a config of this kind."""
    import importlib

    module = config.__module__.replace(".configuration_", ".modeling_")
    try:
        found = vars(importlib.import_module(module)).values()
    except ImportError:
        return []
    kinds = [c for c in found if isinstance(c, type) and getattr(c, "config_class", None) is config]
    return sorted(
        (c for c in kinds if c.__module__ == module and "PreTrained" not in c.__name__), key=lambda c: c.__name__
    )


def _hidden(name: str) -> Any:
    """A class that the library does not offer at its top."""
    import importlib
    import pkgutil

    import transformers.models as models

    stem = name.lower()
    for found in pkgutil.iter_modules(models.__path__):
        if stem.startswith(found.name.replace("_", "")):
            try:
                module = importlib.import_module(f"transformers.models.{found.name}.modeling_{found.name}")
            except ImportError:
                continue
            if hasattr(module, name):
                return getattr(module, name)
    return None


def _empty(kind: Any, config: Any) -> nn.Module:
    """A model without weights."""
    import torch

    try:
        with torch.device("meta"):
            model: nn.Module = kind(copy.deepcopy(config))
        return model
    except (RuntimeError, NotImplementedError):  # its constructor computes with values
        return skeleton(lambda: kind(copy.deepcopy(config)))


def _written(groups: Sequence[ConversionGroup], config: Any, summary: str, counted: bool, sized: bool) -> Recipe:
    """The recipe for groups, in as few rules as say the same.

    Args:
        counted: whether groups of another number of tensors are kept apart: one rule gathers as many everywhere.
    """
    pairs, later, others = [], [], []
    for group in groups:
        axes = axes_of(group, config, sized)
        if group.transform is None and not group.renamed:
            others.append(group.models[0])
            continue
        kind = axes.source, axes.target, tuple(axes.dims.items()), FLAT if axes.flat else len(group.files[0]) * counted
        pairs.append(_pair(group, kind))
        for numbers, done in axes.after:
            later += [(group.models[n], done) for n in numbers]
    parts = [_stage(pairs, others, summary)]
    if later:
        chosen = {key for key, _ in later}
        kept = [key for group in groups for key in group.models if key not in chosen]
        after = [KeyPair(k, k, (k,), (k,), (a.source, a.target, tuple(a.dims.items()), 0)) for k, a in later]
        parts.append(_stage(after, kept, ""))
    return reduce(lambda done, part: done.then(part), parts)


def _pair(group: ConversionGroup, kind: Kind) -> KeyPair:
    flat = kind[3] == FLAT  # the experts of several lists are numbered in one row
    patterns = group.transform.source_patterns if group.transform is not None else [""] * len(group.files)
    merged = [_starred(keys, pattern) for keys, pattern in zip(group.files, patterns)]
    source = merged[0] if len(merged) == 1 else _choices(merged)
    source = source.replace("{e}", "{(m e)}") if flat else source
    target = spread(group.models, "m" if flat else "p")
    return KeyPair(source, target, tuple(k for keys in group.files for k in keys), group.models, kind)


def _starred(keys: Sequence[str], pattern: str) -> str:
    """The pattern of merged keys; where there is one alone, its number is the one behind the word before the star."""
    if len(keys) > 1 or "*" not in pattern:
        return spread(keys, "e")
    word = pattern.replace("\\", "").split("*")[0].rstrip(".").rpartition(".")[2]
    return spread(keys, "e").replace(f"{word}.0", f"{word}.{{e}}", 1)


def _choices(patterns: Sequence[str]) -> str:
    """One pattern for several that each have the same captures: what differs becomes a choice."""
    plain = [pattern.replace("{e}", "\0") for pattern in patterns]
    return spread(plain, "p").replace("\0", "{e}")


def _stage(pairs: Sequence[KeyPair], others: Sequence[str], summary: str) -> Recipe:
    rules: list[str] = []
    tables: dict[str, Any] = {}
    for number, (source, target, kind) in enumerate(generalised(pairs, others)):
        before, after, sizes, _ = kind
        for name, size in sizes:
            if isinstance(size, tuple):  # of unequal parts
                size = dict(zip(_choices_in(f"{source} {target}"), size))
            own = name if tables.setdefault(name, size) == size else f"{name}{number}"
            tables[own] = size
            before, after = (_renamed_axis(text, name, own) for text in (before, after))
        rules.append(f"? {source} {before}".rstrip() + f" -> {target} {after}".rstrip())
    return Recipe(rules, dims=tables, rest="keep", summary=summary)


def _choices_in(text: str) -> list[str]:
    found = re.search(r"\{p:([^}]*)\}", text)
    return found.group(1).split(",") if found is not None else []


def _renamed_axis(text: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w]){re.escape(old)}(?![\w])", new, text)


def _disproof(recipe: Recipe, groups: Sequence[ConversionGroup], config: Mapping[str, Any]) -> str | None:
    """Why a recipe does not say of these keys what the library does; None where it does."""
    files = {k: TensorSpec(g.shapes[f"file:{k}"], "F32") for g in groups for keys in g.files for k in keys}
    models = {k: TensorSpec(g.shapes[k], "F32") for g in groups for k in g.models}
    try:
        plan = make_plan(files, recipe, load_recipe, Target(models), PlanOptions(config))
    except CkptSurgeryError as error:
        return str(error.diagnostics[0])
    return _other_sources(plan, groups)


def _other_sources(plan: Plan, groups: Sequence[ConversionGroup]) -> str | None:
    made = {key: set(step.sources) for step in plan.steps for key in step.targets}
    for group in groups:
        flat = len(group.models) > 1 and len(group.files[0]) > 1  # each of the model's has a part of the lists
        each = len(group.files[0]) // len(group.models)
        for number, key in enumerate(group.models):
            part = slice(number * each, (number + 1) * each) if flat else slice(None)
            wanted = {k for keys in group.files for k in keys[part]}
            if made.get(key) != wanted:
                return f"{key!r} comes from {sorted(made.get(key, ()))[:4]}, and should from {sorted(wanted)[:4]}"
    return None
