"""What is fuzzed: for each reader some sound inputs to start from, and a function that must keep the promise.

The promise: a right result, or a CkptSurgeryError whose diagnostics say what is wrong, where, and what to do; never
another exception. Hanging, memory, and reaching out of the folder are watched from outside (see `mutate.py`).
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from format_seeds import SEEDS
from safetensors.torch import save as safetensors_bytes

import ckptsurgery as cs
from ckptsurgery.catalog import load_recipe
from ckptsurgery.language.calls import parse_call
from ckptsurgery.language.dims import Dims
from ckptsurgery.language.keys import KeyPattern
from ckptsurgery.language.toml import loads
from ckptsurgery.reporting.inspecting import inspection
from ckptsurgery.running.provenance import PROVENANCE, read_provenance
from ckptsurgery.storage.output.transactions import MARK, RECORD

__all__ = ["TARGETS", "BrokenPromise", "Target", "refusal", "walk"]

_SMALL = 1 << 22
_TINY = 1 << 12


class BrokenPromise(AssertionError):
    """An input made a reader do what it promises not to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """One reader: inputs that it accepts, and what to do with any input.

    Args:
        name: for the command line.
        seeds: inputs that are accepted.
        run: reads an input in a folder, and says whether it was accepted.
        compare: holds what was accepted against a reader that is not ours; it may do what ours must not.
        skim: as `run`, but reads headers and small tensors alone, which takes a tenth of the time.
    """

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes, Path], bool]
    compare: Callable[[Path], None] | None = None
    skim: Callable[[bytes, Path], bool] | None = None


def refusal(error: cs.CkptSurgeryError, placed: bool = True) -> None:
    """Check that an error tells what, where, and what to do."""
    if not error.diagnostics:
        raise BrokenPromise("an error without a diagnostic")
    for diagnostic in error.diagnostics:
        if not diagnostic.headline or not diagnostic.code or len(str(diagnostic)) > 200_000:
            raise BrokenPromise(f"an unreadable diagnostic: {diagnostic.code}")
        if diagnostic.code == "unforeseen":
            raise BrokenPromise(f"a reader failed: {diagnostic}") from error.__cause__
        if placed and not (diagnostic.place and diagnostic.help):
            raise BrokenPromise(f"no place or no remedy: {diagnostic}")


def walk(path: Path, write: bool = True) -> None:
    """Use a checkpoint as a user would: headers, ties, every tensor's bytes, a table of it, a copy."""
    with cs.open(path) as checkpoint:
        _read(checkpoint, _SMALL)
        inspection(checkpoint).render()
        json.dumps(inspection(checkpoint).to_json(), default=str)
        if write and checkpoint and checkpoint.nbytes <= _SMALL:
            copy = path.parent / "out" / "copy.safetensors"
            cs.plan(checkpoint, "{key...} -> m.{key...}").save(copy, progress=False)
            try:
                _same(checkpoint, copy)
            finally:
                copy.unlink()


def skim(path: Path) -> None:
    """Read headers, and the bytes of small tensors."""
    with cs.open(path) as checkpoint:
        _read(checkpoint, _TINY)


def _read(checkpoint: cs.Checkpoint, limit: int) -> None:
    """Check where tensors are, and read those that have no more bytes than the limit."""
    sizes = {file: checkpoint.sources[file].size for file in checkpoint.files}
    for key, tensor in checkpoint.items():
        extent = checkpoint.extent(key)
        if extent is not None:
            if not 0 <= extent.offset <= extent.offset + extent.nbytes <= sizes[extent.file]:
                raise BrokenPromise(f"{key!r} lies outside of its file: {extent}")
            if extent.nbytes != tensor.nbytes:
                raise BrokenPromise(f"{key!r} has {tensor.nbytes} bytes and an extent of {extent.nbytes}")
        if tensor.nbytes <= limit and len(checkpoint.read(key)) != tensor.nbytes:
            raise BrokenPromise(f"{key!r} reads short")


def _same(checkpoint: cs.Checkpoint, copy: Path) -> None:
    """A conversion that only renames is the same, element for element."""
    with cs.open(copy) as made:
        if made.keys() != {f"m.{key}" for key in checkpoint}:
            raise BrokenPromise(f"{list(checkpoint)} became {list(made)}")
        for key, tensor in checkpoint.items():
            there = made[f"m.{key}"]
            if there.spec != tensor.spec or bytes(made.read(f"m.{key}")) != bytes(checkpoint.read(key)):
                raise BrokenPromise(f"{key!r} was {tensor}, and became {there}")


