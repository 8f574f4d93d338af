"""Archives of `torch.export.save` (`.pt2`): a JSON record describes the weights, each of which is a record of bytes."""

from __future__ import annotations

from typing import Any

from ...specs import DTYPES
from ..contents import Contents, Entry
from ..json_text import parse_json
from ..unpickling.inert import Storage, Tensor
from .storages import StorageRun, place_all
from .zip_archive import ZipArchive, refused

__all__ = ["read_torch_export"]

# the schema's numbers of dtypes (torch._export.serde.schema.ScalarType)
_DTYPES = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 10: "C64", 11: "C128", 12: "BOOL",
    13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ",
}  # fmt: skip
_CONFIG, _CONSTANTS = "_weights_config.json", "_constants_config.json"
_STRIDED = 7  # of the schema's layouts
_REMEDY = "import torch; torch.save(torch.export.load({path!r}).state_dict, 'new.pt')"


def read_torch_export(archive: ZipArchive) -> Contents:
    """Return the parameters and persistent buffers of an exported program by name; constants are among the extras.

    Raises:
        CheckpointError: an older version, several programs, or a weight that is not plain bytes.
    """
    source, names = archive.source, list(archive.records)
    configs = [name for name in names if "/data/weights/" in name and name.endswith(_CONFIG)]
    if len(configs) != 1:
        many = f"holds {len(configs)} programs" if configs else "is of an older version, which is not read here"
        raise _refused(source, f"is an archive of torch.export (.pt2) that {many}")
    root = configs[0].rpartition("/")[0].removesuffix("data/weights")
    big = archive.bytes_of(f"{root}byteorder").strip() == b"big" if f"{root}byteorder" in archive.records else False
    contents = Contents(_placed(archive, configs[0], big))
    constants = [name for name in names if name.startswith(f"{root}data/constants/") and name.endswith(_CONSTANTS)]
    if constants:  # tensors of the code, and buffers that no state_dict has
        contents.extras["constants"] = _placed(archive, constants[0], big)
    return contents


def _placed(archive: ZipArchive, config: str, big: bool) -> dict[str, Entry]:
    """The entries of the tensors that a record of JSON describes; their bytes are in records beside it."""
    source, folder = archive.source, config.rpartition("/")[0]
    try:
        listed = parse_json(archive.bytes_of(config, at_most=1 << 28))["config"]
        described = {name: _described(about) for name, about in listed.items() if about.get("tensor_meta")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"is an archive of torch.export (.pt2) whose weights are described in an unknown way: {error!r}"
        raise _refused(source, why[:400]) from None

    def region(storage: Storage) -> StorageRun:
        record = archive.stored(f"{folder}/{storage.key}")
        return StorageRun(source, record.offset, record.nbytes, big)

    storages: dict[str, Storage] = {}
    leaves = {}
    for name, (record, dtype, offset, shape, strides) in described.items():
        found = archive.stored(f"{folder}/{record}")
        numel = found.nbytes // DTYPES[dtype].itemsize
        storage = storages.setdefault(record, Storage(record, dtype, numel))
        leaves[name] = Tensor(storage, offset, shape, strides, dtype)
    return place_all(leaves, region, source)


_Described = tuple[str, str, int, tuple[int, ...], tuple[int, ...]]


def _described(about: Any) -> _Described:
    """A weight's record, dtype, offset, shape and strides.

    Raises:
        ValueError, KeyError, TypeError: it is not plain bytes, or the description makes no sense.
    """
    meta = about["tensor_meta"]
    if about["use_pickle"] or meta["layout"] != _STRIDED:
        raise ValueError("a weight is not plain bytes")
    shape, strides = (tuple(size["as_int"] for size in meta[part]) for part in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a shape makes no sense")
    return str(about["path_name"]), _DTYPES[meta["dtype"]], offset, shape, strides


def _refused(source: str, why: str) -> Exception:
    return refused(source, "unsupported-format", why, _REMEDY.format(path=source))
