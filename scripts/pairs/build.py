"""Builds the pairs on which inference is measured, by running the converters of published libraries.

    python scripts/pairs/build.py PACKAGES OUT [SET ...]

PACKAGES is a folder with one `pip install --no-deps --target PACKAGES/NAME NAME` for each NAME of `LIBRARIES`; OUT gets
`tuning.json.gz`, `held.json.gz` and `fresh.json.gz`, or those of them that are named. Networks are tiny; every element
of a source tensor carries its own number, the converter runs on these, and what it returns is the truth. A pair is
`{name, family, kind, source, target, expected}`; `source` and `target` list `[key, shape]` in the library's order, and
`expected` maps each target key with a counterpart to a digest of its numbers.
"""

from __future__ import annotations

import gzip
import json
import sys
from itertools import chain
from pathlib import Path

import torch

LIBRARIES = (
    "gguf",
    "ctranslate2",
    "litgpt",
    "torchtune",
    "curated-transformers",
    "timm",
    "open-clip-torch",
    "keras",
    "keras-hub",
    "torchvision",
    "catalogue",
    "absl-py",
    "cuid2",
    "curated-tokenizers",
    "namex",
    "rich",
    "h5py",
    "optree",
    "ml_dtypes",
    "ftfy",
    "wcwidth",
    "requests",
    "urllib3",
    "charset-normalizer",
    "certifi",
    "idna",
    "pillow",
    "diffusers",
    "monai",
    "scipy",
)

_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def _without_kernels() -> None:
    """Declare torchvision's operators: its networks import without kernels for this build of torch."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def main() -> int:
    """Build all pairs and write both halves."""
    packages, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path[:0] = [str(Path(__file__).parent), *(str(p) for p in packages.iterdir() if p.is_dir())]
    _without_kernels()
    import families
    import fresh

    halves: dict[str, list[dict[str, object]]] = {name: [] for name in sys.argv[3:] or ("tuning", "held", "fresh")}
    listed = families.pairs(packages) if {"tuning", "held"} & halves.keys() else ()
    for half, pair in chain(listed, (("fresh", p) for p in fresh.pairs() if "fresh" in halves)):
        if half not in halves:
            continue
        if len(pair.made) == 0:
            raise ValueError(f"{pair.name}: the converter makes nothing")
        halves[half].append(pair.to_json())
        print(f"{half:7}{pair.kind:9}{pair.name:40}{len(pair.source):5} -> {len(pair.made):5}", file=sys.stderr)
    for half, listed in halves.items():
        text = json.dumps(listed, separators=(",", ":"))
        (out / f"{half}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