def _against_torch(path: Path) -> None:
    """Where torch accepts a file too, it holds each of our tensors, at a path that ends in the key."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, again = (dict(_tensors_in(torch.load(path, weights_only=True), "")) for _ in range(2))
    except Exception:
        return  # theirs to refuse, and in their own words
    if not all(_equal(theirs[name], again[name]) for name in theirs):
        return  # memory that nothing was read into, as where a directory names another disk
    with cs.open(path) as checkpoint:
        for key in checkpoint:
            ours = checkpoint.load(key)
            named = [t for name, t in theirs.items() if name == key or name.endswith(f".{key}")]
            if key == "tensor":
                named += theirs.values()
            if not any(_equal(ours, t) for t in named):
                raise BrokenPromise(f"{key!r} is {ours} here, and {named} to torch")


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in pairs:
            yield from _tensors_in(part, f"{path}.{name}" if path else str(name))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # a tensor of one element keeps its strides through contiguous()
    dense = [torch.empty(t.shape, dtype=t.dtype).copy_(t).flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*dense)


def _of_file(name: str, use: Callable[[Path], None] = walk) -> Callable[[bytes, Path], bool]:
    def run(data: bytes, folder: Path) -> bool:
        path = folder / name
        path.write_bytes(data)
        try:
            use(path)
        except cs.CkptSurgeryError as error:
            refusal(error, placed=not isinstance(error, cs.PlanError))
            return False
        return True

    return run


def _safetensors(data: bytes, folder: Path) -> bool:
    """What is accepted here is accepted by the format's own reader too, and means the same."""
    accepted = _of_file("x.safetensors")(data, folder)
    if accepted:
        with cs.open(folder / "x.safetensors") as checkpoint:
            ours = {key: (*_of_spec(t.spec), bytes(checkpoint.read(key))) for key, t in checkpoint.items()}
            ours = {key: value for key, value in ours.items() if key not in checkpoint.aliases}
        theirs = {key: (v["dtype"], v["shape"], bytes(v["data"])) for key, v in safetensors.deserialize(data)}
        if ours != theirs:
            raise BrokenPromise(f"read as {ours}, by safetensors as {theirs}")
    return accepted


def _of_spec(spec: cs.TensorSpec) -> tuple[str, list[int]]:
    return spec.dtype, list(spec.shape)


def _doctor(data: bytes, folder: Path) -> bool:
    """A diagnosis is never an error, and can be told in both forms."""
    path = folder / "x.bin"
    path.write_bytes(data)
    found = cs.doctor(path, progress=False)
    str(found).encode()
    json.dumps(found.to_json())
    for finding in found.findings:
        refusal(cs.CkptSurgeryError(finding))
    return found.tensors > 0


def _mounted(data: bytes, folder: Path) -> bool:
    """The same file in a folder that is opened file by file, and under a prefix."""
    inside = folder / "files"
    inside.mkdir(exist_ok=True)
    (inside / "a.safetensors").write_bytes(safetensors_bytes({"w": torch.ones(2)}))
    (inside / "b.bin").write_bytes(data)
    accepted = True
    prefixed = {"a.": inside / "a.safetensors", "b.": inside / "b.bin"}
    for source, by_file in ((inside, True), (prefixed, False)):
        try:
            with cs.open(source, by_file=by_file) as checkpoint:
                checkpoint.state_dict()
                inspection(checkpoint).render()
        except cs.CkptSurgeryError as error:
            refusal(error)
            accepted = False
    return accepted


def _record(data: bytes, folder: Path) -> bool:
    """The record of an interrupted save, which says which files of a folder are the checkpoint."""
    inside = folder / "recorded"
    inside.mkdir(exist_ok=True)
    for name in ("model.safetensors", f"{MARK}1-00000000"):
        (inside / name).write_bytes(safetensors_bytes({"w": torch.ones(2)}))
    (inside / RECORD).write_bytes(data)
    try:
        walk(inside, write=False)
        json.dumps(cs.doctor(inside, progress=False).to_json())
    except cs.CkptSurgeryError as error:
        refusal(error)
        return False
    return True


