"""Entering a part of a checkpoint by a dotted prefix."""

from __future__ import annotations

from ..errors import CheckpointError, Diagnostic, Remedy
from ..wording import close_keys, shown_keys
from .contents import Contents
from .metadata_records import METADATA, VERSIONS, told_versions

__all__ = ["enter"]


def enter(contents: Contents, subtree: str, source: str) -> Contents:
    """The contents below a prefix, with the prefix stripped; what lies beside it is left out.

    Raises:
        CheckpointError: no key lies below it.
    """
    prefix = subtree if subtree.endswith((".", "/")) else _prefix(subtree, contents)
    entries = {
        key[len(prefix) :]: entry for key, entry in contents.entries.items() if key.startswith(prefix) and key != prefix
    }
    if not entries:
        tops = dict.fromkeys(key.partition(".")[0] for key in contents.entries)
        near = close_keys(subtree, sorted({key.rpartition(".")[0] for key in contents.entries} - {""}))
        raise CheckpointError(
            Diagnostic(
                "missing-subtree",
                f"no key lies below {subtree!r}",
                source,
                notes=shown_keys(tops),
                remedies=(Remedy("subtree", {subtree: near[:1]}, kind="instead"),) if near else (),
                advice="the notes list what lies at the top",
            )
        )
    aliases = {
        alias[len(prefix) :]: kept[len(prefix) :]
        for alias, kept in contents.aliases.items()
        if alias.startswith(prefix) and kept.startswith(prefix)
    }
    extras = {path[len(prefix) :]: value for path, value in contents.extras.items() if path.startswith(prefix)}
    versions = told_versions(contents.extras, contents.metadata, contents.entries)
    below = {path[len(prefix) :]: told for path, told in versions.items() if f"{path}.".startswith(prefix)}
    if below:
        extras[METADATA] = below
    metadata = {name: text for name, text in contents.metadata.items() if name != VERSIONS}
    return Contents(entries, aliases, metadata, extras, contents.config, contents.sources, disputed=contents.disputed)


def _prefix(subtree: str, contents: Contents) -> str:
    """The subtree with the separator that its keys have."""
    slashed = any(key.startswith(f"{subtree}/") for key in contents.entries)
    dotted = slashed and any(key.startswith(f"{subtree}.") for key in contents.entries)
    return f"{subtree}/" if slashed and not dotted else f"{subtree}."
