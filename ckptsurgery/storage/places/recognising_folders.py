"""Folders that other programs lay out: recognised by the names in them, with the path or the line that leads on."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ...errors import Diagnostic
from ...wording import shown_keys
from ..formats.recognising import TF_VARIABLES

__all__ = ["FOLDERS", "FolderKind", "Names", "folder_problem"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".index.json")


@dataclass(frozen=True, slots=True)
class Names:
    """The names in a folder, and those one level down with their folder in front."""

    here: frozenset[str]
    below: Callable[[], Sequence[str]]

    def folders_with(self, *endings: str) -> list[str]:
        """The folders below that hold a file with one of the endings."""
        return list(dict.fromkeys(name.rpartition("/")[0] for name in self.below() if name.endswith(endings)))

    def matching(self, pattern: str) -> list[str]:
        """The names here that a regular expression matches whole, in order."""
        return sorted(name for name in self.here if re.fullmatch(pattern, name))


@dataclass(frozen=True, slots=True)
class FolderKind:
    """A layout of folder.

    Args:
        text: what such a folder is, after "is".
        parts: the names in it that can be opened instead, if it is one; None if it is not.
        remedy: what to paste; `{path}` stands for the folder, `{part}` for the first of the parts, `{prefixes}` for a
            mapping of all parts under prefixes of their own.
        always: whether it counts also where weights are at the top of the folder.
    """

    text: str
    parts: Callable[[Names], Collection[str] | None]
    remedy: str
    always: bool = False


def _zero(names: Names) -> list[str] | None:
    states = r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt"
    if not names.matching(states) and not names.matching(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"):
        return None
    return names.matching(r"mp_rank_\d+_model_states\.pt")  # none in stage 3, where no file holds whole parameters


def _zero_root(names: Names) -> list[str] | None:
    if "zero_to_fp32.py" not in names.here and not names.folders_with("_optim_states.pt"):
        return None
    return names.folders_with("_model_states.pt") or None


def _megatron(names: Names) -> list[str] | None:
    ranks = [name for name in names.below() if re.fullmatch(r"mp_rank_\d+(_\d+)*/[^/]+\.pt", name)]
    return [name for name in ranks if "optim.pt" not in name] or None


def _megatron_root(names: Names) -> list[str] | None:
    return names.matching(r"iter_\d+|release") or None if "latest_checkpointed_iteration.txt" in names.here else None


def _cached_repo(names: Names) -> list[str] | None:
    if not {"snapshots", "blobs"} <= names.here and not {"snapshots", "refs"} <= names.here:
        return None
    return [name for name in names.below() if name.startswith("snapshots/")] or None


def _hub_cache(names: Names) -> list[str] | None:
    return names.matching(r"models--.+") or None


def _tensorflow(names: Names) -> list[str] | None:
    indices = names.matching(r".*\.index")
    data = names.matching(r".*\.data-\d+-of-\d+")
    return [] if indices and data else None


def _saved_model(names: Names) -> list[str] | None:
    return [] if "saved_model.pb" in names.here else None


def _orbax(names: Names) -> list[str] | None:
    marks = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "_sharding"}
    return [] if len(marks & names.here) > 1 else None


def _orbax_step(names: Names) -> list[str] | None:
    return [] if "_CHECKPOINT_METADATA" in names.here and names.folders_with("/_METADATA") else None


def _orbax_root(names: Names) -> list[str] | None:
    steps = (name for name in names.below() if name.endswith("/_CHECKPOINT_METADATA"))
    return [] if any(name.partition("/")[0].rpartition("_")[2].isdecimal() for name in steps) else None


def _zarr(names: Names) -> list[str] | None:
    return [] if {".zgroup", ".zarray", "zarr.json"} & names.here else None


def _mlpackage(names: Names) -> list[str] | None:
    return [] if {"Manifest.json", "Data"} <= names.here else None


_ONE = "open one of them: {part}"
_OF_ORBAX = "pickle.dump(jax.tree.map(numpy.asarray, t), open('new.pkl', 'wb'))"

FOLDERS: dict[str, FolderKind] = {
    "zero-stage-3": FolderKind("a checkpoint of DeepSpeed, ZeRO stage 3, whose parameters are cut up among the ranks",
        lambda names: [] if _zero(names) == [] else None,
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
        "import pathlib; p = pathlib.Path({path}); convert(str(p.parent), 'new_folder', tag=p.name)", always=True),
    "zero": FolderKind("a checkpoint of DeepSpeed, ZeRO stage 1 or 2: the 16-bit model beside parts of the optimizer",
        _zero, "open({part}, subtree='module')", always=True),
    "zero-root": FolderKind("the folder of a DeepSpeed run, with a folder for each step", _zero_root, _ONE),
    "megatron": FolderKind("a checkpoint of Megatron, with a folder for each rank", _megatron,
        "open({prefixes}), and join the ranks by a rule"),
    "megatron-root": FolderKind("the folder of a Megatron run, with a folder for each step", _megatron_root, _ONE),
    "hub-repo": FolderKind("a repository in the hub's cache", _cached_repo, _ONE),
    "hub-cache": FolderKind("a cache of the hub", _hub_cache, "open a repository in it: {repo}"),
    "saved-model": FolderKind("a TensorFlow SavedModel", _saved_model,
        TF_VARIABLES.replace("{inside}", " + '/variables/variables'")),
    "tensorflow": FolderKind("a TensorFlow checkpoint", _tensorflow, TF_VARIABLES.replace("{inside}", "")),
    "orbax": FolderKind("an orbax checkpoint (JAX)", _orbax,
        "import jax, numpy, os, pickle, orbax.checkpoint as ocp; t = ocp.PyTreeCheckpointer().restore(os.path.abspath("
        "{path})); " + _OF_ORBAX),
    "orbax-step": FolderKind("a step of an orbax run (JAX)", _orbax_step,
        "import glob, jax, numpy, os, pickle, orbax.checkpoint as ocp; m = glob.glob(os.path.abspath({path}) + "
        "'/*/_METADATA'); t = ocp.PyTreeCheckpointer().restore(os.path.dirname(m[0])); " + _OF_ORBAX),
    "orbax-root": FolderKind("the folder of an orbax run (JAX), with a folder for each step", _orbax_root,
        "import jax, numpy, os, pickle, orbax.checkpoint as ocp; m = ocp.CheckpointManager(os.path.abspath({path})); "
        "t = m.restore(m.latest_step(), args=ocp.args.StandardRestore()); " + _OF_ORBAX),
    "zarr": FolderKind("a zarr store", _zarr,
        "import pickle, zarr; z = zarr.open({path}, mode='r'); a = [('tensor', z)] if hasattr(z, 'shape') else "
        "[m for m in z.members(None) if hasattr(m[1], 'shape')]; "
        "pickle.dump({k: v[...] for k, v in a}, open('new.pkl', 'wb'))"),
    "mlpackage": FolderKind("a Core ML package", _mlpackage,
        "import coremltools, pickle; m = coremltools.models.MLModel({path}); pickle.dump({k: w.val for k, w in "
        "coremltools.optimize.coreml.get_weights_metadata(m, 0).items()}, open('new.pkl', 'wb'))"),
}  # fmt: skip
"""Kind of a folder -> how it is recognised, what it is, and the way on; the first that fits counts."""


def folder_problem(
    names: Sequence[str],
    below: Callable[[], Sequence[str]],
    place: str,
    path_of: Callable[[str], str],
    weights: Sequence[str] = (),
) -> Diagnostic | None:
    """The diagnostic for a folder of another program; None for all other folders.

    Args:
        names: the names in the folder.
        below: gives the names one level down, with their folder in front.
        place: the folder's path or address.
        path_of: the path or address that opens one of the names.
        weights: the files at the top that could be opened themselves.
    """
    known: list[str] = []

    def once() -> list[str]:
        if not known:
            known.extend(below())
        return known

    found = Names(frozenset(names), once)
    for code, kind in FOLDERS.items():
        parts = None if weights and not kind.always else kind.parts(found)
        if parts is None:
            continue
        own = [] if set(weights) & set(parts) or code == "zero-stage-3" else weights
        shown = [path_of(name) for name in [*own, *sorted(parts)]]
        help = kind.remedy.replace("{path}", repr(place))
        if shown:
            prefixes = {_prefix(name): path_of(name) for name in [*own, *sorted(parts)]}
            repo = sorted(parts)[0].removeprefix("models--").replace("--", "/") if parts else ""
            help = help.replace("{part}", repr(path_of(sorted(parts)[0]) if parts else shown[0]))
            help = help.replace("{prefixes}", repr(prefixes)).replace("{repo}", repr(f"hf://{repo}"))
        text = f"{place!r} is {kind.text}"
        code = "ambiguous-folder" if shown else "unsupported-format"
        return Diagnostic(code, text, place, notes=shown_keys(shown, 12), help=help)
    return None


def _prefix(name: str) -> str:
    return f"{name.rpartition('/')[0]}/" if "/" in name else "" if name.endswith(_WEIGHTS) else f"{name}/"
