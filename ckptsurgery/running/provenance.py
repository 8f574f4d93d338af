"""Where an output came from, kept in its own metadata; and the way back that this makes possible."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, PlanError
from ..planning.options import PlanOptions
from ..planning.plan import Plan
from ..planning.recipe_data import data_as_names, data_given
from ..planning.record import Target
from ..specs import TensorSpec, shape_problem
from ..storage.checkpoint import Checkpoint
from ..storage.json_text import refuse_brackets
from ..storage.sources.byte_source import LocalFile

__all__ = ["PROVENANCE", "headers_as_recorded", "provenance_of", "read_provenance"]

PROVENANCE = "ckptsurgery.provenance"
_BLOCK = 1 << 22


def provenance_of(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata that tells what was done, from what, and by which version; reads the source's files to hash them.

    Raises:
        PlanError: the plan has no recipe that could be written down.
    """
    if plan.recipe is None:
        raise PlanError(
            Diagnostic("no-recipe", "a plan that goes back has no recipe to write down", help="save without provenance")
        )
    from importlib.metadata import version

    recipe, numbers = data_as_names(plan.recipe)
    told = {
        "version": version("ckptsurgery"),
        "recipe": recipe.dumps(),
        "data": numbers,
        "sources": [_source(checkpoint, file) for file in checkpoint.files],
        "headers": _told(plan.source),
        "target": None if plan.target is None else _told(plan.target.specs),
        "target_ties": [] if plan.target is None else [list(names) for names in plan.target.ties],
        "config": plan.options.config,
        "dims": dict(plan.options.dims),
        "dtype": plan.options.dtype,
        "source_ties": [list(names) for names in plan.options.ties],
    }
    try:
        return {PROVENANCE: json.dumps(told, separators=(",", ":"), ensure_ascii=False)}
    except TypeError as error:
        raise PlanError(
            Diagnostic("not-text", f"what was planned has no text: {error}", help="save without provenance")
        ) from None


def _told(specs: Mapping[str, TensorSpec]) -> dict[str, list[Any]]:
    return {key: [spec.dtype, *spec.shape] for key, spec in specs.items()}


def _source(checkpoint: Checkpoint, file: str) -> dict[str, object]:
    """What identifies a file: its hash, or what its server says of it where only a part of it was fetched."""
    source = checkpoint.sources.get(file)
    if source is None or isinstance(source, LocalFile):
        return _hashed(Path(file))
    return {"file": file, "nbytes": source.size, "identity": list(map(str, source.identity))}


def _hashed(path: Path) -> dict[str, object]:
    import hashlib  # its OpenSSL takes milliseconds that no other save has to wait

    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        return {"file": path.name, "nbytes": file.tell(), "blake2b": digest.hexdigest()}


def read_provenance(checkpoint: Checkpoint) -> tuple[dict[str, TensorSpec], Any, Target | None, PlanOptions]:
    """The source's headers, the recipe, the target and what else was asked for, from an output's metadata.

    Raises:
        CheckpointError: there is no provenance in it, or none that can be understood.
    """
    from ..language.toml import loads

    text = checkpoint.metadata.get(PROVENANCE)
    if text is None:
        raise CheckpointError(
            Diagnostic(
                "no-provenance",
                "nothing in it tells what it was made from, so there is no way back without a recipe",
                checkpoint.source,
                help="go back by the inverse of the recipe that made it; convert with provenance the next time",
            )
        )
    try:
        refuse_brackets(text)
        told = json.loads(text)
        recipe = data_given(loads(told["recipe"], f"{checkpoint.source} (provenance)"), told.get("data", ()))
        target = told["target"]
        asked = PlanOptions(
            told["config"], told["dims"], told["dtype"], [tuple(t) for t in told.get("source_ties", ())]
        )
        kinds = isinstance(asked.config, dict | None), isinstance(asked.dims, dict), isinstance(asked.dtype, str)
        if not all(kinds):
            raise TypeError("config, dims or dtype is something else")
        wanted = None if target is None else Target(_specs(target), [tuple(names) for names in told["target_ties"]])
        return _specs(told["headers"]), recipe, wanted, asked
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(_bad(f"cannot be understood: {error}", checkpoint)) from None
    except CkptSurgeryError as error:
        raise CheckpointError([_bad("cannot be understood", checkpoint), *error.diagnostics]) from error


@contextmanager
def headers_as_recorded(checkpoint: Checkpoint) -> Iterator[None]:
    """What fails inside is the fault of a provenance that does not fit itself, and is told so first."""
    try:
        yield
    except CkptSurgeryError as error:
        text = "does not fit itself: its recipe does not plan its headers"
        raise CheckpointError([_bad(text, checkpoint), *error.diagnostics]) from error


def _bad(what: str, checkpoint: Checkpoint) -> Diagnostic:
    text = f"the provenance in its metadata {what}"
    help = "was it edited? go back by the inverse of the recipe that made it"
    return Diagnostic("bad-provenance", text, checkpoint.source, help=help)


def _specs(told: Mapping[str, list[Any]]) -> dict[str, TensorSpec]:
    specs = {key: TensorSpec(shape, dtype) for key, (dtype, *shape) in told.items()}
    absurd = next((text for spec in specs.values() if (text := shape_problem(spec.shape, 128))), None)
    if absurd:
        raise ValueError(f"a tensor {absurd}")
    return specs
