"""`verify`: whether two models give the same outputs and, where not, the first module at which they part."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError
from ..notebook_view import TextInNotebooks
from ..wording import brief, clipped, counted, listed
from .forward_pass import ModuleCall, tried

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..catalog import RecipeLike
    from ..planning.plan import Plan

__all__ = ["TOLERANCES", "OutputDifference", "Parity", "Parting", "verify"]

# How far outputs may be apart, as a share of their own largest element: rounding grows with depth, so these are wider
# than for one operation.
TOLERANCES: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class OutputDifference:
    """How far two tensors are apart.

    Args:
        largest: of all elements, absolute; infinite where the shapes differ or one side alone is not finite.
        relative: the same as a share of the largest element of the first.
        tolerance: what `relative` may be.
        shapes: of both.
    """

    largest: float
    relative: float
    tolerance: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def within(self) -> bool:
        """Whether they count as equal."""
        return self.relative <= self.tolerance


@dataclass(frozen=True, repr=False)
class Parting:
    """The first module at which two models part.

    Args:
        module, other: its name in the first model and in the second.
        difference: of its outputs.
        parameters: what the module uses, as names of the second model.
        rules: parameter -> the rule that it came from, where a plan was given.
    """

    module: str
    other: str
    difference: OutputDifference
    parameters: tuple[str, ...] = ()
    rules: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        uses = f"uses {listed(self.parameters)}" if self.parameters else ""
        return brief("Parting", f"{clipped(self.module)} / {clipped(self.other)}", uses)


@dataclass(frozen=True, repr=False)
class Parity(TextInNotebooks):
    """The comparison of two models' outputs; true if they agree.

    Args:
        outputs: the difference of each output tensor.
        compared: how many module calls were compared on the way.
        parting: where they part, None where they agree, or where nothing in between can be compared.
    """

    outputs: tuple[OutputDifference, ...]
    compared: int
    parting: Parting | None = None

    @property
    def ok(self) -> bool:
        """Whether every output is within its tolerance."""
        return bool(self.outputs) and all(d.within for d in self.outputs)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        counts = counted(len(self.outputs), "output"), f"{counted(self.compared, 'module call')} compared"
        parting = f"they part at {clipped(self.parting.module)}" if self.parting is not None else ""
        return brief("Parity", "equal" if self.ok else "different", *counts, parting)

    def __str__(self) -> str:
        worst = max(self.outputs, key=lambda d: d.relative, default=None)
        counts = f"{counted(len(self.outputs), 'output')}, {counted(self.compared, 'module call')} compared"
        lines = [f"{'equal' if self.ok else 'different'}: {counts}"]
        if worst is not None:
            said = f"{worst.largest:.3g}, {worst.relative:.3g} of the largest output"
            lines.append(f"  largest difference {said}; {worst.tolerance:.3g} allowed")
        if self.parting is not None:
            found = self.parting
            names = dict.fromkeys(name or "the model itself" for name in (found.module, found.other))
            where = " / ".join(names)
            lines.append(
                f"  they part at {where}: {found.difference.relative:.3g} apart, shapes {_shapes(found.difference)}"
            )
            for name in found.parameters:
                lines.append(f"    uses {name}" + (f"  by {found.rules[name]}" if name in found.rules else ""))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        parting = self.parting
        return {
            "ok": self.ok,
            "compared": self.compared,
            "outputs": [_json(d) for d in self.outputs],
            "parting": None
            if parting is None
            else {
                "module": parting.module,
                "other": parting.other,
                "difference": _json(parting.difference),
                "parameters": list(parting.parameters),
                "rules": dict(parting.rules),
            },
        }


def verify(
    a: nn.Module,
    b: Any,
    inputs: Any,
    recipe: RecipeLike | None = None,
    *,
    tolerance: float | None = None,
    plan: Plan | None = None,
) -> Parity:
    """Compare the outputs of two models on the same inputs, and find the first module at which they part.

    >>> import torch
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)) for _ in range(2))
    >>> _ = b.load_state_dict(a.state_dict())
    >>> x = torch.ones(4, 2)
    >>> verify(a, b, x).ok
    True
    >>> _ = torch.nn.init.zeros_(b[0].weight)
    >>> verify(a, b, x).parting.other
    '0'

    Args:
        a: a model.
        b: another model, or a checkpoint (whatever `open` takes): then it is loaded into a copy of `a`, as `load_into`
            does, which takes wrapper prefixes off and finds the tensors inside a training checkpoint.
        inputs: a tensor, a tuple of positional or a mapping of named arguments, for both.
        recipe: what brings the checkpoint into `a`'s layout, where it has another.
        tolerance: how far outputs may be apart, as a share of the largest; by default the dtype's, see `TOLERANCES`.
        plan: the plan that made the second's tensors; a module's parameters are then shown with their rules.

    Both run in eval mode without gradients; modes, hooks and random states are as before.

    Raises:
        LoadError: a model fails on the inputs, or the checkpoint does not fit `a`.
    """
    other = _loaded(a, b, recipe)
    one, first = tried(a, inputs, "a")
    two, second = tried(other, inputs, "b")
    if len(one) != len(two):
        text = f"a gives {len(one)} tensors, b gives {len(two)}"
        raise LoadError(Diagnostic("outputs-differ", text, help="wrap the models so that both give the same outputs"))
    outputs = tuple(_apart(x, y, tolerance) for x, y in zip(one, two))
    pairs = _pairs(first, second, tolerance)
    parting = None
    if not all(d.within for d in outputs):
        plan = _planned(b, recipe, other) if plan is None and recipe is not None else plan
        parting = _parting(pairs, other, tolerance, plan)
    return Parity(outputs, len(pairs), parting)


def _loaded(a: nn.Module, b: Any, recipe: RecipeLike | None) -> nn.Module:
    """The second model; of a checkpoint, a copy of the first that it was loaded into."""
    from torch import nn

    if isinstance(b, nn.Module):
        if recipe is not None:
            text = "a recipe says how a checkpoint is loaded, and b is a model"
            raise LoadError(Diagnostic("bad-argument", text, help="the plan names the rules behind a model's tensors"))
        return b
    from ..transfer.loading import load_into

    twin = copy.deepcopy(a)
    load_into(twin, b, recipe)
    return twin


def _planned(b: Any, recipe: RecipeLike, model: nn.Module) -> Plan:
    """Where each tensor came from; headers alone."""
    from ..running.model_loading import model_target
    from ..running.runner import plan

    return plan(b, recipe, target=model_target(model))


def _apart(x: Tensor, y: Tensor, tolerance: float | None) -> OutputDifference:
    import torch

    shapes = tuple(x.shape), tuple(y.shape)
    # The coarser of two dtypes says what can be asked.
    names = [str(t.dtype).removeprefix("torch.") for t in (x, y)]
    allowed = max(TOLERANCES.get(n, 0.0) for n in names) if tolerance is None else tolerance
    if x.shape != y.shape:
        return OutputDifference(float("inf"), float("inf"), allowed, shapes)
    if not x.numel():
        return OutputDifference(0.0, 0.0, allowed, shapes)
    one, two = (t.detach().to("cpu", torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
    strange = ~(torch.isfinite(one) & torch.isfinite(two))
    # Equal infinities, such as those of a mask, and NaN beside NaN are no difference.
    alike = (one == two) | (torch.isnan(one) & torch.isnan(two))
    if bool((strange & ~alike).any()):
        return OutputDifference(float("inf"), float("inf"), allowed, shapes)
    gap = torch.where(strange, torch.zeros_like(one), one - two).abs()
    scale = torch.where(strange, torch.zeros_like(one), one).abs().max().item()
    largest = gap.max().item()
    return OutputDifference(
        largest, largest / scale if scale else (0.0 if not largest else float("inf")), allowed, shapes
    )


def _pairs(
    first: Sequence[ModuleCall], second: Sequence[ModuleCall], tolerance: float | None
) -> list[tuple[ModuleCall, ModuleCall]]:
    """Calls of both models that do the same: namesakes or, where the models are built differently, equals in order."""
    names = [c.module for c in first], [c.module for c in second]
    if names[0] == names[1]:
        return list(zip(first, second))
    found = []
    at = 0
    for call in first:
        if not call.outputs or not call.module:
            continue
        alike = [k for k in range(at, len(second)) if second[k].module and _fits(call, second[k])]
        equal = next((k for k in alike if _apart(call.outputs[0], second[k].outputs[0], tolerance).within), None)
        if equal is not None:
            found.append((call, second[equal]))
            at = equal + 1
        elif alike and call.leaf and _has_weights(call):
            # Nothing behind the last equal pair gives this: what comes next of its kind is what differs.
            kin = [k for k in alike if second[k].kind == call.kind and second[k].leaf] or [
                k for k in alike if second[k].leaf
            ]
            if kin:
                found.append((call, second[kin[0]]))
                break
    return found


def _fits(one: ModuleCall, two: ModuleCall) -> bool:
    return bool(two.outputs) and one.outputs[0].shape == two.outputs[0].shape


def _has_weights(call: ModuleCall) -> bool:
    return call.kind not in ("Dropout", "Identity", "Flatten")


def _parting(
    pairs: Sequence[tuple[ModuleCall, ModuleCall]], model: nn.Module, tolerance: float | None, plan: Plan | None
) -> Parting | None:
    """The first pair that differs; of a module and the one inside it that ends first, the inner one."""
    modules = dict(model.named_modules())
    for one, two in pairs:
        for x, y in zip(one.outputs, two.outputs):
            difference = _apart(x, y, tolerance)
            if not difference.within:
                inside = modules[two.module].named_parameters(recurse=two.leaf)
                used = tuple(f"{two.module}.{n}" if two.module else n for n, _ in inside)
                return Parting(one.module, two.module, difference, used, _rules(used, plan))
    return None


def _rules(parameters: Sequence[str], plan: Plan | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if plan is None:
        return found
    for step in plan.steps:
        for key in step.targets:
            if key in parameters and step.rules:
                found[key] = plan.uses[step.rules[-1]].text
    return found


def _shapes(difference: OutputDifference) -> str:
    one, two = difference.shapes
    return f"{list(one)}" if one == two else f"{list(one)} and {list(two)}"


def _json(difference: OutputDifference) -> dict[str, Any]:
    return {
        "largest": difference.largest,
        "relative": difference.relative,
        "tolerance": difference.tolerance,
        "within": difference.within,
        "shapes": [list(s) for s in difference.shapes],
    }
