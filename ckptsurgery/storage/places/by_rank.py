"""Folders in which each rank of tensor or pipeline parallelism has a file of its own, as mounts.

A rank is one more index of a key: `rank0/…`, `rank1/…`, and with pipeline stages `stage0/rank0/…`. A rule names the
axis that the ranks were cut along: `rank{r}/wq.weight [o d] -> wq.weight [(r o) d]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ...errors import CheckpointError, Diagnostic

__all__ = ["mounts_by_rank"]

_CONSOLIDATED = re.compile(r"consolidated\.(\d+)\.pth")
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?")


def mounts_by_rank(names: Iterable[str], below: Callable[[], Sequence[str]], place: str) -> dict[str, str]:
    """Prefix -> file; empty where a folder is of no such kind.

    >>> mounts_by_rank(["consolidated.00.pth", "consolidated.01.pth", "params.json"], list, "a folder")
    {'rank0/': 'consolidated.00.pth', 'rank1/': 'consolidated.01.pth'}
    >>> mounts_by_rank(["mp_rank_00_001", "mp_rank_00_000"], lambda: ["mp_rank_00_000/m.pt", "mp_rank_00_001/m.pt"], "")
    {'stage0/rank0/': 'mp_rank_00_000/m.pt', 'stage1/rank0/': 'mp_rank_00_001/m.pt'}

    Raises:
        CheckpointError: a rank has no file, or the files are parted along more than tensors and layers.
    """
    found = sorted(names)
    files = {(0, int(match[1])): match[0] for match in map(_CONSOLIDATED.fullmatch, found) if match}
    if len(files) < 2:
        files = _folders(found, below, place)
    if not files:
        return {}
    stages, ranks = (sorted({index[n] for index in files}) for n in (0, 1))
    missing = [(s, r) for s in range(stages[-1] + 1) for r in range(ranks[-1] + 1) if (s, r) not in files]
    if missing:
        where = f"rank {missing[0][1]}" + (f" of stage {missing[0][0]}" if len(stages) > 1 else "")
        text = f"{place!r} holds no file of {where}"
        raise CheckpointError(Diagnostic("missing-shard", text, place, help="copy the missing file too"))
    several = len(stages) > 1
    return {(f"stage{s}/" if several else "") + f"rank{r}/": files[s, r] for s, r in sorted(files)}


def _folders(names: Sequence[str], below: Callable[[], Sequence[str]], place: str) -> dict[tuple[int, int], str]:
    """(stage, rank) -> the file with weights in the folder of a rank."""
    matches = {name: match for name in names if (match := _FOLDER.fullmatch(name))}
    if not matches:
        return {}
    deeper = [name for name, match in matches.items() if match[3]]
    if deeper:
        text = f"{place!r} has a folder for each rank of expert parallelism ({deeper[0]}), which is not covered"
        help = "save it in the format torch_dist, or open the files under prefixes of their own"
        raise CheckpointError(Diagnostic("sharded-otherwise", text, place, help=help))
    files: dict[tuple[int, int], str] = {}
    for name in below():
        folder, _, file = name.partition("/")
        if folder in matches and file.endswith(".pt") and "optim.pt" not in file:
            match = matches[folder]
            index = int(match[2] or 0), int(match[1])
            if index in files:
                return {}  # which of two files is the model's is for the caller to say
            files[index] = name
    return files