def _provenance(text: str) -> None:
    source = cs.open({"w": torch.ones(2, 2)})
    source.metadata[PROVENANCE] = text
    headers, recipe, target, asked = read_provenance(source)
    cs.plan(headers, recipe, target, config=asked.config, dtype=asked.dtype).inverse(source)


def _of_text(use: Callable[[str], object]) -> Callable[[bytes, Path], bool]:
    def run(data: bytes, folder: Path) -> bool:
        try:
            use(data.decode("utf-8", "surrogateescape"))
        except cs.CkptSurgeryError as error:
            refusal(error, placed=False)
            return False
        return True

    return run


def _index(data: bytes, folder: Path) -> bool:
    for shard in ("a", "b"):
        (folder / f"{shard}.safetensors").write_bytes(safetensors_bytes({f"{shard}.w": torch.ones(2)}))
    return _of_file("model.safetensors.index.json")(data, folder)


def _config(data: bytes, folder: Path) -> bool:
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"w": torch.ones(12, 2)}))
    recipe = cs.Recipe(["w [(h r) d] -> {h}.w [r d]"], dims={"h": "config.a.b ?? config.heads * 2 // config.g"})
    try:
        with cs.open(folder) as checkpoint:
            cs.plan(checkpoint, recipe)
    except cs.CkptSurgeryError as error:
        refusal(error, placed=False)
        return False
    return True


def _recipe(data: bytes, folder: Path) -> bool:
    path = folder / "recipe.toml"
    path.write_bytes(data)
    source = {f"h.{i}.{p}.weight": cs.TensorSpec([4, 4], "F32") for i in range(3) for p in ("q", "k", "fc")}
    (folder / "s.safetensors").write_bytes(safetensors_bytes({k: torch.zeros(s.shape) for k, s in source.items()}))
    try:
        recipe = load_recipe(path)
        text = recipe.dumps()
        if loads(text) != recipe:
            raise BrokenPromise("a recipe's text gives another recipe")
        cs.plan(folder / "s.safetensors", recipe)
    except cs.CkptSurgeryError as error:
        refusal(error, placed=False)
        return False
    return True


def _rule(text: str) -> None:
    rule = cs.Rule.parse(text)
    if cs.Rule.parse(str(rule)) != rule:
        raise BrokenPromise(f"{text!r} is spelt {rule!s}, which is another rule")


def _pattern(text: str) -> None:
    pattern, _, keys = text.partition("\n")
    parsed = KeyPattern.parse(pattern).bind({"n": 3, "three": 3})
    for key in keys.split("\n"):
        parsed.match(key)


def _dims(text: str) -> None:
    lines = [line.partition("=") for line in text.split("\n")]
    dims = Dims({name.strip(): value.strip() for name, _, value in lines}, {"a": 3, "b": [2, 4], "c": {"d": None}})
    for name, _, _ in lines:
        dims.get(name.strip())


