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
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

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

Numbers = dict[str, Tensor]
_ABSENT = -1.0
_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators with it


@dataclass(frozen=True)
class Network:
    """One network in two codebases.

    Args:
        source: the shape of each source tensor.
        convert: the library's own converter.
    """

    source: Mapping[str, tuple[int, ...]]
    convert: Callable[[Numbers], Numbers]


@dataclass(frozen=True)
class Pair:
    """What inference is given, and the truth."""

    name: str
    family: str
    kind: str
    source: Mapping[str, tuple[int, ...]]
    made: Numbers = field(repr=False)

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "source": [[k, list(s)] for k, s in self.source.items()],
            "target": [[k, list(t.shape)] for k, t in self.made.items()],
            "expected": {k: digest(t) for k, t in self.made.items() if present(t)},
        }


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's numbers, in C order."""
    numbers = tensor.detach().to(torch.float64).contiguous().numpy().astype("<i8")
    return hashlib.blake2b(numbers.tobytes(), digest_size=6).hexdigest()


def present(tensor: Tensor) -> bool:
    """Whether a target tensor consists of source elements only, each once."""
    flat = tensor.detach().reshape(-1).to(torch.float64)
    return bool((flat >= 0).all() and (flat == flat.round()).all()) and len(flat.unique()) == len(flat)


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Numbers:
    """Tensors whose elements are numbered through."""
    found, at = {}, 0
    for key, shape in shapes.items():
        found[key] = torch.arange(at, at + prod(shape), dtype=torch.float64).reshape(shape)
        at += prod(shape)
    return found


def _converted(network: Network, given: Numbers) -> Numbers:
    """What a converter makes; source tensors that are not given are filled with a number that no element has."""
    filled = {
        k: given[k] if k in given and tuple(given[k].shape) == tuple(s) else torch.full(tuple(s), _ABSENT).double()
        for k, s in network.source.items()
    }
    return {k: t.detach() for k, t in network.convert(filled).items()}


def plain(name: str, family: str, network: Network) -> Pair:
    """A whole network and its counterpart."""
    return Pair(name, family, "plain", network.source, _converted(network, numbered(network.source)))


def deeper(name: str, family: str, one: Network, other: Network) -> Pair:
    """A network and the counterpart of one with another number of layers: layers with the same index correspond."""
    return Pair(name, family, "depth", one.source, _converted(other, numbered(one.source)))


def partial(
    name: str,
    family: str,
    network: Network,
    keep: Callable[[str], bool],
    more: Mapping[str, tuple[int, ...]] = {},
    wanted: Callable[[str], bool] = lambda key: True,
) -> Pair:
    """A network with only some of its tensors, with others that have no counterpart; the whole counterpart, or some."""
    source = {k: s for k, s in network.source.items() if keep(k)} | dict(more)
    made = _converted(network, numbered(source))
    return Pair(name, family, "partial", source, {k: t for k, t in made.items() if wanted(k)})


def negative(name: str, family: str, one: Network, other: Network) -> Pair:
    """Two networks that have nothing to do with each other."""
    made = _converted(other, {})
    return Pair(name, family, "negative", one.source, made)


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
    sys.modules["build"] = sys.modules[__name__]
    sys.exit(main())
