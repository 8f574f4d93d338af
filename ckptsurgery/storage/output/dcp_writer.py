"""Writing the format of `torch.distributed.checkpoint` from one process, as several ranks would have written it.

Each tensor is cut along its first dimension, as `Shard(0)` cuts it, and each part is an archive of `torch.save` in the
file of its rank. The files are written into a hidden folder; `.metadata`, which makes it a checkpoint, is written last,
and then the folder gets its name.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import CheckpointError, Diagnostic, Remedy
from ..sources.system_errors import os_error
from .durability import SYNCED, Durability
from .staging import beside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DcpWriter", "refuse_existing"]


def refuse_existing(path: Path) -> None:
    """Refuse an output that exists: a folder cannot be replaced in one step.

    Raises:
        CheckpointError: there is something under this name.
    """
    if path.exists():
        text = f"{str(path)!r} exists already, and a distributed checkpoint is a new folder"
        meant = Remedy("path", f"{path}-new", "is another name")
        raise CheckpointError(Diagnostic("output-exists", text, str(path), remedies=(meant,)))


def _system_error(error: BaseException) -> OSError:
    """The error of the system behind one of torch's writer of archives, which raises another one over it."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind or OSError(errno.EIO, str(error).partition("\n")[0])


class DcpWriter:
    """Takes whole tensors one by one; leaving its context commits or removes everything.

    Args:
        path: the folder to come.
        ranks: how many files there are, one for each rank that might have written.
        durability: whether to wait until all of it is on the disk.

    Raises:
        CheckpointError: the output exists, or the system refuses.
    """

    def __init__(self, path: Path, ranks: int, durability: Durability = SYNCED) -> None:
        refuse_existing(path)
        self.path, self.ranks, self.nbytes = path, ranks, 0
        self._durability = durability
        self._folder = beside(path)
        self._tensors: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}
        self._files: list[BinaryIO] = []
        self._open = ExitStack()

    def __enter__(self) -> DcpWriter:
        try:
            self._folder.mkdir(parents=True)
            names = [self._folder / self._name(rank) for rank in range(self.ranks)]
            self._files = [self._open.enter_context(name.open("xb")) for name in names]
        except OSError as error:
            self._remove()
            raise os_error(error, str(self.path), "write") from error
        return self

    @staticmethod
    def _name(rank: int) -> str:
        return f"__{rank}_0.distcp"

    @property
    def files(self) -> tuple[str, ...]:
        """The names that the files will have."""
        names = [*(self._name(rank) for rank in range(self.ranks)), ".metadata"]
        return tuple(str(self.path / name) for name in names)

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a tensor."""
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        tensor = tensor.detach().contiguous()
        parts = tensor.chunk(self.ranks) if tensor.dim() and tensor.numel() else (tensor,)
        chunks, row = [], 0
        for number, part in enumerate(parts):
            low = torch.Size((row, *(0 for _ in part.shape[1:])) if part.dim() else ())
            file = self._files[number]
            start = file.tell()
            try:
                torch.save(part.clone(), file)  # a view would bring its whole storage along
            except (OSError, RuntimeError) as error:
                raise os_error(_system_error(error), str(self.path), "write") from error
            chunks.append(ChunkStorageMetadata(low, part.shape))
            place = _StorageInfo(self._name(number), start, file.tell() - start)
            self._places[MetadataIndex(key, low, number)] = place
            row += len(part) if part.dim() else 0
        properties = TensorProperties(dtype=tensor.dtype)
        self._tensors[key] = TensorStorageMetadata(properties, tensor.shape, chunks)
        self.nbytes += tensor.numel() * tensor.element_size()

    def _commit(self) -> None:
        from torch.distributed.checkpoint.metadata import Metadata

        for file in self._files:
            file.flush()
            self._durability.keep(file.fileno())
        self._open.close()
        about = Metadata(self._tensors, {key: (key,) for key in self._tensors}, self._places)
        with (self._folder / ".metadata").open("xb") as file:
            pickle.dump(about, file)
            file.flush()
            self._durability.keep(file.fileno())
        refuse_existing(self.path)
        self._durability.keep_names(self._folder)
        self._folder.rename(self.path)
        self._durability.keep_names(self.path.parent)

    def _remove(self) -> None:
        with suppress(OSError):
            self._open.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as refused:
            raise os_error(refused, str(self.path), "write") from refused
        finally:
            if os.path.lexists(self._folder):
                self._remove()
