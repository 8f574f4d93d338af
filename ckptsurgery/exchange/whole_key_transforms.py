"""Transforms of the transformers library that match whole keys, and that save back only the keys that they made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..language.keys import KeyPattern, is_index

__all__ = ["transform_classes"]


@dataclass
class KeyRecord:
    """The keys that a transform saw while a model was loaded.

    Args:
        made: the names that it gave.
        kept: keys that it left alone although they look like names that it gives.
    """

    made: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class KeyLimit:
    """The keys of a loaded model that a transform turns back: those that it made."""

    made: frozenset[str]
    kept: frozenset[str]
    tails: frozenset[str]

    @classmethod
    def of(cls, record: KeyRecord) -> KeyLimit | None:
        """Return the limit for a load; None where nothing was made, as for a model that was never loaded."""
        if not record.made:
            return None
        return cls(frozenset(record.made), frozenset(record.kept), frozenset(map(_tail, record.made)))

    def allows(self, key: str) -> bool:
        """Whether a key was made.

        The library may put the base model's prefix, which is one segment, before a name, or take it away.
        """
        return key in self.made or (key not in self.kept and (_tail(key) in self.made or key in self.tails))


def _tail(key: str) -> str:
    return key.partition(".")[2]


class WholeKeys:
    """The part of a transform that matches whole keys, and remembers which it made.

    Args:
        lefts, rights: the patterns of both sides. Without any, as in the copies that quantisers make, the texts of the
            patterns match as in the library.
    """

    source_patterns: list[str]
    target_patterns: list[str]
    scope_prefix: str | None
    base_model_prefix: str | None
    _was_used: bool
    lefts: tuple[KeyPattern, ...] = ()
    rights: tuple[KeyPattern, ...] = ()
    record: KeyRecord
    limit: KeyLimit | None = None

    def hold(self, lefts: Sequence[KeyPattern], rights: Sequence[KeyPattern]) -> None:
        """Take the patterns of both sides, and forget every key."""
        self.lefts, self.rights, self.record, self.limit = tuple(lefts), tuple(rights), KeyRecord(), None

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the new name and the pattern of a key that matches as a whole; else the key and None.

        Raises:
            ValueError: the text by which the library names several results occurs twice in the key.
        """
        if not self.lefts:
            return super().rename_source_key(source_key)  # type: ignore[misc, no-any-return]
        scope = self._scope(source_key)
        if scope is None or (self.limit is not None and not self.limit.allows(source_key)):
            return source_key, None
        key = source_key.removeprefix(scope)
        for number, left in enumerate(self.lefts):
            values = _values(left, key, self.rights)
            if values is not None:
                names = [scope + _spelled(right, values) for right in self.rights]
                self._check_place(source_key, names[0])
                self._was_used = True
                self.record.made.update(names)
                return names[0], self.source_patterns[number]
        if any(_values(right, key, self.lefts) is not None for right in self.rights):
            self.record.kept.add(source_key)
        return source_key, None

    def reverse_transform(self) -> Any:
        """Return the inverse, for the keys that were made."""
        turned = super().reverse_transform()  # type: ignore[misc]
        turned.hold(self.rights, self.lefts)
        turned.limit = KeyLimit.of(self.record)
        return turned

    def _scope(self, key: str) -> str | None:
        """The prefix of a part of a model to which the transform belongs; None where the key has another."""
        if self.scope_prefix is None:
            return ""
        scope, base = (f"{text}." if text else "" for text in (self.scope_prefix, self.base_model_prefix))
        return next((prefix for prefix in (base + scope, scope) if key.startswith(prefix)), None)

    def _check_place(self, key: str, name: str) -> None:
        """Refuse a name in which the library would replace another text than the one that was matched."""
        if len(self.rights) > 1 or "*" in name:
            one, text = name.replace("*", "0"), self.target_patterns[0].replace("*", "0")
            if one.find(text) != one.rfind(text):
                raise ValueError(f"{key!r}: {text!r} occurs twice in {one!r}, and the library replaces the first")


@cache
def transform_classes() -> dict[str, Any]:
    """Return the library's two kinds of transforms with whole keys, by name."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    class WholeKeyRenaming(WholeKeys, WeightRenaming):
        """A renaming; its patterns are shown in the notation of rules."""

        __qualname__ = "WholeKeyRenaming"

        def __init__(
            self,
            source_patterns: str | list[str],
            target_patterns: str | list[str],
            lefts: Sequence[KeyPattern] = (),
            rights: Sequence[KeyPattern] = (),
        ) -> None:
            super().__init__(source_patterns, target_patterns)
            self.hold(lefts, rights)

    class WholeKeyConverter(WholeKeys, WeightConverter):
        """A converter; its patterns are the texts between the captures that stay, with a star for stacked tensors."""

        __qualname__ = "WholeKeyConverter"

        def __init__(
            self,
            source_patterns: str | list[str],
            target_patterns: str | list[str],
            operations: list[Any],
            force_cpu: bool = False,
            lefts: Sequence[KeyPattern] = (),
            rights: Sequence[KeyPattern] = (),
        ) -> None:
            super().__init__(source_patterns, target_patterns, operations, force_cpu)
            self.hold(lefts, rights)

    return {"WholeKeyRenaming": WholeKeyRenaming, "WholeKeyConverter": WholeKeyConverter}


def __getattr__(name: str) -> Any:
    """Return a class by its name: a pickle of a loaded model has it."""
    if name not in ("WholeKeyRenaming", "WholeKeyConverter"):
        raise AttributeError(name)
    return transform_classes()[name]


def _values(pattern: KeyPattern, key: str, others: Sequence[KeyPattern]) -> dict[str, str] | None:
    """The captures of a key; None where it does not match, or has a text where tensors are stacked by number."""
    found = next(iter(pattern.readings(key)), None)
    if found is None:
        return None
    stacked = {name for name in found if name not in others[0].names}
    return None if any(not is_index(found[name]) for name in stacked) else found


def _spelled(pattern: KeyPattern, values: dict[str, str]) -> str:
    """The key for some captures; the library's star where one is stacked."""
    return pattern.spell({**dict.fromkeys(pattern.names, "*"), **values})
