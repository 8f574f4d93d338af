"""Two models aligned by the data that flows through them and not by the names of their modules.

The modules before a module of the target decide what it is called with. Where they hold the right weights, the module
that corresponds is called with the same tensors in the source. So the target is filled module by module, in its order
of use; where nothing in the source is called with the same tensors, an earlier choice was wrong and is taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ..errors import CkptSurgeryError
from ..specs import TensorSpec
from .chunks import ChunkedMatch
from .data_flow import DataCall, Flow, flow_of, owners
from .equating import made_by
from .findings import Finding, UnitLeaves
from .moves import TensorMove
from .shapes import relations

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DataSearch"]

_WIDEST = 4  # modules of one side that may be one module of the other
_PASSES = 300  # forward passes of the target before the search ends
_LEVELS = 3  # tensors as they are, or fused; then with axes in another order; then with blocks in another order

Choices = tuple[Finding, ...]


@dataclass
class DataSearch:
    """The search for the modules that correspond.

    Args:
        source, target: the models; the target is a copy whose weights are overwritten.
        inputs: what both are called with.
        specs, wanted: the headers of their tensors.
    """

    source: nn.Module
    target: nn.Module
    inputs: Any
    specs: Mapping[str, TensorSpec]
    wanted: Mapping[str, TensorSpec]
    level: int = 0
    passes: int = 0
    deepest: list[Choices] = field(default_factory=list)
    depth: int = -1
    made: dict[Finding, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves = UnitLeaves(self.specs), UnitLeaves(self.wanted)
        self.flow = flow_of(self.source, self.inputs)
        self.fresh = {k: t.clone() for k, t in self.target.state_dict().items()}
        self.bare = [_bare(self.source, self.specs), _bare(self.target, self.wanted)]
        self.used = list(dict.fromkeys(c.module for c in self.flow.calls))

    def run(self) -> tuple[Choices, bool]:
        """Return the correspondence, and whether both models then compute the same.

        Where no choice makes them equal, what all of those have in common that come as far as any.
        """
        best: tuple[int, list[Choices]] = -1, []
        for self.level in range(_LEVELS):
            self.passes, self.depth, self.deepest = 0, -1, []
            found = self._deepen(())
            if found is not None:
                return found, True
            best = max(best, (self.depth, self.deepest), key=lambda row: row[0])
        if not best[1]:
            return (), False
        return tuple(f for f in best[1][0] if all(f in others for others in best[1][1:])), False

    def _deepen(self, chosen: Choices) -> Choices | None:
        """The choices that make both models equal, beginning with these."""
        if self.passes >= _PASSES:
            return None
        flow = self._flow(chosen)
        if flow is None:
            return None
        made = {k for f in chosen for k in f.targets}
        taken = {k for f in chosen for k in f.sources}
        partners = self._partners(chosen)
        for n, call in enumerate(flow.calls):
            if call.module in partners:
                if self._known(call, partners[call.module]):
                    continue
                return self._with_bare(chosen, n, made, taken)
            if not self._known(call, self.used):
                return self._with_bare(chosen, n, made, taken)
            self._note(chosen, n)
            for choice in self._choices(call, flow.calls[n:], made, taken):
                found = self._deepen((*chosen, choice))
                if found is not None:
                    return found
            return None
        self._note(chosen, len(flow.calls))
        if len(flow.outputs) == len(self.flow.outputs) and all(
            a.near(b) for a, b in zip(flow.outputs, self.flow.outputs)
        ):
            return chosen
        return self._with_bare(chosen, len(flow.calls), made, taken)

    def _note(self, chosen: Choices, depth: int) -> None:
        if depth > self.depth:
            self.depth, self.deepest = depth, []
        if depth == self.depth:
            self.deepest.append(chosen)

    def _with_bare(self, chosen: Choices, depth: int, made: set[str], taken: set[str]) -> Choices | None:
        """The same with one more parameter that no module of its own holds, after which the data agrees farther."""
        for key in (k for k in self.bare[1] if k not in made):
            for source in (k for k in self.bare[0] if k not in taken):
                for finding in self._moved(source, key):
                    if self.passes < _PASSES and self._reach((*chosen, finding)) > depth:
                        found = self._deepen((*chosen, finding))
                        if found is not None:
                            return found
        return None

    def _moved(self, source: str, key: str) -> Iterator[Finding]:
        ways = relations(tuple(self.specs[source].shape), tuple(self.wanted[key].shape))
        for way in ways if self.level else ways[:1]:
            if way.kind != "split":
                yield Finding((TensorMove((source,), (key,), way.source, way.target),))

    def _reach(self, chosen: Choices) -> int:
        """How many calls of the target are made with what the source's modules are called with; one more at the end."""
        flow = self._flow(chosen)
        if flow is None:
            return -1
        partners = self._partners(chosen)
        for n, call in enumerate(flow.calls):
            if not self._known(call, partners.get(call.module, self.used)):
                return n
        same = all(a.near(b) for a, b in zip(flow.outputs, self.flow.outputs))
        return len(flow.calls) + same

    def _known(self, call: DataCall, modules: Sequence[str]) -> bool:
        return any(c.near(call) for c in self.flow.calls if c.module in modules)

    def _partners(self, chosen: Choices) -> dict[str, list[str]]:
        """The target's modules that have been chosen for, each with the source's."""
        found: dict[str, list[str]] = {}
        for finding in chosen:
            for key in finding.targets:
                modules = found.setdefault(key.rpartition(".")[0], [])
                modules += [k.rpartition(".")[0] for k in finding.sources]
        return found

    def _flow(self, chosen: Choices) -> Flow | None:
        """A forward pass of the target with what was chosen."""
        import torch

        self.passes += 1
        state = dict(self.fresh)
        weights = self.source.state_dict()
        try:
            # One pass differs from the next by the last choices alone, so what the others make is kept.
            self.made = {f: self.made[f] if f in self.made else made_by(f, weights) for f in chosen}
            for made in self.made.values():
                for key, tensor in made.items():
                    state[key] = tensor.to(self.fresh[key].dtype)
            with torch.no_grad():
                for key, tensor in self.target.state_dict().items():
                    tensor.copy_(state[key])
            return flow_of(self.target, self.inputs)
        except (CkptSurgeryError, RuntimeError, KeyError):
            return None

    def _choices(self, call: DataCall, later: Sequence[DataCall], made: set[str], taken: set[str]) -> Iterator[Finding]:
        """Return the sources that may make a module: one, several or a part of those called with the same tensors."""
        groups = [list(dict.fromkeys(c.module for c in calls if c.near(call))) for calls in (self.flow.calls, later)]
        sources = [m for m in groups[0] if not any(k in taken for k in self._own(0, m))]
        targets = [m for m in groups[1] if not any(k in made for k in self._own(1, m))]
        for module in sources:
            yield from self._single(module, call.module)
        for width in range(2, 1 + min(_WIDEST, len(sources))):
            for modules in permutations(sources, width):
                yield from self._fused(modules, (call.module,))
        for width in range(2, 1 + min(_WIDEST, len(targets))):
            for others in permutations(targets, width):
                if call.module in others:
                    yield from (f for m in sources for f in self._fused((m,), others))
        for module in sources if self.level == 2 else ():
            yield from self._reordered(module, call.module)

    def _own(self, side: int, module: str) -> dict[str, str]:
        """The tensors of a module itself by their roles."""
        specs = self.wanted if side else self.specs
        keys = [k for k in specs if k.rpartition(".")[0] == module]
        places = {k: self.leaves[side].roles[k] for k in keys}
        return {role if path == module else k.rpartition(".")[2]: k for k, (path, role) in places.items()}

    def _single(self, source: str, target: str) -> Iterator[Finding]:
        one, two = self._own(0, source), self._own(1, target)
        if one.keys() != two.keys():
            return
        ways = {
            role: relations(tuple(self.specs[k].shape), tuple(self.wanted[two[role]].shape)) for role, k in one.items()
        }
        for n in range(max(map(len, ways.values()), default=0) if self.level else 1):
            if all(ways.values()):
                chosen = {role: rows[min(n, len(rows) - 1)] for role, rows in ways.items()}
                yield Finding(tuple(TensorMove((one[r],), (two[r],), w.source, w.target) for r, w in chosen.items()))

    def _fused(self, sources: Sequence[str], targets: Sequence[str]) -> Iterator[Finding]:
        """Several modules of one side whose tensors are blocks of the tensors of one module of the other."""
        forward = len(targets) == 1
        many = [self._own(0 if forward else 1, m) for m in (sources if forward else targets)]
        single = self._own(1 if forward else 0, (targets if forward else sources)[0])
        small, large = (self.specs, self.wanted) if forward else (self.wanted, self.specs)
        if any(own.keys() != single.keys() for own in many):
            return
        moves = []
        for role, key in single.items():
            shapes = [tuple(small[own[role]].shape) for own in many]
            move = _concatenated(key, tuple(large[key].shape), [own[role] for own in many], shapes, forward)
            if move is None:
                return
            moves.append(move)
        yield Finding(tuple(moves))

    def _reordered(self, source: str, target: str) -> Iterator[Finding]:
        """The same blocks in another order."""
        one, two = self._own(0, source), self._own(1, target)
        rows = {self.specs[k].shape[0] for k in one.values() if self.specs[k].shape}
        if (
            one.keys() != two.keys()
            or len(rows) != 1
            or any(self.specs[k].shape != self.wanted[two[r]].shape for r, k in one.items())
        ):
            return
        for width in (w for w in (2, 3) if min(rows) % w == 0):
            sizes = (min(rows) // width,) * width
            for order in list(permutations(range(width)))[1:]:
                splits = [ChunkedMatch(k, self.specs[k], sizes) for k in one.values()]
                joins = [ChunkedMatch(two[r], self.wanted[two[r]], sizes) for r in one]
                moves = tuple(
                    TensorMove((a.pieces[n],), (piece,))
                    for a, b in zip(splits, joins)
                    for n, piece in zip(order, b.pieces)
                )
                yield Finding(moves, tuple(splits), tuple(joins))


def _concatenated(
    key: str, shape: tuple[int, ...], parts: Sequence[str], shapes: Sequence[tuple[int, ...]], forward: bool
) -> TensorMove | None:
    """The move between parts and the whole that they make along the axis on which their sizes add up."""
    for axis in range(len(shape)):
        sizes = tuple(s[axis] for s in shapes if len(s) == len(shape))
        if len(sizes) < len(shapes) or sum(sizes) != shape[axis]:
            continue
        if any(s[:axis] + s[axis + 1 :] != shape[:axis] + shape[axis + 1 :] for s in shapes):
            continue
        own = "x" if len(set(sizes)) == 1 else "rows:p"
        names = list("abcdfh"[: len(shape)])
        one, two = (f"[{' '.join([*names[:axis], text, *names[axis + 1 :]])}]" for text in (own, f"(p {own})"))
        ragged = sizes if own != "x" else ()
        if forward:
            return TensorMove(tuple(parts), (key,), one, two, "concat", ragged)
        return TensorMove((key,), tuple(parts), two, one, "concat", ragged)
    return None


def _bare(model: nn.Module, specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors that no module without modules inside holds; those under a second name for a module's left out."""
    held = set(owners(model))
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    inside = {id(t) for k, t in state.items() if k.rpartition(".")[0] in held}
    kept = [k for k in specs if k.rpartition(".")[0] not in held and id(state[k]) not in inside]
    return [k for k in kept if state[k].is_floating_point()]
