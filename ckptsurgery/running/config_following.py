"""The companions of an output, with a config that follows its tensors.

A plan's own changes of the config come first. Then some fields follow the headers, where those of the source agreed
with them and those of the output do not: the dtype, whether names are tied, lists with an entry for each layer, and
`quantization_config`, which is dropped with the last quantised tensor. Every change is a note of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..language.config_edits import same_field
from ..planning.config_changes import ConfigChange, changed_config, shown
from ..planning.plan import Plan
from ..specs import DTYPES, dtype_name
from ..storage.checkpoint import Checkpoint
from ..storage.json_text import parse_json
from ..storage.sources.files import read_regular
from .companions import companions_for, companions_of
from .config_remarks import common_dtype, fields_of, is_unpacked, tied_otherwise
from .layer_lists import entries_by_layer, is_layer_list

__all__ = ["followed", "following_companions"]

_CONFIG = "config.json"
_OF_QUANTISATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside a config that describe how weights are quantised."""


def following_companions(
    plan: Plan, checkpoint: Checkpoint, folder: Path, overwrite: bool, aliases: Mapping[str, str]
) -> tuple[dict[str, bytes], list[str]]:
    """Return the companions for an output, name -> content, and notes on the changes of the config.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    along = companions_for(checkpoint.files, folder, overwrite)
    held = next((path for name, path in companions_of(checkpoint.files) if name == _CONFIG), None)
    kept = held is not None and _CONFIG not in along  # the output has one, or is the source itself
    if kept and not overwrite:
        return along, []
    config = _parsed(held) if held is not None else _given(plan, checkpoint)
    if config is None:
        return along, []
    ties = [tie.names for tie in checkpoint.ties]
    made, notes = followed(config, plan, aliases, ties)
    if made != config:
        along[_CONFIG] = (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()
    if "quantization_config" in config and "quantization_config" not in made:
        along = {name: content for name, content in along.items() if name not in _OF_QUANTISATION}
    return along, [f"config.json: {note}" for note in notes]


def followed(
    config: Mapping[str, Any], plan: Plan, aliases: Mapping[str, str], ties: Iterable[tuple[str, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """Return a config as the output's tensors are, and a line for each change.

    Args:
        aliases: names of the output that share the tensor of another.
        ties: groups of the source's names that are one tensor.
    """
    made = changed_config(config, plan.config)
    settled = [change.value if change.kind == "rename" else change.path for change in plan.config]
    fixed = [path for path, change in zip(settled, plan.config) if change.kind != "rename"]
    changes = [
        change
        for change in _shown_by_headers(made, plan, aliases, list(ties))
        if not any(same_field(change.path, path) for path in fixed)
    ]
    told = [change for change in plan.config if _makes_a_difference(change, config)]
    return changed_config(made, changes), list(shown([*told, *changes]))


def _makes_a_difference(change: ConfigChange, config: Mapping[str, Any]) -> bool:
    return change.kind == "set" or changed_config(config, [change]) != config


def _shown_by_headers(
    config: Mapping[str, Any], plan: Plan, aliases: Mapping[str, str], ties: list[tuple[str, ...]]
) -> Iterator[ConfigChange]:
    before, after = plan.source, dict(plan.specs)
    for path, value in fields_of(config):
        name = path.rpartition(".")[2]
        if name == "quantization_config" and is_unpacked(before, after):
            yield ConfigChange("drop", path)
        elif name in ("torch_dtype", "dtype") and isinstance(value, str):
            now = common_dtype(after)
            if now and now not in (_dtype(value), common_dtype(before)):
                yield ConfigChange("set", path, DTYPES[now].torch)
        elif name.startswith("tie_") and isinstance(value, bool) and tied_otherwise(value, plan, aliases, ties):
            yield ConfigChange("set", path, not value)
        elif is_layer_list(name, value) and (made := entries_by_layer(value, plan)) not in (None, value):
            yield ConfigChange("set", path, made)


def _dtype(text: str) -> str | None:
    try:
        return dtype_name(text.removeprefix("torch."))
    except CheckpointError:
        return None


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        config = parse_json(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _given(plan: Plan, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The config that a plan was made with, where its changes make another one of it."""
    if all(change.kind == "drop" for change in plan.config):
        return None
    return plan.options.config or checkpoint.config or {}
