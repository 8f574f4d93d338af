"""Which files of a folder are its checkpoint, decided by their names, and by an index where names are not enough.

The one rule for local folders, snapshots of the hub and `hf://org/repo`:

1. Weights are `.safetensors` files, pickles (`.bin .pt .pth .ckpt .pdparams`) and indices of shards of either. What a
   training run keeps beside a model by its name (optimizer, scheduler, scaler, random states, arguments) is left aside,
   and so are `.bin` files without `model` or `adapter` in their names beside an `.onnx` file, which keeps data in them.
2. Two names are the same model when they differ in the suffix, the shard's number, the precision (`.fp16`) or the word
   `pytorch_`: `model.safetensors`, `pytorch_model.bin`, `model.fp16.safetensors`, `model-00001-of-00002.safetensors`.
   Of one model, the plain precision is taken before a variant, safetensors before a pickle, an index for its shards.
   Numbered shards without an index are one checkpoint if none is missing.
3. Other names are other models: `consolidated.safetensors`, `adapter_model.safetensors`, `model_1.safetensors`.
   Beside a model of the usual name, pickles whose names do not contain `model` or `adapter` are left aside, since they
   may be anything; each safetensors file counts.
4. An index of shards says what the checkpoint is: files of other names are left aside, and `doctor` warns of them. An
   index of an unusual name does not say so of a folder that holds a model of the usual name.
5. Files of other formats count where there is nothing else, whether they are read (`.npz`) or named (`.tflite`). The
   numbered files of one model (`x-00001-of-00002.gguf`) are one checkpoint.

Whatever leaves more than one model, or one model in two copies of equal rank, is an error that lists the candidates
with the path that opens each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import shown_keys
from ..formats.numbering import series_of, shard_names
from ..formats.table import suffixes_of_packages
from .recognising_folders import folder_problem

__all__ = ["OTHERS", "PICKLES", "SUFFIXES", "Choice", "Folder", "choose", "weights_in"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams")
SUFFIXES = (".safetensors", *PICKLES)
OTHERS = (".npz", ".npy", ".pt2", ".pkl", ".joblib", ".msgpack", ".h5", ".hdf5", ".keras", ".gguf", ".onnx", ".tflite",
           ".mlmodel", ".nemo", ".ot", ".params", ".mat")  # fmt: skip
_USUAL = frozenset({"model", "diffusion_model"})

_PRECISION = r"fp64|fp32|fp16|bf16|fp8|float32|float16|bfloat16|half|int8|int4|8bit|4bit"
_SUFFIX = r"\.(?:safetensors|bin|pt|pth|ckpt|pdparams)"
_FILE = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<early>{_PRECISION}))?(?P<series>-\d+-of-\d+)?(?:\.(?P<late>{_PRECISION}))?"
    rf"(?P<suffix>{_SUFFIX})"
)
_INDEX = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<early>{_PRECISION}))?(?P<suffix>{_SUFFIX})\.index(?:\.(?P<late>{_PRECISION}))?\.json"
)
_BESIDE = re.compile(
    r"(?:\w*optim(?:izer)?(?:_states?)?|(?:lr_)?sched(?:uler)?|(?:grad_)?scaler|rng_states?|random_states?|"
    r"train(?:ing|er)_(?:args|states?)|(?:data_|random_)?sampler|dataloader|dl_state_dict|custom_checkpoint)(?:[-_.]\w+)*"
)
_UNFINISHED = (".aria2", ".part", ".partial", ".crdownload", ".incomplete", ".download")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to read: an index, one file, the numbered shards of one series, or each file on its own.

    Args:
        index: name of the index; `files` is empty then.
        files: names of the files.
        apart: whether the files are mounted side by side under their stems.
    """

    index: str | None = None
    files: tuple[str, ...] = ()
    apart: bool = False

    @property
    def alone(self) -> str | None:
        """The file that is opened by itself, and finds others by itself; None where several files are joined.

        >>> Choice(files=("x-00001-of-00002.gguf", "x-00002-of-00002.gguf")).alone
        'x-00001-of-00002.gguf'
        """
        names = (self.index,) if self.index else self.files
        if names[0].endswith(".gguf"):  # its header has the number of files
            return names[0]
        return names[0] if len(names) == 1 and len(shard_names(names[0])) < 2 else None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder to choose from, wherever it is.

    Args:
        name: how messages call it: "the folder 'x'".
        place: the path or address that the caller gave.
        names: the files and folders in it.
        below: gives the names one level down, with their folder in front.
        path_of: the path or address that opens one of the names.
        shards_of: the file names in an index.
    """

    name: str
    place: str
    names: Sequence[str]
    below: Callable[[], Sequence[str]]
    path_of: Callable[[str], str]
    shards_of: Callable[[str], Collection[str]]


@dataclass(slots=True)
class _Copy:
    """One copy of a model: in one format and precision."""

    model: str
    stem: str
    variant: str
    suffix: str
    index: str | None = None
    whole: str | None = None
    series: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        shards = [name for names in self.series.values() for name in names]
        return [*([self.whole] if self.whole else []), *shards]

    @property
    def is_pickle(self) -> bool:
        return self.suffix in PICKLES


def weights_in(names: Iterable[str]) -> list[str]:
    """The files among `names` that are weights, without what training keeps beside them.

    >>> weights_in(["model.safetensors", "optimizer.pt", "config.json", "rng_state_0.pth", "training_args.bin"])
    ['model.safetensors']
    """
    present = set(names)
    weights = sorted(name for name in present if name.endswith(SUFFIXES) and not name.startswith("."))
    weights = [name for name in weights if not (name.endswith(".bin") and name[:-3] + "xml" in present)]  # OpenVINO's
    if any(name.endswith(".onnx") for name in present):  # its external data may have any name
        weights = [name for name in weights if not (name.endswith(".bin") and _may_be_anything(name))]
    return [name for name in weights if not _BESIDE.fullmatch(name.rpartition(".")[0])]


def choose(folder: Folder) -> Choice:
    """The files of a folder that are its checkpoint, by the rule at the head of this module.

    Raises:
        CheckpointError: no weights, several models, a download that was not finished, or a folder that belongs to
            another program, which is named then.
    """
    problem = folder_problem(folder.names, folder.below, folder.place, folder.path_of, weights_in(folder.names))
    if problem is not None:
        raise CheckpointError(problem)
    copies = _copies(folder.names)
    if any(copy.model in _USUAL for copy in copies):
        copies = [copy for copy in copies if not (copy.is_pickle and _may_be_anything(copy.stem))]
    models, indexed = {copy.model for copy in copies}, {copy.model for copy in copies if copy.index}
    if len(indexed) == 1 and (indexed <= _USUAL or not models & _USUAL):
        copies = [copy for copy in copies if copy.model in indexed]
    if not copies:
        return _others(folder)
    if len({copy.model for copy in copies}) > 1:
        raise _ambiguous(folder, copies)
    plain = [copy for copy in copies if not copy.variant] or copies
    safe = [copy for copy in plain if not copy.is_pickle] or plain
    if len(safe) > 1:
        raise _ambiguous(folder, safe)
    return _files_of(safe[0], folder)


def _copies(names: Iterable[str]) -> list[_Copy]:
    found: dict[tuple[str, str, str], _Copy] = {}
    indices = [match for match in map(_INDEX.fullmatch, names) if match]
    files = [match for match in map(_FILE.fullmatch, weights_in(names)) if match]
    for match in [*indices, *files]:
        stem, suffix, variant = match["stem"], match["suffix"], match["early"] or match["late"] or ""
        if stem.startswith("."):
            continue
        copy = found.setdefault((stem, variant, suffix), _Copy(stem.replace("pytorch_", ""), stem, variant, suffix))
        name = match.string
        if match.re is _INDEX:
            copy.index = name
        elif match["series"]:
            copy.series.setdefault(series_of(name), []).append(name)
        else:
            copy.whole = name
    return list(found.values())


def _may_be_anything(stem: str) -> bool:
    return "model" not in stem and "adapter" not in stem


def _files_of(copy: _Copy, folder: Folder) -> Choice:
    _refuse_unfinished(copy.files, folder)
    if copy.index:
        if copy.whole and copy.whole not in folder.shards_of(copy.index):
            raise _ambiguous(folder, [copy])
        return Choice(index=copy.index)
    if len(copy.series) + bool(copy.whole) > 1:
        raise _ambiguous(folder, [copy])
    return Choice(files=tuple(copy.files))


def _others(folder: Folder) -> Choice:
    """What to read where there are no weights at the top: a file of another format, or what is there instead."""
    visible = sorted(name for name in folder.names if not name.startswith("."))
    endings = (*OTHERS, *suffixes_of_packages())
    others = [name for name in visible if name.endswith(endings) and not _BESIDE.fullmatch(name.rpartition(".")[0])]
    others = others or [name for name in visible if name.endswith(".xml") and name[:-3] + "bin" in visible]
    if len({series_of(name) for name in others}) == 1:
        return Choice(files=tuple(others))
    inside = others or [name for name in folder.below() if name.endswith((*SUFFIXES, ".index.json"))]
    if inside:
        # One path for each folder: whether that is one checkpoint is asked when it is opened.
        parts = list(dict.fromkeys(name.rpartition("/")[0] or name for name in inside))
        where = "several files of other formats" if others else "its weights in folders below"
        raise CheckpointError(
            Diagnostic("ambiguous-folder", f"{folder.name} holds {where}", folder.place,
                       notes=shown_keys(map(folder.path_of, parts), 12),
                       help=f"open one of them: {folder.path_of(parts[0])!r}")
        )  # fmt: skip
    unfinished = [name for name in folder.names if name.endswith(_UNFINISHED)]
    help = f"finish the download of {unfinished[0]!r} first" if unfinished else "name the file, or another folder"
    notes = tuple(f"there is {name}" for name in shown_keys(visible, 10)) or ("it is empty",)
    raise CheckpointError(
        Diagnostic("nothing-to-read", f"{folder.name} holds no checkpoint", folder.place, notes=notes, help=help)
    )


def _refuse_unfinished(files: Iterable[str], folder: Folder) -> None:
    """Raise for a file that its downloader has not finished: aria2 gives it its full size at the start."""
    present = set(folder.names)
    torn = [name for name in files if any(name + mark in present for mark in _UNFINISHED)]
    if torn:
        text = f"the download of {torn[0]!r} is not finished"
        raise CheckpointError(
            Diagnostic("unfinished-download", text, folder.path_of(torn[0]), notes=shown_keys(torn[1:]),
                       help="finish the download; if the file is complete, remove the downloader's file beside it")
        )  # fmt: skip


def _ambiguous(folder: Folder, copies: Sequence[_Copy]) -> CheckpointError:
    notes, first = [], ""
    for copy in sorted(copies, key=lambda copy: (copy.is_pickle, copy.variant, copy.stem)):
        ways = [copy.index, copy.whole]
        if not copy.index:
            ways += [names[0] if len(names) == 1 else None for names in copy.series.values()]
        for way in filter(None, ways):
            first = first or way
            notes.append(folder.path_of(way) + (" (an index of shards)" if way == copy.index else ""))
        for names in [] if copy.index else copy.series.values():
            if len(names) > 1:
                first = first or names[0]
                text = f"{folder.path_of(names[0])} and {len(names) - 1} more shards, which no index joins"
                notes.append(f"{text}: move the other models out of the folder to open them")
    return CheckpointError(
        Diagnostic(
            "ambiguous-folder",
            f"{folder.name} holds several checkpoints",
            folder.place,
            notes=shown_keys(notes, 12),
            remedies=(
                Remedy("source", folder.path_of(first), "names one"),
                Remedy("by_file", True, 'opens all, with "file stem/" before keys'),
            ),
        )
    )
