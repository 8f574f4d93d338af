"""Keras' `.keras` files: a zip file with the weights in HDF5 and the configuration in JSON."""

from __future__ import annotations

from collections.abc import Sequence

from ..contents import Contents
from ..json_text import parse_json
from .format import Format, OpenedSource
from .hdf5 import Hdf5Format
from .inner import open_record, record_bytes

__all__ = ["KerasFormat"]

_WEIGHTS = "model.weights.h5"


class KerasFormat(Format):
    """A model that Keras 3 saved whole."""

    name = "keras"
    text = "a Keras model"
    suffixes = (".keras",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether the weights and the metadata of Keras are in it."""
        return {"metadata.json", _WEIGHTS} <= {*names}

    def read(self, opened: OpenedSource) -> Contents:
        """Return the datasets of the weights by path, and the configuration.

        Raises:
            CheckpointError: the archive or the weights in it are damaged.
        """
        contents = open_record(opened, _WEIGHTS, Hdf5Format().read)
        if "config.json" in opened.archive.records:
            try:
                config = parse_json(record_bytes(opened, "config.json", at_most=1 << 26))
            except (ValueError, RecursionError):
                config = None
            contents.config = config if isinstance(config, dict) else None
        return contents