def _torch_zip(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _deflated(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return buffer.getvalue()


def _npz(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, w=numpy.ones((2, 3), "f4"), v=numpy.asfortranarray(numpy.arange(6).reshape(2, 3).astype(">i2")))
    return buffer.getvalue()


def _tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(6.0)
    return {
        "a.w": whole.reshape(2, 3),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "t": whole[2:5],
        "e": torch.ones(0),
    }


def _header(rows: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + data


_STATE = _tensors()
_TRAINING = {
    "model": OrderedDict(_STATE),
    "epoch": 3,
    "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
}
_ARRAYS = {
    "fc.weight": numpy.ones((2, 3), "f4"),
    "bn": ("bn_0", numpy.arange(4, dtype=">i8")),
    "StructuredToParameterName@@": {},
}
_RECIPE = """schema = 1
summary = "x"
rules = ["h.{i}.{p:q,k}.weight [(a b) c] -> l.{i}.{p}.weight [(b a) c] | cast(bf16)", "? x -> y"]
drop = ["h.{i}.fc.weight"]
[dims]
a = 2
[names.p]
q = "query"
k = "key"
[[scope]]
source = "m."
target = "n."
rules = ["? {r...} -> {r...}"]
"""

_INDEX = json.dumps(
    {"metadata": {"total_size": 16, "t": "a.w"}, "weight_map": {"a.w": "a.safetensors", "b.w": "b.safetensors"}}
).encode()
_DENSE = {key: value.contiguous() for key, value in _STATE.items() if key != "t"}
_PACKED = _header({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\x12")
_RULES = (
    b"? a.{i}.{p:q,k} [(h:p d) x?], b.{i} | add(1) -> c.{i+1} [x? (d h:p)] | cast(bf16)",
    b'r{r}/x.{i:0..n-1}.{rest...} -> y.{(s b)}.{rest...} | f(a=[1, 2.5], b="x", c={d=1})',
)
_PATTERNS = (
    b"a.{i}.{p:q,k}_x.{rest...}.w\na.1.q_x.b.c.w\na.x.k_x.w.w",
    b"{i:0..3}.{j+2}.{3-k}\n1.4.2\n3.2.9",
    b"{a}x{b}x{c}\nxxxxxxxxxxxxxxxxxxx",
)

_SAFE = (safetensors_bytes(_DENSE, {"format": "pt", "tied": "b"}), _PACKED, _header({}, b""))
_ZIPS = tuple(map(_torch_zip, (_STATE, _TRAINING)))
_LEGACY = (_torch_zip(_TRAINING, _use_new_zipfile_serialization=False),)
_PICKLES = tuple(pickle.dumps(v, n) for v, n in ((_ARRAYS, 4), (_ARRAYS, 2), (_STATE, 4)))
_GGUF = (Path(__file__).parents[2] / "tests" / "data" / "formats" / "all.gguf").read_bytes()
_RECORD = json.dumps(
    {"hidden": [], "renamed": [[f"{MARK}1-00000000", "model.safetensors"]], "removed": ["old.safetensors"]}
).encode()
_PROVENANCE = tuple(
    json.dumps(
        {"version": "1", "recipe": 'rules = ["v [a b] -> w [b a]"]', "sources": [], "headers": {"v": ["F32", 2, 2]},
         "target": target, "target_ties": [["w", "x"]], "config": {"n": 2}, "dims": {}, "dtype": "lossless"}
    ).encode()
    for target in (None, {"w": ["F32", 2, 2]})
)  # fmt: skip

TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", _SAFE, _safetensors, skim=_of_file("x.safetensors", skim)),
        Target("index", (_INDEX,), _index),
        Target(
            "torch-zip", _ZIPS, _of_file("x.pt"), lambda folder: _against_torch(folder / "x.pt"), _of_file("x.pt", skim)
        ),
        Target(
            "torch-legacy",
            _LEGACY,
            _of_file("x.pth"),
            lambda folder: _against_torch(folder / "x.pth"),
            _of_file("x.pth", skim),
        ),
        *(
            Target(name, seeds, _of_file(file), skim=_of_file(file, skim))
            for name, (file, seeds) in {
                "pickle": ("x.pkl", _PICKLES),
                "npz": ("x.npz", tuple(map(_npz, (numpy.savez, numpy.savez_compressed)))),
                "gguf": ("x.gguf", (_GGUF,)),
                **SEEDS,
            }.items()
        ),
        Target("doctor", (*_ZIPS, *_LEGACY, *_PICKLES, *_SAFE), _doctor),
        Target("mounts", (*_ZIPS, *_LEGACY, *_PICKLES, *_SAFE), _mounted),
        Target("record", (_RECORD,), _record),
        Target("provenance", _PROVENANCE, _of_text(_provenance)),
        Target("recipe", (_RECIPE.encode(),), _recipe),
        Target("config", (b'{"a": {"b": null}, "heads": 3, "g": 2, "l": [1, 2]}', b'{"a": {"b": 4}}'), _config),
        Target("rule", _RULES, _of_text(_rule)),
        Target("call", (b"f(1, -2.5e3, 'x\\'', a=[b, [c]], d={e=1, f=none}, g=true)",), _of_text(parse_call)),
        Target("pattern", _PATTERNS, _of_text(_pattern)),
        Target(
            "dims",
            (b"g = config.c.d ?? config.a * 2\nh = g // 2 + (1 - 3)\nl = config.b * 2", b"a = b\nb = a"),
            _of_text(_dims),
        ),
    )
}
