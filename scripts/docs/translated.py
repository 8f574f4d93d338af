"""Copy the code of the parameter guide into its translations, block by block.

    python scripts/docs/translated.py          # tell which translations differ in code
    python scripts/docs/translated.py --fill   # copy the code into them

The code has one source, `recipes/GUIDE.md`, whose blocks a test runs. A translation has as many blocks, in that order.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "recipes" / "GUIDE.md"
BLOCK = re.compile(r"^```\w+\n.*?^```$", re.MULTILINE | re.DOTALL)


def translations() -> list[Path]:
    """Return the guides in other languages."""
    return sorted(GUIDE.parent.glob("GUIDE.*.md"))


def with_code(text: str, source: str) -> str:
    """Return a translation with the blocks of the source in place of its own.

    >>> with_code("一\\n```python\\nold\\n```\\n", "one\\n```python\\nnew\\n```\\n")
    '一\\n```python\\nnew\\n```\\n'

    Raises:
        ValueError: it has another number of blocks.
    """
    blocks = BLOCK.findall(source)
    if len(BLOCK.findall(text)) != len(blocks):
        raise ValueError(f"{len(BLOCK.findall(text))} blocks of code; the guide has {len(blocks)}")
    left = iter(blocks)
    return BLOCK.sub(lambda _: next(left), text)


def main() -> int:
    """Compare, or fill."""
    source = GUIDE.read_text(encoding="utf-8")
    differing = 0
    for path in translations():
        text = path.read_text(encoding="utf-8")
        filled = with_code(text, source)
        if filled == text:
            continue
        if "--fill" in sys.argv[1:]:
            path.write_text(filled, encoding="utf-8")
            print(f"filled {path.name}")
        else:
            differing += 1
            print(f"{path.name} differs from {GUIDE.name} in code: run with --fill")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())
