"""One question, whatever it is asked of: what is tied, and what is in there, of a model or of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..specs import Tie
from ..storage.memory import is_module
from ..storage.places.opening import open as open_checkpoint
from ..tables.totals import Summary
from .inspecting import inspection

__all__ = ["summary", "ties"]


def ties(source: Any) -> tuple[Tie, ...]:
    """Return groups of names that are one tensor, each with `.names` and `.kind`.

    >>> import torch
    >>> w = torch.ones(2)
    >>> [group.names for group in ties({"embed.weight": w, "head.weight": w, "other": w.clone()})]
    [('embed.weight', 'head.weight')]

    Args:
        source: a model, or whatever `open` takes. Kinds are `"object"`, `"storage"` and `"declared"` in a model,
            `"storage"` and `"alias"` in a checkpoint.
    """
    if is_module(source):
        from ..modeling.ties import find_ties

        return find_ties(source)
    return open_checkpoint(source).ties


def summary(
    source: Any,
    input_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    depth: int | None = None,
    col_names: Sequence[str] | None = None,
) -> Summary:
    """Return a model's modules or a checkpoint's tensors at a glance.

    Both have `params`, `nbytes` and `to_json()`, and `str` of them is a table.

    >>> import torch
    >>> summary(torch.nn.Linear(3, 2), (1, 3)).params
    8
    >>> print(summary({"w": torch.ones(2, 3)}))
    state_dict
    <BLANKLINE>
    w  F32 [2, 3]  24 B
    <BLANKLINE>
    tensors   1 tensor, 6 numbers, 24 B
    dtypes    F32: 1 tensor, 6 numbers, 24 B

    Args:
        source: a model, or whatever `open` takes.
        input_size: for a model: the shape of an input, batch included, or a list of shapes; it is run once on zeros,
            and the shapes that its modules return are shown.
        depth: how many levels of modules are shown; each at the last level counts everything below it.
        col_names: for a model: the columns, by torchinfo's names: "input_size", "output_size", "num_params",
            "params_percent", "kernel_size", "mult_adds", "trainable".

    Raises:
        CheckpointError: an input size or columns for a checkpoint, which cannot be run.
        LoadError: the model cannot run on such inputs, or no column has this name.
    """
    if is_module(source):
        from .model_summary import summarise

        return summarise(source, input_size, depth=depth, col_names=col_names or ("output_size", "num_params"))
    if input_size is not None or col_names is not None:
        raise CheckpointError(
            Diagnostic("not-runnable", "a checkpoint cannot be run on an input", help="summary(model, input_size)")
        )
    found = inspection(open_checkpoint(source))
    return found if depth is None else replace(found, depth=depth)
