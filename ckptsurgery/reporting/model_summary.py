"""A model at a glance: its modules as a tree, with output shapes, parameters and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError
from ..modeling.places import Place, places, require_module, size_of
from ..notebook_view import TextInNotebooks
from ..ops.seeding import seeded_globals
from ..wording import brief, counted, shown_bytes
from .model_table import ModuleRow, Shapes, check_columns, model_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["ModelSummary", "ModuleRow", "summarise"]

Run = tuple[Shapes, Shapes, int]
"""What a module was given at its first call, what it returned, and how many calls there were."""


@dataclass(frozen=True, slots=True, repr=False)
class ModelSummary(TextInNotebooks):
    """Rows and totals; `str` is a table, and shared parameters count once.

    Args:
        rows: the modules, parents before children.
        params, trainable: how many parameters there are, and how many of them take a gradient.
        buffers: how many elements the buffers have.
        nbytes: bytes of parameters and buffers.
        input: the shapes that the model was run on.
        mult_adds: of one run on these, by the rows.
        depth, col_names: what `str` shows: levels of the tree, and columns.
    """

    rows: tuple[ModuleRow, ...]
    params: int
    trainable: int
    buffers: int
    nbytes: int
    input: Shapes = ()
    mult_adds: int = 0
    depth: int | None = None
    col_names: tuple[str, ...] = ("output_size", "num_params")

    def to_json(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        return brief("ModelSummary", counted(len(self.rows), "module"), counted(self.params, "parameter"))

    def __str__(self) -> str:
        table = model_table(self.rows, self.params, self.depth, self.col_names)
        rule = "=" * max(60, *map(len, table))
        totals = [
            f"Total params: {self.params:,}",
            f"Trainable params: {self.trainable:,}",
            f"Non-trainable params: {self.params - self.trainable:,}",
            f"Buffer elements: {self.buffers:,}",
            f"Size: {shown_bytes(self.nbytes)}",
        ]
        if "mult_adds" in self.col_names:
            totals.append(f"Mult-adds of one run: {self.mult_adds:,}")
        return "\n".join([rule, table[0], rule, *table[1:], rule, *totals, rule])


def summarise(
    model: nn.Module,
    input_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
    *,
    depth: int | None = None,
    col_names: Sequence[str] = ("output_size", "num_params"),
) -> ModelSummary:
    """Count what a model holds and, with `input_size`, run it once to see the shapes that its modules return.

    >>> from torch import nn
    >>> print(summarise(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)), (1, 4)))
    ============================================================
    Layer (type:depth-idx)    Output Shape    Param #
    ============================================================
    Sequential                [1, 2]          --
    ├─Linear: 1-1             [1, 5]          25
    ├─Linear: 1-2             [1, 3]          18
    └─Linear: 1-3             [1, 2]          8
    ============================================================
    Total params: 51
    Trainable params: 51
    Non-trainable params: 0
    Buffer elements: 0
    Size: 204 B
    ============================================================

    The run is in eval mode, on zeros, without gradients; hooks, modes, buffers and generators are afterwards as they
    were. A meta model is run on the meta device, at no cost.

    Args:
        input_size: the shape of the input, batch included, or a list of shapes for several inputs.
        dtype: of the inputs; by default int64 where the first module with weights is an embedding, else the dtype of
            the first parameter.
        depth: levels of the tree that are shown; those at the last one count everything below them.
        col_names: columns that are shown, by torchinfo's names: "input_size", "output_size", "num_params",
            "params_percent", "kernel_size", "mult_adds", "trainable".

    Raises:
        LoadError: the model cannot run on such inputs, or no column has this name.
    """
    require_module(model)
    check_columns(col_names)
    sizes = _sizes(input_size)
    calls = _run(model, sizes, dtype) if sizes else {}
    rows = tuple(_rows(model, calls, set()))
    distinct = {id(p.tensor): p for p in reversed(list(places(model)))}.values()
    parameters = [p for p in distinct if not p.is_buffer]
    return ModelSummary(
        rows,
        params=sum(size_of(p)[0] for p in parameters),
        trainable=sum(size_of(p)[0] for p in parameters if p.tensor.requires_grad),
        buffers=sum(size_of(p)[0] for p in distinct if p.is_buffer),
        nbytes=sum(size_of(p)[1] for p in distinct),
        input=sizes,
        mult_adds=sum(row.mult_adds for row in rows),
        depth=depth,
        col_names=tuple(col_names),
    )


def _sizes(input_size: Sequence[int] | Sequence[Sequence[int]] | None) -> Shapes:
    if input_size is None:
        return ()
    given: list[Any] = list(input_size)
    shapes = [given] if all(isinstance(n, int) for n in given) else given
    sound = all(isinstance(shape, list | tuple) for shape in shapes)
    if not given or not sound or not all(isinstance(n, int) and n >= 0 for shape in shapes for n in shape):
        raise LoadError(
            Diagnostic(
                "bad-input-size", f"{input_size!r} is no shape", help="input_size=(1, 3, 224, 224), batch included"
            )
        )
    return tuple(tuple(shape) for shape in shapes)


def _rows(model: nn.Module, calls: dict[int, Run], seen: set[int]) -> Iterator[ModuleRow]:
    modules: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        own = [
            Place(prefix + leaf, module, leaf, is_buffer)
            for is_buffer, held in ((False, module._parameters), (True, module._buffers))
            for leaf, tensor in held.items()
            if tensor is not None and id(tensor) not in seen
        ]
        parameters = [place for place in own if not place.is_buffer]
        given, output, times = calls.get(id(module), ((), (), 0))
        yield ModuleRow(
            path,
            type(module).__name__,
            path.count(".") + 1 if path else 0,
            output,
            params=sum(size_of(p)[0] for p in parameters),
            trainable=sum(size_of(p)[0] for p in parameters if p.tensor.requires_grad),
            nbytes=sum(size_of(p)[1] for p in own),
            repeated=id(module) in modules,
            input=given,
            kernel=_kernel(module),
            mult_adds=0 if id(module) in modules else times * _mult_adds(module, output),
        )
        modules.add(id(module))
        seen.update(id(p.tensor) for p in own)


def _kernel(module: nn.Module) -> tuple[int, ...]:
    size = getattr(module, "kernel_size", ())
    return tuple(size) if isinstance(size, tuple) else (size,) if isinstance(size, int) else ()


def _mult_adds(module: nn.Module, output: Shapes) -> int:
    """Of one call, by the module's own parameters; an embedding only looks up."""
    from torch import nn

    weight = module._parameters.get("weight")
    if weight is None or not output or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    numel = sum(p.numel() for p in module._parameters.values() if p is not None)
    shape = output[0]
    if isinstance(module, nn.modules.conv._ConvNd):
        return numel * math.prod(shape[:1] + shape[2:])  # the channels of the output are in the weight
    return numel * math.prod(shape[:-1]) if weight.ndim == 2 else 0


