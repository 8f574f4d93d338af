"""First values for tensors of a live model: by a formula, by the model's own hooks, or as it was built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError
from ..language.calls import Call, parse_call
from ..language.folding import fold
from ..language.leaves import by_leaf
from ..ops.base import OpError
from ..ops.initialisers import Initialiser
from ..ops.seeding import generator_for, key_seed, seeded_globals
from ..specs import TensorSpec
from ..storage.plain_memory import oddity
from .assigning import set_tensor
from .defaults import DefaultInitialisation
from .places import named_tensors, place_of, places, require_module
from .selectors import matching_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "FirstValues",
    "Initialised",
    "What",
    "Whats",
    "computed_buffers",
    "initialise",
    "materialise_buffers",
    "read_initialiser",
]

What = str | Call | Initialiser | Callable[..., Any]
Whats = What | Mapping[str, What]


@dataclass(frozen=True, slots=True)
class Initialised:
    """One line of the ledger.

    Args:
        name: the tensor's name; of a tied one each name has a line.
        spec: its shape and dtype.
        initialiser: what was asked for, such as `"trunc_normal(std=0.02)"`.
        by: what gave the values: `"formula"`, `"callable"`, `"as built"`, `"tied to …"`, or the method of the model.
        seed: the seed of the whole; the key's own is derived from it and the name.
    """

    name: str
    spec: TensorSpec
    initialiser: str
    by: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}  {self.spec}  {self.initialiser} ({self.by}, seed {self.seed})"


def read_initialiser(what: What) -> Initialiser:
    """An initialiser from its text, from a parsed call, or from a callable.

    >>> read_initialiser("trunc_normal(std=0.02)")
    Initialiser('trunc_normal(std=0.02)')

    Raises:
        RecipeError: the text does not parse.
        LoadError: unknown name or bad arguments.
    """
    if isinstance(what, Initialiser):
        return what
    try:
        if isinstance(what, str | Call):
            call = parse_call(what) if isinstance(what, str) else what
            return Initialiser.of(call.name, call.args, dict(call.keywords))
        return Initialiser.wrap(what)
    except OpError as error:
        text = f"{what}: {error}"
        raise LoadError(Diagnostic("bad-initialiser", text, remedies=error.remedies("init"))) from error


def initialise(
    model: nn.Module, what: Mapping[str, Whats], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Initialised, ...]:
    """Give tensors first values, and return one line for each.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> for row in initialise(model, {"0.weight": "xavier_uniform", "1": "default"}):
    ...     print(row)
    0.weight  F32 [3, 2]  xavier_uniform (formula, seed 0)
    1.weight  F32 [3]  default (LayerNorm.reset_parameters, seed 0)
    1.bias  F32 [3]  default (LayerNorm.reset_parameters, seed 0)

    Each tensor has a stream of its own, from `seed` and its first name: neither the order nor what else is initialised
    changes its values, and the global generators stay as they were. `default` is what construction gives: the layer's
    `reset_parameters`, and over it the model's hook, `_init_weights` or `init_weights`; tensors that were not named
    keep every bit. `own` leaves what the constructor built. Tied names are filled once. On a meta model the named
    tensors become real.

    Args:
        what: names, key patterns or module paths, each with an initialiser: a name, the text of a call, or a callable
            of tensor and generator; or with several, by the last part of the name. Module paths and patterns include
            buffers for a single `default` or `own` only.
        device: where meta tensors become real.

    Raises:
        LoadError: all problems at once, before anything is changed: names that match nothing, two initialisers for one
            tensor, an initialiser that cannot fill the shape or dtype, a tensor for which there is no default.
    """
    return FirstValues.of(model, what, seed, device).give(model)


@dataclass(frozen=True)
class FirstValues:
    """First values of a model's tensors, made or proved possible before anything of the model is changed.

    Args:
        rules: first name of each tensor -> its initialiser, in state_dict order.
        first_names: every name -> the first name of its tensor.
        drawn: first name -> values that are made already, and what gave them; formulas draw in place, and need none.
    """

    rules: Mapping[str, Initialiser]
    first_names: Mapping[str, str]
    drawn: Mapping[str, tuple[Tensor, str]]
    seed: int
    device: torch.device | str

    @classmethod
    def of(
        cls, model: nn.Module, what: Mapping[str, Whats], seed: int = 0, device: torch.device | str = "cpu"
    ) -> FirstValues:
        """Settle what every tensor gets; arguments and errors are those of `initialise`."""
        require_module(model)
        tensors = named_tensors(model)
        rules, problems = _assign_rules(model, what, tensors)
        drawn: dict[str, tuple[Tensor, str]] = {}
        by_default = [n for n, rule in rules.items() if rule.by_module and rule.name == "default"]
        if by_default:
            drawn, missing = _drawn(model, by_default, seed, device)
            problems += missing
        if problems:
            raise LoadError(dict.fromkeys(problems))
        for name, rule in rules.items():
            if rule.function is not None:
                drawn[name] = _called(name, rule, tensors[name], seed, device), "callable"
        return cls(rules, _first_names(tensors), drawn, seed, device)

    def give(self, model: nn.Module) -> tuple[Initialised, ...]:
        """Give the tensors their values, and return one line for each name."""
        done = {
            name: _fill(model, name, rule, self.drawn.get(name), self.seed, self.device)
            for name, rule in self.rules.items()
        }
        return tuple(_rows(named_tensors(model), self.first_names, self.rules, done, self.seed))


def _drawn(
    model: nn.Module, names: Sequence[str], seed: int, device: torch.device | str
) -> tuple[dict[str, tuple[Tensor, str]], list[Diagnostic]]:
    """Name -> what the model itself gives it and by what, and the names for which it gives nothing."""
    drawn: dict[str, tuple[Tensor, str]] = {}
    problems: list[Diagnostic] = []
    with DefaultInitialisation(model, device) as stage:
        for name in names:
            try:
                drawn[name] = stage.draw(name, seed)
            except LoadError as error:
                problems += error.diagnostics
    return drawn, problems


def _assign_rules(
    model: nn.Module, what: Mapping[str, Whats], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Initialiser], list[Diagnostic]]:
    """First name of each tensor -> its initialiser, in state_dict order, and what stands against it."""
    problems: list[Diagnostic] = []
    rules: dict[str, Initialiser] = {}
    asked: dict[str, str] = {}
    first_names = _first_names(tensors)
    for key, value in what.items():
        try:
            found = _rules_of(model, key, value, buffers=key in tensors)
        except LoadError as error:
            problems += error.diagnostics
            continue
        for name, rule in {first_names[n]: rule for n, rule in found.items()}.items():
            if rules.setdefault(name, rule) != rule:
                problems.append(
                    Diagnostic(
                        "initialised-twice",
                        f"{name!r} is given {rules[name]} by {asked[name]!r} and {rule} by {key!r}",
                        help="name each tensor once",
                    )
                )
            asked.setdefault(name, key)
    problems += _misfits(rules, tensors)
    return {n: rules[n] for n in tensors if n in rules}, problems


def _rules_of(model: nn.Module, key: str, value: Whats, buffers: bool) -> dict[str, Initialiser]:
    """Name -> initialiser for what one line means; buffers come along where a module fills them by itself."""
    if not isinstance(value, Mapping):
        rule = read_initialiser(value)
        return dict.fromkeys(matching_names(model, key, buffers=rule.by_module or buffers), rule)
    rules = {leaf: read_initialiser(one) for leaf, one in value.items()}
    given = by_leaf(matching_names(model, key, buffers), rules)
    return {name: read_initialiser(one) for name, one in given.items()}


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _misfits(rules: Mapping[str, Initialiser], tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """One diagnostic for each initialiser that cannot fill some of its tensors, with all of their names."""
    against: dict[tuple[str, str, str], list[str]] = {}
    for name, rule in rules.items():
        reason = _misfit(rule, tensors[name])
        if reason is not None:
            against.setdefault((str(rule), *reason), []).append(name)
    return [
        Diagnostic(
            "cannot-initialise",
            f"{rule} cannot fill {repr(names[0]) if len(names) == 1 else f'{len(names)} of the tensors'}: {reason}",
            notes=tuple(text for text, _ in fold(names)) if len(names) > 1 else (),
            help=help,
        )
        for (rule, reason, help), names in against.items()
    ]


def _misfit(rule: Initialiser, tensor: Tensor) -> tuple[str, str] | None:
    """Why the tensor cannot be filled, and what to do; None where it can."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "it has no shape yet", "run the model on one batch first"
    found = oddity(tensor)
    if found is not None:
        return f"it is {found.kind}", "initialise the model before it is sharded or quantised"
    if rule.by_module and rule.name == "own" and tensor.is_meta:
        return "on a meta model nothing was built that could be left", "default, or an initialiser"
    try:
        rule.check(TensorSpec(tuple(tensor.shape), tensor.dtype))
    except OpError as error:
        return str(error), f'by the last part of the name: {{"weight": "{rule}", "bias": "zeros"}}'
    return None


