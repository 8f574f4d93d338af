"""Pickles that hold no whole model, though they look like one: the metadata or one rank's part of a sharded one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, Diagnostic
from .inert import Opaque, Tensor

__all__ = ["refuse_part"]

_DCP = "torch.distributed.checkpoint.metadata.Metadata"
_ZERO_REMEDY = (
    "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
    "import pathlib; p = pathlib.Path({path}).parent; convert(str(p.parent), 'new_folder', tag=p.name)"
)


def refuse_part(tree: Any, source: str) -> None:
    """Raise for a tree that is only a part of a checkpoint, and would open as something else.

    Raises:
        CheckpointError: it is the metadata of a distributed checkpoint, or the state of a rank of ZeRO stage 3, whose
            parameters have no elements there.
    """
    if type(tree) is Opaque and tree.path == _DCP:
        text = f"{source!r} is the metadata of a checkpoint of torch.distributed.checkpoint; the tensors are beside it"
        raise CheckpointError(Diagnostic("part-of-a-folder", text, source, help=f"open({str(Path(source).parent)!r})"))
    if not isinstance(tree, dict):
        return
    module, shapes = tree.get("module"), tree.get("param_shapes")
    if not isinstance(module, dict) or not isinstance(shapes, (list, tuple)):
        return
    whole = {key: shape for group in shapes if isinstance(group, Mapping) for key, shape in group.items()}
    cut = [
        key for key, leaf in module.items() if type(leaf) is Tensor and tuple(whole.get(key, leaf.shape)) != leaf.shape
    ]
    if cut:
        text = f"{source!r} is one rank's state of DeepSpeed, ZeRO stage 3: {cut[0]!r} and {len(cut) - 1} more "
        text += "parameters are cut up among the ranks"
        raise _error("partitioned-model", text, source, _ZERO_REMEDY)


def _error(code: str, text: str, source: str, remedy: str) -> CheckpointError:
    return CheckpointError(Diagnostic(code, text, source, help=remedy.replace("{path}", repr(source))))