def _run(model: nn.Module, sizes: Shapes, dtype: torch.dtype | None) -> dict[int, Run]:
    import torch
    from torch.nn.parameter import is_lazy

    lazy = next((p.name for p in places(model) if is_lazy(p.tensor)), None)
    if lazy is not None:
        raise LoadError(
            Diagnostic(
                "lazy-parameter", f"{lazy!r} has no shape yet, and a run would give it one", help="run the model first"
            )
        )
    calls: dict[int, Run] = {}
    first = next((p.tensor for p in places(model)), torch.empty(0))
    kind = dtype if dtype is not None else _input_dtype(model, first)
    inputs = [torch.zeros(size, dtype=kind, device=first.device) for size in sizes]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        given, returned, times = calls.get(id(module), (tuple(_shapes(args)), tuple(_shapes(output)), 0))
        calls[id(module)] = given, returned, times + 1

    with _untouched(model), torch.no_grad():
        handles = [module.register_forward_hook(note) for module in model.modules()]
        try:
            model(*inputs)
        except Exception as error:
            shown = ", ".join(f"{kind} {list(size)}".removeprefix("torch.") for size in sizes)
            raise LoadError(
                Diagnostic(
                    "cannot-run",
                    f"the model cannot run on {shown}: {type(error).__name__}: {error}",
                    help="input_size has the batch dimension; dtype=torch.int64 is for token ids",
                )
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _input_dtype(model: nn.Module, first: Tensor) -> torch.dtype:
    import torch
    from torch import nn

    holder = next((m for m in model.modules() if m._parameters and not m._modules), None)
    if isinstance(holder, nn.Embedding | nn.EmbeddingBag):
        return torch.int64
    return first.dtype if first.is_floating_point() else torch.get_default_dtype()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and generators as they were, whatever a run does."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(place, place.tensor, place.tensor.clone()) for place in places(model) if place.is_buffer]
    try:
        with seeded_globals(0, next((p.tensor.device for p in places(model)), "cpu")):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for place, buffer, values in buffers:
            if not buffer.is_meta:
                buffer.copy_(values)
            if place.tensor is not buffer:
                place.put(buffer)


def _shapes(output: Any) -> Iterator[tuple[int, ...]]:
    import torch

    if isinstance(output, torch.Tensor):
        yield tuple(output.shape)
    elif isinstance(output, dict):
        for value in output.values():
            yield from _shapes(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _shapes(value)
