"""Extracting a low-rank adapter from the difference of two models, as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic, Remedy
from ..language.folding import fold
from ..running.progress import ByteBar
from ..running.runner import save
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..wording import counted
from .adapter_config import CONFIG_FILE, peft_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Extraction", "extract"]

_EMBEDDING = re.compile(r"emb|^wte$|^wpe$|^shared$", re.IGNORECASE)


@dataclass(frozen=True)
class Extraction:
    """An adapter that was extracted.

    Args:
        path: its folder.
        ranks: module -> rank of its update.
        errors: module -> ‖difference - B·A‖ / ‖difference‖, in the Frobenius norm.
        embeddings: those of the modules whose updates are written as PEFT writes them for embeddings.
    """

    path: str
    ranks: dict[str, int]
    errors: dict[str, float]
    embeddings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The extraction as plain data."""
        return dict(vars(self))

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda module: self.errors[module], default=None)
        ranks = f"ranks {min(self.ranks.values())} to {max(self.ranks.values())}" if self.ranks else "no rank"
        error = f", at most {self.errors[worst]:.2e} of a difference left out ({worst})" if worst else ""
        tables = f"; as embeddings: {', '.join(self.embeddings)}" if self.embeddings else ""
        return f"{self.path}: updates of {counted(len(self.ranks), 'module')}, {ranks}{error}{tables}"