def _called(name: str, rule: Initialiser, tensor: Tensor, seed: int, device: torch.device | str) -> Tensor:
    """What a user's callable makes of a copy: should it raise, the model is still whole."""
    import torch

    at = torch.device(device) if tensor.is_meta else tensor.device
    copy = torch.zeros(tensor.shape, dtype=tensor.dtype, device=at) if tensor.is_meta else tensor.detach().clone()
    try:
        with seeded_globals(key_seed(seed, name), at):
            return rule.apply(copy, generator_for(seed, name, at))
    except OpError as error:
        raise LoadError(Diagnostic("cannot-initialise", f"{name!r}: {error}")) from error


def _fill(
    model: nn.Module,
    name: str,
    rule: Initialiser,
    drawn: tuple[Tensor, str] | None,
    seed: int,
    device: torch.device | str,
) -> str:
    """Write the values, and say what gave them."""
    import torch

    tensor = place_of(model, name).tensor
    if drawn is not None:
        values, by = drawn
        set_tensor(model, name, values, assign=tensor.is_meta)
        return by
    if rule.by_module:
        return "as built"
    if tensor.is_meta:
        set_tensor(model, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device), assign=True)
        tensor = place_of(model, name).tensor
    rule.apply(tensor, generator_for(seed, name, tensor.device))
    return "formula"


