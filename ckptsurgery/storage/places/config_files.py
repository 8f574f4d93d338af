"""The configuration beside weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_text import parse_json
from ..sources.files import read_regular

__all__ = ["config_beside", "config_names"]


def config_beside(folder: Path, names: tuple[str, ...] = ()) -> Mapping[str, Any] | None:
    """The configuration beside files; a file that is no JSON object is not the model's configuration."""
    for name in config_names(names):
        try:
            config = parse_json(read_regular(folder / name))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict):
            return config
    return None


def config_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that the configuration of these files may have; an adapter has its own.

    >>> config_names(("adapter_model.safetensors",)), config_names(("model.safetensors",))
    (('adapter_config.json', 'config.json'), ('config.json',))
    """
    adapter = any(name.rpartition("/")[2].startswith("adapter_model") for name in names)
    return ("adapter_config.json", "config.json") if adapter else ("config.json",)
