"""Zip files: which of the formats that are zip files one is, by the names in it."""

from __future__ import annotations

from ..contents import Contents
from ..sources.system_errors import os_error
from ..subtree import enter
from .npz import is_npz, read_npz
from .recognising import zip_problem
from .torch_export import is_export, read_torch_export
from .torch_zip import holds_pickle, read_torch_zip
from .zip_archive import ZipArchive

__all__ = ["read_zip"]


def read_zip(path: str, subtree: str | None = None) -> Contents:
    """The tensors of a zip file: of `torch.save`, TorchScript, `torch.export.save` or `numpy.savez`.

    Args:
        path: the file.
        subtree: dotted path of the mapping to take.

    Raises:
        CheckpointError: it is damaged, compressed, or of another program.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path is kept as the caller spells it
            archive = ZipArchive(file, path)
            names = list(archive.records)
            if is_export(names):
                contents = read_torch_export(archive)
            elif holds_pickle(names):
                return read_torch_zip(path, subtree, archive)
            elif is_npz(names):
                contents = read_npz(archive)
            else:
                raise zip_problem(names, path)
    except OSError as error:
        raise os_error(error, path) from error
    return enter(contents, subtree, path) if subtree else contents
