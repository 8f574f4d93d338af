"""`NpzWriter`: the stored `.npz` file that `numpy.savez` would write, laid out beforehand and filled in any order.

Source of an array's header: numpy's format version 1.0 (`numpy.lib.format`). It is padded so that data begin at
multiples of 64 bytes of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path

from ...errors import CheckpointError, Diagnostic, Remedy
from ...specs import TensorSpec
from ...wording import shown_keys
from ..contents import Extent
from ..formats.zip_records import ALIGNMENT, Records, stays_inside
from .durability import SYNCED, Durability
from .staging import Output, beside
from .zip_writer import ZipWriter

__all__ = ["NpzWriter", "refuse_unheld"]

_CODES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "C128": "<c16",
}  # fmt: skip


class NpzWriter(ZipWriter):
    """Writes a zip file of numpy arrays.

    Args:
        path: the file to come.
        specs: key -> spec, in the order that a reader should see.
        aliases: other name -> key, for tied tensors: numpy has no such thing, so they are refused.
        durability: whether to wait until all of it is on the disk.

    Raises:
        CheckpointError: a dtype that numpy has not, an alias; and what `Writer` raises.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str] = {},
        durability: Durability = SYNCED,
    ) -> None:
        odd = [key for key, spec in specs.items() if spec.dtype not in _CODES]
        refuse_unheld(path, "numpy", {key: specs[key] for key in odd}, _CODES, aliases)
        refuse_names(path, "numpy", [key for key in specs if not stays_inside(f"{key}.npy")])
        heads = [_header(spec) for spec in specs.values()]
        sizes = [spec.nbytes for spec in specs.values()]
        records = Records()
        records.add([f"{key}.npy" for key in specs], [len(head) + size for head, size in zip(heads, sizes)])
        temporary = beside(path)
        starts = [start + len(head) for start, head in zip(records.starts, heads)]
        places = dict(zip(specs, map(Extent, repeat(str(temporary)), starts, sizes)))
        output = Output(path, temporary, records.end + records.directory_size)
        super().__init__(output, places, records, 0, sizes, heads, durability)

    def _complete(self) -> None:
        """Write the bytes between the arrays, and the directory."""
        self._settle()
        records = self._records
        end = records.descriptor(len(records.names) - 1) + records.directory()
        size = records.end + records.directory_size
        self._pwrite(self._temporary, size - len(end), memoryview(end))


def _header(spec: TensorSpec) -> bytes:
    """The header of one array."""
    text = f"{{'descr': '{_CODES[spec.dtype]}', 'fortran_order': False, 'shape': {spec.shape!r}, }}"
    padding = -(10 + len(text) + 1) % ALIGNMENT
    line = (text + " " * padding + "\n").encode()
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


def refuse_names(path: Path, program: str, keys: Sequence[str]) -> None:
    """Check that a format has a place for all names.

    Args:
        path: the output.
        program: whose format it is.
        keys: the names that it has no place for.

    Raises:
        CheckpointError: there are such names.
    """
    if keys:
        text = f"{program} has no place for the name {keys[0]!r}"
        help = "rename it, or write another format"
        raise CheckpointError(Diagnostic("reserved-name", text, str(path), shown_keys(keys[1:]), help=help))


def refuse_unheld(
    path: Path, program: str, odd: Mapping[str, TensorSpec], dtypes: Mapping[str, object], aliases: Mapping[str, str]
) -> None:
    """Check that a format can hold all tensors.

    Args:
        path: the output.
        program: whose format it is.
        odd: the tensors that it cannot hold.
        dtypes: the dtypes that it has.
        aliases: the tied names, of which it can hold none.

    Raises:
        CheckpointError: there are tensors or names that it cannot hold.
    """
    if odd:
        key, spec = next(iter(odd.items()))
        more = f" and {len(odd) - 1:,} more tensors" if len(odd) > 1 else ""
        text = f"{program} has no type for {key} {spec}{more}"
        meant = Remedy("path", str(path.with_suffix(".safetensors")), "can hold them")
        advice = f"or cast to one of {', '.join(dtypes)}"
        raise CheckpointError(
            Diagnostic("dtype-not-in-format", text, str(path), shown_keys(odd), remedies=(meant,), advice=advice)
        )
    if aliases:
        first = next(iter(aliases))
        text = f"{program} stores each tensor once, and has no place for {first!r}, a tied name"
        help = f'drop the tied names: drop = ["{first}"]'
        raise CheckpointError(Diagnostic("tie-not-in-format", text, str(path), shown_keys(aliases), help=help))