def _rows(
    tensors: Mapping[str, Tensor],
    first_names: Mapping[str, str],
    rules: Mapping[str, Initialiser],
    done: Mapping[str, str],
    seed: int,
) -> list[Initialised]:
    rows = []
    for name, tensor in tensors.items():
        first = first_names[name]
        if first in done:
            by = done[name] if name == first else f"tied to {first}"
            rows.append(Initialised(name, TensorSpec(tuple(tensor.shape), tensor.dtype), str(rules[first]), by, seed))
    return rows


def computed_buffers(model: nn.Module, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Compute the buffers that no state_dict holds and that are still meta, and return them by name.

    Their modules' hooks are asked: `init_non_persistent_buffers`, `reset_buffers`, `reset_parameters`, then the model's
    `_init_weights` or `init_weights`.

    Raises:
        LoadError: buffers that none of these fills, each by name; nothing is changed.
    """
    require_module(model)
    wanted = [p.name for p in places(model) if p.is_buffer and not p.persistent and p.tensor.is_meta]
    if not wanted:
        return {}
    drawn, problems = _drawn(model, wanted, 0, device)
    if problems:
        raise LoadError(
            Diagnostic(
                "meta-buffers",
                f"{len(problems)} non-persistent buffers of the meta model have no values, and no hook computes them",
                notes=tuple(d.headline for d in problems),
                help="build the model by skeleton(factory), which keeps buffers real",
            )
        )
    return {name: tensor for name, (tensor, _) in drawn.items()}


def materialise_buffers(model: nn.Module, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Give a model the buffers that `computed_buffers` computes, and return their names.

    Raises:
        LoadError: as for `computed_buffers`; nothing is changed.
    """
    computed = computed_buffers(model, device)
    for name, tensor in computed.items():
        set_tensor(model, name, tensor, assign=True)
    return tuple(computed)
