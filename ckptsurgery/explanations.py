"""The texts behind the diagnostic codes: the meaning, an example, the remedy.

`ckptsurgery explain CODE` prints them. They are the pages `docs/errors/*.md`, one section a
code; the wheel contains a copy.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path

from .errors import CkptSurgeryError, Diagnostic, Remedy

__all__ = ["error_codes", "explanation"]

_SECTION = re.compile(r"^## (?P<code>[a-z0-9-]+)\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def error_codes() -> list[str]:
    """Return all codes that have an explanation, sorted.

    >>> "missing-keys" in error_codes()
    True
    """
    return sorted(_sections())


def explanation(code: str) -> str:
    """Return the explanation of a code, as Markdown.

    >>> print(explanation("unused-dim").splitlines()[0])
    A size was passed, and nothing in the recipe asks for it. It is probably misspelled.

    Args:
        code: as an error prints it, `missing-keys` or `error[missing-keys]`.

    Raises:
        CkptSurgeryError: no diagnostic has this code.
    """
    bare = code.strip().removesuffix(":").rpartition("[")[2].removesuffix("]").strip()
    known = _sections()
    if bare in known:
        return known[bare]
    near = difflib.get_close_matches(bare, known, 3, 0.5) or [c for c in sorted(known) if bare and bare in c][:3]
    meant = (Remedy("code", {bare: near}, kind="instead"),) if near else ()
    advice = None if near else "an error prints its code in brackets: error[missing-keys]"
    raise CkptSurgeryError(Diagnostic("unknown-code", f"no error has the code {bare!r}", remedies=meant, advice=advice))


@functools.cache  # files of the package, which do not change
def _sections() -> dict[str, str]:
    here = Path(__file__).parent
    folder = here / "_errors" if (here / "_errors").is_dir() else here.parent / "docs" / "errors"
    pages = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")))
    return {found["code"]: found["text"].strip() for page in pages for found in _SECTION.finditer(page)}