def extract(
    base: Any,
    tuned: Any,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    others: str = "error",
    embeddings: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Extraction:
    """Write the difference of two models as a LoRA adapter: a new folder in PEFT's form.

    >>> import tempfile, torch, ckptsurgery as cs
    >>> base = {"q.weight": torch.zeros(4, 3)}
    >>> tuned = {"q.weight": torch.ones(4, 3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = cs.adapters.extract(base, tuned, folder + "/lora", rank=1)
    ...     merged = cs.adapters.merge(base, folder + "/lora").state_dict()
    >>> made.ranks, torch.allclose(merged["q.weight"], tuned["q.weight"], atol=1e-6)
    ({'q': 1}, True)

    Each difference of matrices is cut to its largest singular values (Eckart and Young, 1936), and both factors get the
    square root of these. Matrices that are equal get no update.

    Args:
        base, tuned: whatever `open` takes, with the same keys and shapes.
        path: the folder to come.
        rank: of every update, or less where the difference has less.
        energy: between 0 and 1: the least share of the sum of squared singular values that an update keeps.
        others: tensors that differ and are not matrices, as biases and norms: "error", "whole" to store them whole,
            or "drop".
        embeddings: paths of the modules that are embeddings, or their last parts; PEFT has names and an orientation of
            its own for these. By default those that are called so, such as `embed_tokens`, `wte` and `shared`. Where a
            head is tied to one, PEFT updates the embedding without the head until it merges.
        progress: show a bar, or do not; None shows it on a terminal for large models.

    Raises:
        CheckpointError: keys or shapes differ, neither or both of `rank` and `energy`, others that differ, a NaN or an
            infinity in a matrix that differs, tensors that PEFT cannot store whole, or a folder that exists.
    """
    _check_arguments(rank, energy, others)
    first, second, folder = open_checkpoint(base), open_checkpoint(tuned), Path(path)
    if folder.exists():
        raise CheckpointError(Diagnostic("output-exists", f"{str(folder)!r} exists already", help="name a new folder"))
    _check_alike(first, second)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    whole: list[str] = []
    tables: list[str] = []
    for key, old, new in _differing(first, second, progress):
        if old.dim() != 2 or not key.endswith(".weight"):
            whole.append(key)
            if others == "whole":
                tensors[f"base_model.model.{key}"] = new
            continue
        module = key.removesuffix(".weight")
        _check_finite(key, old, new, (first.source, second.source))
        down, up, left = _factors(old, new, rank, energy)
        if _is_embedding(module, embeddings):  # the weight is [rows, width], and (B·A)ᵀ is added to it
            tables.append(module)
            tensors[f"base_model.model.{module}.lora_embedding_A"] = up.T.contiguous()
            tensors[f"base_model.model.{module}.lora_embedding_B"] = down.T.contiguous()
        else:
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
        ranks[module], errors[module] = down.shape[0], left
    unsayable = _unsayable(whole, ranks)
    if unsayable and others == "whole":
        raise CheckpointError(unsayable)
    if whole and others == "error":
        text = f"the models differ in {counted(len(whole), 'tensor')} that a low-rank update has no place for"
        stored = () if unsayable else (Remedy("others", "whole", "stores them whole"),)
        remedies = (*stored, Remedy("others", "drop", "leaves them out"))
        notes = tuple(shown for shown, _ in fold(whole)[:8])
        raise CheckpointError(Diagnostic("extract-others", text, notes=notes, remedies=remedies))
    folder.mkdir(parents=True)
    save(tensors, folder / "adapter_model.safetensors")
    config = peft_config(ranks, ranks, whole if others == "whole" else [])  # alpha is the rank: B·A as it is
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Extraction(str(path), ranks, errors, tuple(tables))


def _is_embedding(module: str, named: Sequence[str] | None) -> bool:
    name = module.rpartition(".")[2]
    return bool(_EMBEDDING.search(name)) if named is None else module in named or name in named


def _check_arguments(rank: int | None, energy: float | None, others: str) -> None:
    wrong = rank < 1 if rank is not None else energy is None or not 0 < energy <= 1
    if wrong or (rank is not None and energy is not None):
        text = f"rank={rank} and energy={energy}: one of them is given, a rank of 1 or more, or a share of at most 1"
        raise CheckpointError(Diagnostic("bad-argument", text, help="rank=16, or energy=0.95"))
    if others not in ("error", "whole", "drop"):
        text = f"others={others!r} is not one of error, whole, drop"
        raise CheckpointError(Diagnostic("bad-argument", text, help='others="whole"'))


def _unsayable(whole: list[str], ranks: Mapping[str, int]) -> Diagnostic | None:
    """The problem with tensors that PEFT cannot store whole: it stores modules, each either whole or as an update."""
    updated = {".".join(parts[:n]) for parts in (m.split(".") for m in ranks) for n in range(len(parts) + 1)}
    wrong = [key for key in whole if "." not in key or key.rpartition(".")[0] in updated]
    if not wrong:
        return None
    text = f"PEFT stores whole modules: {counted(len(wrong), 'tensor')} of the root, or of one with an update in it"
    remedies = (Remedy("others", "drop", "leaves all of them out"),)
    notes = tuple(shown for shown, _ in fold(wrong)[:8])
    return Diagnostic("extract-whole", text, notes=notes, remedies=remedies)


def _check_finite(key: str, old: Tensor, new: Tensor, sources: tuple[str, str]) -> None:
    """Refuse a difference that is not finite, which has no singular values."""
    for tensor, source in zip((old, new), sources):
        odd = int((~tensor.isfinite()).sum())
        if odd:
            text = f"{key!r} has {counted(odd, 'value')} of NaN or infinity: the difference has no singular values"
            help = "extract from a checkpoint without them: nan_to_num replaces them"
            raise CheckpointError(Diagnostic("extract-not-finite", text, source, help=help))


def _check_alike(first: Checkpoint, second: Checkpoint) -> None:
    odd = [key for key in {**first.specs, **second.specs} if _shape(first, key) != _shape(second, key)]
    if odd:
        text = f"the two models differ in name or shape of {counted(len(odd), 'tensor')}"
        notes = tuple(shown for shown, _ in fold(odd)[:8])
        raise CheckpointError(Diagnostic("models-differ", text, notes=notes, help="convert one to the other's layout"))


def _shape(checkpoint: Checkpoint, key: str) -> tuple[int, ...] | None:
    return checkpoint.specs[key].shape if key in checkpoint.specs else None


def _differing(first: Checkpoint, second: Checkpoint, progress: bool | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each tensor that differs, of both models, one at a time."""
    import torch

    with ByteBar(sum(spec.nbytes for spec in first.specs.values()), "extracting", progress) as bar:
        for key, spec in first.specs.items():
            old, new = first.load(key), second.load(key)
            if not torch.equal(old, new) if old.dtype == new.dtype else not torch.equal(old.double(), new.double()):
                yield key, old, new
            bar(spec.nbytes)


def _factors(old: Tensor, new: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """A, B, and the share of the difference that they leave out."""
    import torch

    delta = new.double() - old.double()
    # The stored weights were rounded: singular values below that noise are not part of the update.
    noise = torch.finfo(new.dtype).eps * float(new.abs().max()) * max(delta.shape)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    squares = values.square()
    total = squares.sum()
    full = int((values > noise).sum())
    if energy is not None:
        rank = int((squares.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
    kept = max(1, min(rank or 1, full))
    root = values[:kept].sqrt()
    down = (root[:, None] * right[:kept]).float().contiguous()
    up = (left[:, :kept] * root).float().contiguous()
    return down, up, float((squares[kept:].sum() / total).sqrt())
