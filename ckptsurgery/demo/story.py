"""The demo itself, step by step through the public face. Every number it prints is measured while it runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ckptsurgery as cs

from ..reporting.inspecting import inspection
from ..tables.columns import hanging
from .data import Digits, load_digits
from .models import Pretrained, Student
from .training import accuracy, one_thread, seeded, train

if TYPE_CHECKING:
    from ..language.recipe import Recipe

__all__ = ["RECIPE", "tell"]

RECIPE = """\
schema = 1
summary = "the first authors' layout -> ours"

[[scope]]
source = "module."          # as DistributedDataParallel saves it
rules = [
  "pos [1 n d] -> embed.positions.weight [n d]",
  "{e:patch,norm}.{l} -> {e:embed.patches,encoder.norm}.{l}",
  "blocks.{n}.attn.qkv.{l} [(p d) ...] -> encoder.layers.{n}.attention.{p:query,key,value}.{l} [d ...]",
  "blocks.{n}.{m}.{l} -> encoder.layers.{n}.{m}.{l}",
]
drop = ["head.{l}"]         # it knows the old digits

[scope.names.m]
"attn.proj" = "attention.output"
norm1 = "attention_norm"
norm2 = "mlp_norm"
fc1 = "mlp.up"
fc2 = "mlp.down"

[scope.init]
"classifier.weight" = "trunc_normal(std=0.02)"
"classifier.bias" = "zeros"
"""

OLD, NEW = range(6), range(6, 10)
OLD_STEPS = 600
LABELS, DRAWS, STEPS = 5, 3, 200
_WIDTH = 77  # of a terminal of 80 columns, less the indent

Say = Callable[[str], None]


NEXT = """
What to try next:
  ckptsurgery inspect FILE          show what is in a checkpoint of yours
  ckptsurgery suggest OURS THEIRS   infer the rules between two layouts
  docs/tutorials/first-load.md      read the first tutorial"""


def tell(folder: str | None = None, seed: int = 0, quiet: bool = False) -> dict[str, object]:
    """Train, save, inspect, plan, load, prove, compare; what was measured comes back as plain data.

    Args:
        folder: where to keep the checkpoint and the recipe; a temporary one by default.
        seed: of everything that is drawn.
        quiet: print nothing.
    """
    say: Say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place,
        one_thread(),
    ):
        where = Path(place)
        where.mkdir(parents=True, exist_ok=True)
        old, path, known = _pretrain(where, seed, say)
        _inspect(path, say)
        recipe = _plan(path, where, say)
        difference = _load(path, recipe, old, seed, say)
        outcome = _compare(path, recipe, seed, say)
    outcome = {"pretrained_accuracy": known, "largest_difference": difference, **outcome}
    say(f"\n{time.perf_counter() - started:.0f} seconds in all.")
    say(NEXT)
    return outcome


def _pretrain(where: Path, seed: int, say: Say) -> tuple[Pretrained, Path, float]:
    say("A transfer in five steps, about half a minute on two cores.\n")
    say(f"1. Somebody trains a small transformer on the digits {OLD.start} to {OLD.stop - 1} and saves it.\n")
    train_set, test_set = load_digits().of(OLD).halves()
    model = seeded(lambda: Pretrained(len(OLD)), seed)
    optimizer = train(model, train_set, OLD_STEPS, seed)
    known = accuracy(model, test_set)
    path = where / "last.pt"
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"step": OLD_STEPS, "model": state, "optimizer": optimizer.state_dict()}, path)
    say(f"   After {len(train_set)} images it reads {known:.1%} of {len(test_set)} others right. Saved as {path.name}.")
    return model, path, known


def _inspect(path: Path, say: Say) -> None:
    say(f"\n2. What is in it?   ckptsurgery inspect {path.name}\n")
    with cs.open(path) as checkpoint:
        say(_indented(inspection(checkpoint).render(width=_WIDTH)))


def _plan(path: Path, where: Path, say: Say) -> Recipe:
    say("\n3. Our own model has other names, query, key and value apart, and another")
    say("   head. The recipe, ours.toml:\n")
    say("\n".join(f"   {line}".rstrip() for line in RECIPE.rstrip().split("\n")))  # to be copied
    (where / "ours.toml").write_text(RECIPE, encoding="utf-8")
    recipe = cs.load_recipe(where / "ours.toml")
    say("\n   The plan, from headers alone:\n")
    say(_indented(str(cs.plan(path, recipe, target=Student(len(NEW))))))
    return recipe


def _load(path: Path, recipe: Recipe, old: Pretrained, seed: int, say: Say) -> float:
    say("\n4. Into the new architecture. Its head is drawn anew, and the report lists it:\n")
    say('   cs.load_into(model, "last.pt", "ours.toml")\n')
    model = seeded(lambda: Student(len(NEW)), seed)
    say(_indented(str(cs.load_into(model, path, recipe, seed=seed))))
    images = load_digits().images
    with torch.no_grad():
        difference = float((model.features(images) - old.eval().features(images)).abs().max())
    say(f"\n   Features of the old and the new model differ by {difference:.1e} at most,")
    say(f"   over {len(images)} images.")
    return difference


def _compare(path: Path, recipe: Recipe, seed: int, say: Say) -> dict[str, object]:
    say(
        f"\n5. New task: the digits {NEW.start} to {NEW.stop - 1}, with {LABELS} labelled images of each.\n"
        f"   {DRAWS} draws, {STEPS} steps each.\n"
    )
    labelled, test_set = load_digits().of(NEW).halves()
    say(f"   {'':8}{'from scratch':>14}{'transferred':>14}     (accuracy on {len(test_set)} other images)")
    scratch, transferred = [], []
    for draw in range(DRAWS):
        few = labelled.few(LABELS, torch.Generator().manual_seed(seed + draw))
        start = seeded(lambda: Student(len(NEW)), seed + draw)
        scratch.append(_fine_tuned(deepcopy(start), few, test_set, seed + draw))
        cs.load_into(start, path, recipe, seed=seed + draw)
        transferred.append(_fine_tuned(start, few, test_set, seed + draw))
        say(f"   draw {draw + 1:<3}{scratch[-1]:>14.1%}{transferred[-1]:>14.1%}")
    means = sum(scratch) / DRAWS, sum(transferred) / DRAWS
    say(f"   {'mean':<8}{means[0]:>14.1%}{means[1]:>14.1%}")
    return {
        "from_scratch": scratch,
        "transferred": transferred,
        "mean_from_scratch": means[0],
        "mean_transferred": means[1],
    }


def _fine_tuned(model: Student, few: Digits, test_set: Digits, seed: int) -> float:
    train(model, few, STEPS, seed)
    return accuracy(model, test_set)


def _indented(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in hanging(text.rstrip(), _WIDTH).split("\n"))
