"""Folders whose checkpoint is in parts: which folders below belong to it, and under which prefixes their keys go.

A diffusers root has an index of its components; each that has weights is opened under its name (`vae.`). A
sentence-transformers model lists its modules; those in folders of their own are opened under these (`2_Dense.`), the
first one, which is at the top, without a prefix. In every other folder the checkpoint is one part. Each part is chosen
by the rule in `choosing`. A repository in the hub's cache means the snapshot that its `main` names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import close_keys, shown_keys
from ..json_text import parse_json
from .choosing import Choice, Folder, choose, weights_in

__all__ = ["SENTENCES", "Component", "parts_of", "snapshot_in"]

DIFFUSERS, SENTENCES = "model_index.json", "modules.json"


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a checkpoint.

    Args:
        prefix: the text before its keys.
        folder: the folder below that holds it; empty for the folder itself.
        choice: its files, in that folder.
    """

    prefix: str
    folder: str
    choice: Choice

    @property
    def names(self) -> tuple[str, ...]:
        """Its files, or its index."""
        return (self.choice.index,) if self.choice.index else self.choice.files


def parts_of(folder: Folder, text_of: Callable[[str], bytes], component: str | None = None) -> list[Component]:
    """Return the parts of the checkpoint in a folder.

    Args:
        folder: the folder.
        text_of: gives the bytes of a small file in it.
        component: the one folder below that is wanted.

    Raises:
        CheckpointError: there is no such component, and what `choose` raises.
    """
    found = _components(folder, text_of)
    if component is not None:
        return [Component("", component, choose(_below(folder, component, [*found.values()])))]
    if not found:
        return [Component("", "", choose(folder))]
    return [
        Component(prefix, name, choose(_below(folder, name, ()) if name else folder)) for prefix, name in found.items()
    ]


def _components(folder: Folder, text_of: Callable[[str], bytes]) -> dict[str, str]:
    """Prefix -> folder of each part, in the order of the index; nothing for a folder of one checkpoint."""
    names = set(folder.names)
    if DIFFUSERS not in names and SENTENCES not in names:
        return {}
    filled = {name.rpartition("/")[0] for name in folder.below() if weights_in([name.rpartition("/")[2]])}
    told: Any = None
    with suppress(ValueError, RecursionError, OSError):
        told = parse_json(text_of(DIFFUSERS if DIFFUSERS in names else SENTENCES))
    if DIFFUSERS in names:
        listed = [name for name, kind in told.items() if _is_component(kind)] if isinstance(told, dict) else []
        chosen = [name for name in listed if name in filled] or sorted(filled)
        return {f"{name}.": name for name in chosen}
    paths = [row.get("path") for row in told if isinstance(row, dict)] if isinstance(told, list) else []
    inner = [path for path in paths if isinstance(path, str) and path in filled]
    if not inner:
        return {}
    return ({"": ""} if weights_in(names) else {}) | {f"{path}.": path for path in inner}


def _is_component(kind: Any) -> bool:
    return isinstance(kind, list) and len(kind) == 2 and None not in kind


def _below(folder: Folder, name: str, known: list[str] | tuple[()]) -> Folder:
    """A folder below another.

    Raises:
        CheckpointError: there is none, or nothing is in it.
    """
    inside = [path.removeprefix(f"{name}/") for path in folder.below() if path.startswith(f"{name}/")]
    if not inside:
        others = known or sorted({path.partition("/")[0] for path in folder.below()})
        near = close_keys(name, others)
        meant = (Remedy("component", {name: near[0]}, kind="instead"),) if near else ()
        text = f"{folder.name} has no component {name!r}"
        notes = shown_keys(others, 12) or ("it has no folders",)
        raise CheckpointError(
            Diagnostic("missing-component", text, folder.place, notes, remedies=meant, advice="the notes list them")
        )
    return Folder(
        f"the folder {folder.path_of(name)!r}",
        folder.path_of(name),
        inside,
        list,
        lambda inner: folder.path_of(f"{name}/{inner}"),
        lambda index: folder.shards_of(f"{name}/{index}"),
    )


def snapshot_in(path: str, names: list[str]) -> str | None:
    """Return the folder that a part of the hub's cache means; None for any other folder.

    A repository means the snapshot of `main`, or for its only one; a cache of one repository for that.
    """
    here = set(names)
    if "snapshots" in here and here & {"blobs", "refs"}:
        with suppress(OSError, UnicodeDecodeError):
            snapshots = sorted(folder.name for folder in Path(path, "snapshots").iterdir())
            main = Path(path, "refs", "main")
            commit = main.read_text().strip() if main.is_file() else ""
            if commit in snapshots or len(snapshots) == 1:
                return str(Path(path, "snapshots", commit if commit in snapshots else snapshots[0]))
        return None
    repositories = [name for name in names if name.startswith("models--")]
    return str(Path(path, repositories[0])) if len(repositories) == 1 else None
