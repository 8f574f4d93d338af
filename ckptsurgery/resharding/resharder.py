"""`reshard`: plan the exchange between two live models once, and carry it out as often as it is wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..boxes import covers_once
from ..catalog import RecipeLike
from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, LoadError, PlanError, Remedy
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..ops.base import OpError
from ..planning.options import OWN
from ..planning.plan import Plan
from ..planning.record import Target
from ..planning.steps import Step
from ..running.executor.programs import run_step
from ..running.fingerprints import plan_digest
from ..running.runner import plan as plan_of
from ..sharding.peers import Peers, peers
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Contents
from ..storage.header_sources import read_headers
from ..storage.output.writing import parse_size
from ..storage.tensors import torch_dtype
from ..wording import counted, shown_keys
from .buckets import Bucket, buckets_of
from .holdings import Held, Holding, holding_of, united
from .routes import BoxAddress, Holders, Route, Router, WholeStep
from .sending_boxes import Bound, Carrier, wire_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Resharder", "reshard"]


def reshard(
    source: Any,
    target: Any,
    recipe: RecipeLike | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
    dtype: str = "lossless",
    bucket_size: int | str = "64MiB",
) -> Resharder:
    """Plan how the tensors of one live model get into another; all ranks call it together.

    The two may have different names, meshes and placements, and may be on different ranks of the default process group.
    Nothing is moved yet: call the result, or iterate over its `stream()`, as often as the source has new values.

    >>> import torch, ckptsurgery as cs
    >>> trainer, engine = torch.nn.Linear(2, 6), {"qkv.weight": torch.zeros(6, 2), "qkv.bias": torch.zeros(6)}
    >>> sync = cs.reshard(trainer, engine, "{l:weight,bias} -> qkv.{l}")
    >>> sync()
    >>> torch.equal(engine["qkv.weight"], trainer.weight)
    True

    Args:
        source: a model or a state dict, with `DTensor`s or without, or `{prefix: model}`; None on a rank that holds
            nothing of it. Ranks may hold different keys, as pipeline stages do.
        target: likewise, or `{key: TensorSpec}`, of which every rank that names it gets whole tensors by `stream()`.
        recipe: a `Recipe`, its name or path, or rules; without one, the names are equal.
        config: what `config.` means in dims; the source's own by default.
        dims: sizes that go before the recipe's own.
        dtype: what a difference between dtypes means: "lossless" casts where no bit is lost, "model" always, "error"
            never.
        bucket_size: bytes that a rank sends, and receives, at a time; also as "64MiB".

    Raises:
        PlanError, RecipeError, CheckpointError, LoadError: the same on all ranks: names that are missing or new, shapes
            and dtypes that differ, parts that overlap or leave something out.
    """
    ranks = peers() or Peers(0, 1)
    try:
        here, there = ranks.tried(lambda: (holding_of(source), holding_of(target)))
        told = ranks.gathered((here.told, there.told))
        sources, targets = ([sides[n] for sides in told] for n in (0, 1))
        whole, wanted = united(sources), united(targets)
        plan = _planned(whole, wanted, recipe, config, dims, dtype)
        buckets = _buckets(plan, sources, targets, ranks, parse_size(bucket_size))
        ranks.agree(None, _digest(plan, buckets))
    except Exception as error:
        ranks.fail(error)
        raise
    return Resharder(plan, buckets, here, there, ranks, f"{whole.name} -> {wanted.name}")


def _planned(
    source: Held,
    target: Held,
    recipe: RecipeLike | None,
    config: Mapping[str, Any] | None,
    dims: Mapping[str, DimValue] | None,
    dtype: str,
) -> Plan:
    """The plan between two sides, of which all values come from the source."""
    for side, held in (("source", source), ("target", target)):
        if not held.specs:
            text = f"no rank has a tensor of the {side}"
            help = f"pass the {side} on the ranks that hold it, or {{key: TensorSpec}} for a stream of whole tensors"
            raise CheckpointError(Diagnostic("empty-side", text, help=help))
    contents = read_headers(source.specs)
    checkpoint = Checkpoint(_tied(contents, source.ties), source.name)
    known = config if config is not None else source.config
    wanted = Target(target.specs, target.ties, target.name)
    said = recipe if recipe is not None else Recipe(rest="keep")
    plan = plan_of(checkpoint, said, wanted, known, dims=dims, dtype=dtype)
    _refuse_first_values(plan)
    _refuse_comparisons(plan, source)
    return plan


def _tied(contents: Contents, ties: Sequence[Sequence[str]]) -> Contents:
    """Contents in which the names of a tie mean one tensor."""
    for first, *others in ties:
        for name in others:
            contents.entries[name] = contents.entries[first]
            contents.aliases[name] = first
    return contents


def _refuse_first_values(plan: Plan) -> None:
    made = [key for key, what in plan.inits.items() if what not in OWN]
    if made:
        text = f"{counted(len(made), 'target tensor', 'has')} first values, which every call would draw again"
        raise PlanError(
            Diagnostic(
                "first-values",
                text,
                notes=shown_keys(made),
                remedies=(Remedy("init", dict.fromkeys(made, "own()"), "leaves them as they are", kind="recipe"),),
            )
        )


def _refuse_comparisons(plan: Plan, source: Held) -> None:
    """Check that tensors which must be equal are one tensor of the source."""
    tied = {key: names[0] for names in source.ties for key in names}
    makers = {key: (step, number) for step in plan.steps for number, key in enumerate(step.targets)}
    apart = [(a, b) for a, b in plan.proofs if tied.get(a, a) != tied.get(b, b)]
    apart += [(a, b) for a, b in plan.tie_proofs if not _made_alike(makers[a], makers[b], tied)]
    if apart:
        text = f"{apart[0][0]!r} and {apart[0][1]!r} must be equal, and the source holds them as separate tensors"
        step, _ = makers.get(apart[0][0], (None, 0))
        by_rest = step is not None and all(plan.uses[number].is_rest for number in step.rules)
        drop = (Remedy("drop", list(step.sources), "takes the other one", kind="recipe"),) if step and by_rest else ()
        raise PlanError(
            Diagnostic(
                "tied-apart",
                text,
                notes=tuple(f"{a} and {b}" for a, b in apart[1:12]),
                remedies=drop,
                advice="or tie them in the source"
                if drop
                else "make one of them by no rule, or tie them in the source",
            )
        )


def _made_alike(one: tuple[Step, int], other: tuple[Step, int], tied: Mapping[str, str]) -> bool:
    """Whether two outputs of steps are the same function of the same tensors."""
    (a, i), (b, j) = one, other
    same = [tied.get(key, key) for key in a.sources] == [tied.get(key, key) for key in b.sources]
    return same and i == j and a.program.inputs == b.program.inputs and a.program == b.program


def _buckets(
    plan: Plan, sources: Sequence[Held], targets: Sequence[Held], ranks: Peers, limit: int
) -> tuple[Bucket, ...]:
    """The buckets of a plan, after a check that the ranks hold each element that is read."""
    held, wanted = (Holders([side.boxes for side in sides]) for sides in (sources, targets))
    read = {key: plan.source[key] for step in plan.steps for key in step.sources}
    torn = [key for key, spec in read.items() if spec.numel and not covers_once(spec.shape, held.boxes(key))]
    if torn:
        text = f"the ranks hold {torn[0]!r} in parts that overlap, or leave some of it out"
        help = "pass the source on all ranks of its mesh"
        raise CheckpointError(Diagnostic("bad-shards", text, torn[0], notes=shown_keys(torn[1:]), help=help))
    skipped = {other for other, _ in plan.tie_proofs}
    return tuple(buckets_of(Router(held, wanted, ranks.size).traffic(plan.steps, skipped), ranks.size, limit))


def _digest(plan: Plan, buckets: Sequence[Bucket]) -> str:
    """What is equal on ranks that planned the same exchange."""
    routes = [[[r[:5] for r in routes] for routes in (*bucket.gathers, *bucket.rounds)] for bucket in buckets]
    return hashlib.sha256(repr((plan_digest(plan), routes)).encode()).hexdigest()


@dataclass
class Resharder:
    """A planned exchange between two live models; all ranks call it together.

    Args:
        plan: what becomes of every tensor.
        buckets: what is sent to whom, and in which order.
        source, target: what this rank holds of both sides.
        ranks: all that take part.
        title: the names of both sides.
    """

    plan: Plan
    buckets: tuple[Bucket, ...]
    source: Holding
    target: Holding
    ranks: Peers
    title: str = ""
    _bounds: dict[tuple[int, str, int], Bound] = field(default_factory=dict)

    @property
    def wire_bytes(self) -> int:
        """Bytes that all ranks together send to others in one call."""
        return wire_bytes(self._rounds)

    @cached_property
    def _rounds(self) -> list[tuple[Route, ...]]:
        return [routes for bucket in self.buckets for routes in (*bucket.gathers, *bucket.rounds)]

    @cached_property
    def _carrier(self) -> Carrier:
        carrier = Carrier(self.ranks)
        carrier.reserve(self._rounds)
        return carrier

    @cached_property
    def _used(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys that this rank reads, and those that it fills."""
        me = self.ranks.rank
        routes = [route for routes in self._rounds for route in routes]
        read = (r.source.key for r in routes if r.sender == me and r.source.side == "source")
        filled = (r.target.key for r in routes if r.receiver == me and r.target.side == "target")
        return tuple(dict.fromkeys(read)), tuple(dict.fromkeys(filled))

    def __call__(self) -> None:
        """Put the source's values of now into the target.

        Raises:
            LoadError: the same on all ranks: a tensor was replaced by one of another layout, the target has no memory,
                or an op refused a value; after the last, the target holds old and new values.
        """
        import torch

        with torch.no_grad():
            self._begin(streaming=False)
            for number, bucket in enumerate(self.buckets):
                self._carry(number, bucket, None)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the target's tensors by name, bucket by bucket, without writing into the target.

        A rank gets the part of each tensor that it holds of the target, in new memory. All ranks iterate to the end:
        one that stops earlier leaves the others waiting.

        Raises:
            LoadError: the same on all ranks, as when the resharder is called.
        """
        import torch

        with torch.no_grad():
            self._begin(streaming=True)
            for number, bucket in enumerate(self.buckets):
                made = self._carrier.attempt(partial(self._made, bucket.keys)) or {}
                self._carry(number, bucket, made)
                yield from made.items()
            carried = {key for bucket in self.buckets for key in bucket.keys}
            skipped = {other for other, _ in self.plan.tie_proofs}
            yield from self._made([key for key in self.plan.specs if key not in carried | skipped]).items()

    def _made(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """New memory for the parts of tensors that this rank holds."""
        import torch

        boxes, specs = self.target.told.boxes, self.plan.specs
        return {
            key: torch.empty(boxes[key].extent, dtype=torch_dtype(specs[key].dtype, key), device=self._device(key))
            for key in keys
            if key in boxes
        }

    def _device(self, key: str) -> Any:
        """Where the target has a tensor, or is sent it."""
        return self.target.device(key) or self.ranks.device

    def _begin(self, streaming: bool) -> None:
        """Find the memory of all tensors, and agree that it is as planned."""
        error: Exception | None = None
        try:
            read, filled = self._used
            if not streaming and self.target.is_meta:
                text = "the target has tensors without memory, which stream() can fill and a call cannot"
                raise LoadError(Diagnostic("meta-target", text, help="for name, tensor in sync.stream(): …"))
            unmoved = self.source.refresh(read)
            if not streaming:
                unmoved = self.target.refresh(filled) and unmoved
            if not unmoved:
                self._bounds.clear()
            self._carrier.failure()  # of a call that broke off; the buffers are there from now on
        except Exception as raised:
            error = raised
        self._agree(error)

    def _end(self) -> None:
        found = self._carrier.failure()
        error: LoadError | None = None
        if found is not None:
            self._bounds.clear()
            half = Diagnostic(
                "half-loaded", "the exchange broke off: the target holds old and new values", help="sync() again"
            )
            first = found.diagnostics if isinstance(found, CkptSurgeryError) else (_failed(found),)
            error = LoadError([*first, half])
        self._agree(error)

    def _agree(self, error: Exception | None) -> None:
        """Raise an error of any rank on all of them."""
        ranks = Peers(self.ranks.rank, self.ranks.size)
        if ranks.any(error is not None):
            ranks.agree(error)

    def _carry(self, number: int, bucket: Bucket, made: Mapping[str, Tensor] | None) -> None:
        """Carry a bucket out.

        Args:
            made: the memory of targets; None for that of the target itself.
        """
        carrier = self._carrier
        scratch: dict[tuple[str, str], Tensor] = carrier.attempt(partial(self._inputs, bucket.makings)) or {}

        def memory(slot: BoxAddress) -> Tensor:
            if slot.side == "source":
                return self.source.memory(slot.key)
            if slot.side == "target":
                return self.target.memory(slot.key) if made is None else made[slot.key]
            return scratch[slot.side, slot.key]

        def bound(routes: tuple[Route, ...]) -> Bound:
            return carrier.attempt(partial(carrier.bind, routes, memory)) or carrier.idle(routes)

        with self.ranks.in_step():
            for routes in bucket.gathers:
                carrier.carry(bound(routes))
            for making in bucket.makings:
                if making.maker == self.ranks.rank:
                    carrier.attempt(partial(self._make, making, scratch))
            for place, routes in enumerate(bucket.rounds):
                known = (number, "rounds", place)
                if bucket.makings or made is not None:
                    carrier.carry(bound(routes))
                    continue
                if known not in self._bounds:
                    self._bounds[known] = bound(routes)
                carrier.carry(self._bounds[known])
        self._end()

    def _inputs(self, makings: Sequence[WholeStep]) -> dict[tuple[str, str], Tensor]:
        """Memory for the inputs of the steps that this rank runs on whole tensors."""
        mine = [making.step for making in makings if making.maker == self.ranks.rank]
        return {
            ("input", key): _empty(spec, self.ranks.device)
            for step in mine
            for key, spec in zip(step.sources, step.program.inputs)
        }

    def _make(self, making: WholeStep, scratch: dict[tuple[str, str], Tensor]) -> None:
        """Run a step on whole tensors."""
        step = making.step
        made = run_step(step, lambda key: scratch["input", key])
        scratch.update({("output", key): tensor for key, tensor in zip(step.targets, made)})

    def __str__(self) -> str:
        made, rounds = counted(len(self.plan.specs), "tensor"), counted(len(self._rounds), "exchange")
        return f"{self.title}: {made} in {rounds}, {self.wire_bytes:,} bytes between ranks"

    def __repr__(self) -> str:
        return f"<Resharder {self}>"


def _empty(spec: TensorSpec, device: str) -> Tensor:
    import torch

    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype, "an intermediate tensor"), device=device)


def _failed(error: Exception) -> Diagnostic:
    code = "op-failed" if isinstance(error, OpError) else "exchange-failed"
    return Diagnostic(code, str(error).splitlines()[0] if str(error) else type(error).__name__)
