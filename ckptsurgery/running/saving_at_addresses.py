"""`save` at an address: a local save, then an upload that appears whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import Diagnostic, PlanError
from ..planning.options import SaveOptions
from ..planning.report import Report
from ..storage.output.uploading import RemoteOutput
from ..storage.output.writing import names_folder

__all__ = ["save_at"]

_LOCAL = ("in_place", "resume", "together")


def save_at(address: str, options: SaveOptions, save: Callable[[str, SaveOptions], Report]) -> Report:
    """Save into a local folder, and upload what is there.

    Args:
        save: saves at a local path.

    Raises:
        PlanError: an option that needs files of this machine.
        CheckpointError: as `save` does; the store has no such place, or holds something there.
    """
    for name in _LOCAL:
        if getattr(options, name):
            text = f"{name} works on files of this machine, and {address!r} is an address"
            raise PlanError(Diagnostic("bad-argument", text, help=f"without {name}, or into a local folder"))
    output = RemoteOutput.at(address)
    with tempfile.TemporaryDirectory(prefix="ckptsurgery-upload-") as folder:
        path = f"{Path(folder, output.name)}{'/' if address.endswith('/') else ''}"
        output.refuse_existing(options.format is not None or names_folder(path, Path(path)), options.overwrite)
        report = save(path, replace(options, overwrite=False, sync=False))
        if options.dry_run:
            files = tuple(file.replace(path.rstrip("/"), address.rstrip("/"), 1) for file in report.files)
        else:
            files = output.upload(Path(path))
    return replace(report, target=address, files=files)
