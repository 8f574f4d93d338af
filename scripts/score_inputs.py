"""Prints how well recipes are found by inputs, on random networks whose names mean nothing and whose order is shuffled.

    python scripts/score_inputs.py [--from N] [--count N] [--wrong]

Both networks of a case compute the same from the same weights. A target tensor is right if its elements come from where
the program says.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from dataclasses import dataclass, field
from math import prod

import torch
from pairs.programs import ProgramNet, drawn_program
from torch import Tensor

import ckptsurgery as cs

Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """What one case gave, in target keys."""

    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    parity: str = "not run"
    seconds: float = 0.0
    fails: str = ""


def numbered(net: ProgramNet, numbers: Tensors) -> Tensors:
    """A network's tensors with the canonical numbers."""
    state = {k: torch.zeros(v.shape, dtype=torch.int64) for k, v in net.state_dict(keep_vars=True).items()}
    for name, (path, (place, count)) in net.canonical().items():
        for key in [k for k in state if k == path or k.startswith(path + ".")]:
            leaf = key[len(path) :]
            rows = state[key].shape[0] // count if state[key].dim() else 0
            wanted = numbers[name + leaf]
            if rows:
                state[key][place * rows : (place + 1) * rows] = wanted
            else:
                state[key] = wanted
    # What is tied has the same numbers under each of its names.
    tensors = net.state_dict(keep_vars=True)
    for key, tensor in tensors.items():
        twins = [k for k, t in tensors.items() if t is tensor and bool(state[k].any())]
        if twins and not bool(state[key].any()):
            state[key] = state[twins[0]]
    return state


def case(seed: int) -> tuple[ProgramNet, ProgramNet, Tensor, Tensors, Tensors, str]:
    """Both networks, what they are called with, their numbers, and what was drawn."""
    draw = random.Random(seed)
    program = drawn_program(draw)
    torch.manual_seed(seed)
    plain = ProgramNet(program, random.Random(1), False, False)
    numbers, at = {}, 1
    shapes = {k: v.shape for k, v in plain.state_dict().items()}
    for name, (path, _) in plain.canonical().items():
        for key, shape in shapes.items():
            if key == path or key.startswith(path + "."):
                numbers[name + key[len(path) :]] = torch.arange(at, at + prod(shape)).reshape(shape)
                at += prod(shape)
    fused = draw.choice([(False, False), (False, False), (True, False), (False, True), (True, True)])
    late = draw.random() < 0.3
    one, two = (ProgramNet(program, random.Random(seed * 7 + n), fused[n], late and n == 1) for n in (0, 1))
    with torch.no_grad():
        for net in (one, two):
            for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
                tensor.copy_(
                    torch.rand(tensor.shape) * 1.5 + 0.05 if tensor.dim() == 1 else torch.randn(tensor.shape) * 0.6
                )
    kinds = ",".join(s.kind for s in program.steps)
    label = f"{kinds}{' fused' * fused[0]} ->{' fused' * fused[1]}{' late' * late}"
    return one, two, program.inputs(seed), numbered(one, numbers), numbered(two, numbers), label


def score(one: ProgramNet, two: ProgramNet, inputs: Tensor, source: Tensors, target: Tensors) -> Outcome:
    """Infer, run on numbered tensors, compare."""
    result = Outcome()
    start = time.process_time()
    try:
        found = cs.suggest(one, two, inputs=inputs)
        made = cs.plan(source, found.recipe).state_dict()
    except Exception:  # a crash of any kind is an outcome
        result.fails, result.open = traceback.format_exc().strip().splitlines()[-1], list(target)
        return result
    result.seconds = time.process_time() - start
    result.parity = "not run" if found.parity is None else "equal" if found.parity.ok else "differs"
    for key, wanted in target.items():
        good = key in made and torch.equal(made[key], wanted)
        (result.right if good else result.open if key not in made else result.wrong).append(key)
    return result


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--wrong", action="store_true", help="list what is wrong or open")
    options = parser.parse_args()
    outcomes = []
    for seed in range(options.first, options.first + options.count):
        *args, label = case(seed)
        one = score(*args)  # type: ignore[arg-type]
        outcomes.append(one)
        print(f"{seed:4} right {len(one.right):3} wrong {len(one.wrong):3} open {len(one.open):3} {one.parity:8}"
              f" {one.seconds:5.2f} s  {label}", flush=True)  # fmt: skip
        if one.fails:
            print(f"     fails: {one.fails}")
        for name in ("wrong", "open") if options.wrong else ():
            print(f"     {name}: {' '.join(getattr(one, name))}")
    right, wrong, left = (sum(len(getattr(o, n)) for o in outcomes) for n in ("right", "wrong", "open"))
    known = right + wrong + left
    print(
        f"{len(outcomes)} cases, {known} tensors: right {right / known:.1%}, wrong {wrong}, open {left};"
        f" whole {sum(not (o.wrong or o.open) for o in outcomes)}; with wrong tensors"
        f" {sum(bool(o.wrong) for o in outcomes)}; failures {sum(bool(o.fails) for o in outcomes)};"
        f" parity not run {sum(o.parity == 'not run' for o in outcomes)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
