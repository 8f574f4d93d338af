"""Formats of other programs: by which bytes, names or addresses each is recognised, and the way from it to here.

One table for each place where such a thing is met: the first bytes of a file, the names in a zip file, the names in a
folder, the scheme of an address. A remedy is a line to paste, with the caller's own path in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError, Diagnostic

__all__ = [
    "HEADS",
    "TF_VARIABLES",
    "ZIPS",
    "Foreign",
    "address_problem",
    "head_problem",
    "is_msgpack_map",
    "is_onnx",
    "tensorflow_problem",
    "zip_problem",
]


@dataclass(frozen=True, slots=True)
class Foreign:
    """One format of another program.

    Args:
        code: a short, stable name.
        text: what it is, after "is".
        remedy: what to paste; `{path}` stands for the file's or folder's path, quoted.
        shown: whether the first bytes are shown.
    """

    code: str
    text: str
    remedy: str
    shown: bool = False

    def problem(self, path: str, notes: tuple[str, ...] = ()) -> Diagnostic:
        """The diagnostic for a file or folder of this format."""
        text = f"{path!r} is {self.text}, which is not read here"
        return Diagnostic("unsupported-format", text, path, notes, help=self.remedy.replace("{path}", repr(path)))


# The first bytes of a file


def _magic(*marks: bytes, at: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(marks, at)


def is_msgpack_map(head: bytes) -> bool:
    r"""Whether it is a mapping that begins with a text key, however few keys it has.

    >>> is_msgpack_map(b"\x81\xa3a\nb\xc7"), is_msgpack_map(b"\x81\xa1\x00")
    (True, False)
    """
    start = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0) if head else 0
    kind = head[start] if 0 < start < len(head) else 0
    skip = {0xD9: 2, 0xDA: 3, 0xDB: 5}.get(kind, 1 if 0xA0 < kind <= 0xBF else 0)
    length = kind & 0x1F if skip == 1 else int.from_bytes(head[start + 1 : start + skip], "big")
    return skip > 0 and length > 0 and _is_text(head[start + skip : start + skip + min(length, 200)])


def _is_text(key: bytes) -> bool:
    """Whether it is text without control characters but for white space; its end may be cut."""
    text = key.decode("utf-8", "ignore")
    return len(key) - len(text.encode()) < 4 and bool(text) and all(c >= " " or c in "\t\n\r" for c in text)


def _is_printable(text: bytes) -> bool:
    try:
        return bool(text) and text.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _protobuf_second(head: bytes) -> tuple[int, int, bytes] | None:
    """Of a message that begins with a small version number: that number, the tag that follows, and what it holds."""
    if len(head) < 6 or head[0] != 0x08 or not 0 < head[1] < 0x40:
        return None
    if head[3] >= 0x80:
        return head[1], head[2], head[4:]
    return head[1], head[2], head[4 : 4 + head[3]]


def is_onnx(head: bytes) -> bool:
    """Return whether a model of ONNX begins: a version, then a graph, imports, or the name of a producer."""
    second = _protobuf_second(head)
    if second is None:
        return False
    _, tag, inner = second
    return tag in (0x3A, 0x42) or (tag in (0x12, 0x1A, 0x22) and _is_printable(inner))


def _is_saved_model(head: bytes) -> bool:
    second = _protobuf_second(head)
    return second is not None and second[:2] == (1, 0x12) and not is_onnx(head)


def _is_coreml(head: bytes) -> bool:
    second = _protobuf_second(head)
    return second is not None and second[0] < 16 and second[1] == 0x12 and not is_onnx(head)


def _is_mindspore(head: bytes) -> bool:
    """Return whether a message begins with a message that begins with a name and goes on with a tensor."""
    if head[:1] != b"\x0a":
        return False
    start = next((n for n in range(1, 6) if head[n : n + 1] < b"\x80"), 6) + 1
    end = start + 2 + (head[start + 1] if start + 1 < len(head) else 0)
    return (
        head[start : start + 1] == b"\x0a" and _is_printable(head[start + 2 : end]) and head[end : end + 1] == b"\x12"
    )


TF_VARIABLES = (
    "import tensorflow, pickle; r = tensorflow.train.load_checkpoint({path}{inside}); "
    "pickle.dump({k: r.get_tensor(k) for k in r.get_variable_to_shape_map()}, open('new.pkl', 'wb'))"
)
_TF_PART = re.compile(r"(.+)\.(?:index|data-\d{5}-of-\d{5})", re.DOTALL)
_TENSORFLOW = Foreign("tensorflow", "a TensorFlow checkpoint", TF_VARIABLES.replace("{inside}", ""))


def tensorflow_problem(path: str, exists: Callable[[str], bool]) -> Diagnostic | None:
    """Return the diagnostic for the name of a TensorFlow checkpoint, or for one of its files; None for all others.

    Args:
        exists: called with a path, returns whether there is such a file.
    """
    part = _TF_PART.fullmatch(path)
    prefix = part[1] if part else path
    return _TENSORFLOW.problem(prefix) if exists(f"{prefix}.index") and (part or not exists(prefix)) else None


def _as_arrays(imports: str, arrays: str) -> str:
    return f"import {imports}, pickle; pickle.dump({arrays}, open('new.pkl', 'wb'))"


HEADS: dict[str, tuple[Callable[[bytes], bool], Foreign]] = {
    "zstd": (_magic(b"\x28\xb5\x2f\xfd"), Foreign("zstd", "a zstd archive", "unpack it: zstd -dc {path} > new.bin")),
    "zlib": (_magic(b"ZF"), Foreign("zlib", "a compressed file of an old joblib",
        "if you trust the file, which runs code when it is loaded: "
        "import joblib, pickle; pickle.dump(joblib.load({path}), open('new.pkl', 'wb'))")),
    "lz4": (_magic(b"\x04\x22M\x18"), Foreign("lz4", "an lz4 archive", "unpack it: lz4 -dc {path} > new.bin")),
    "tflite": (_magic(b"TFL3", at=4), Foreign("tflite", "a TensorFlow Lite model",
        "open the checkpoint that it was converted from; its constants: "
        "import tensorflow; i = tensorflow.lite.Interpreter(model_path={path}); i.get_tensor_details()")),
    "openvino": (lambda head: b"<net " in head and head.lstrip().startswith(b"<"), Foreign("openvino",
        "an OpenVINO model",
        "import openvino, pickle; pickle.dump({op.get_friendly_name(): op.data for op in openvino.Core().read_model("
        "{path}).get_ops() if op.get_type_name() == 'Constant'}, open('new.pkl', 'wb'))")),
    "savedmodel": (_is_saved_model, Foreign("savedmodel", "the graph of a TensorFlow SavedModel",
        "its weights are in the folder variables beside it; open the folder that holds this file")),
    "coreml": (_is_coreml, Foreign("coreml", "a Core ML model",
        "import coremltools, pickle; m = coremltools.models.MLModel({path}); pickle.dump({k: w.val for k, w in "
        "coremltools.optimize.coreml.get_weights_metadata(m, 0).items()}, open('new.pkl', 'wb'))")),
    "mindspore": (_is_mindspore, Foreign("mindspore", "a checkpoint of MindSpore",
        _as_arrays("mindspore", "{k: v.asnumpy() for k, v in mindspore.load_checkpoint({path}).items()}"))),
    "mxnet": (_magic(b"\x12\x01\0\0\0\0\0\0"), Foreign("mxnet", "a file of parameters of MXNet",
        _as_arrays("mxnet", "{k: v.asnumpy() for k, v in mxnet.nd.load({path}).items()}"))),
    "matlab": (_magic(b"MATLAB 5.0 MAT-file"), Foreign("matlab", "a MATLAB file of version 5",
        _as_arrays("scipy.io", "{k: v for k, v in scipy.io.loadmat({path}).items() if k[0] != '_'}"))),
    "marked": (_magic(b"\xef\xbb\xbfPK\x03\x04"), Foreign("marked",
        "a zip file behind a byte order mark, which a program for texts has put there",
        "remove it: tail -c +4 {path} > new.bin")),
    "pdf": (_magic(b"%PDF"), Foreign("pdf", "a PDF document", "check what was downloaded")),
}  # fmt: skip
"""Kind of a file -> how its first kilobyte is recognised, and what it is."""


def head_problem(kind: str, path: str) -> Diagnostic | None:
    """The diagnostic for a file of a kind in `HEADS`."""
    known = HEADS.get(kind)
    return known[1].problem(path) if known else None


# The names in a zip file


def _ends(*names: str) -> Callable[[Sequence[str]], bool]:
    return lambda found: any(name.endswith(names) for name in found)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".index.json", ".npz", ".h5", ".pkl")
_UNPACK = "unpack it: python -m zipfile -e {path} new_folder"

ZIPS: dict[str, tuple[Callable[[Sequence[str]], bool], Foreign]] = {
    "package": (_ends("/.data/extern_modules"), Foreign("package", "an archive of torch.package",
        "if you trust the file, whose code runs when it is loaded: torch.package.PackageImporter({path})"
        ".load_pickle(package, resource), then save the state_dict of what it gives")),
    "old-torchscript": (_ends("/model.json"), Foreign("old-torchscript", "a TorchScript archive of an old version",
        "torch.save(torch.jit.load({path}).state_dict(), 'new.pt')")),
    "zipped": (_ends(*_WEIGHTS), Foreign("zipped", "a zip file that holds checkpoints", _UNPACK)),
}  # fmt: skip
"""Kind of a zip file that is not torch's -> how its names are recognised, and what it is."""

_ZIPPED = Foreign("zip", "a zip file of another program", "name the checkpoint itself; what is in it: "
                  "python -m zipfile -l {path}")  # fmt: skip


def zip_problem(names: Sequence[str], path: str) -> CheckpointError:
    """The error for a zip file that holds no `data.pkl`."""
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    for recognised, foreign in ZIPS.values():
        if recognised(names):
            problem = foreign.problem(path, (f"it holds {shown}",))
            return CheckpointError(problem)
    help = _ZIPPED.remedy.replace("{path}", repr(path))
    text = f"{path!r} is a zip file but no torch file: it holds {shown or 'nothing'}"
    return CheckpointError(Diagnostic("not-a-checkpoint", text, path, help=help))


# Addresses

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HUB_PAGE = re.compile(
    r"huggingface\.co/([^/]+/[^/?#]+)(?:/(?:resolve|blob|tree|raw)/([^/?#]+)(?:/([^?#]+))?)?/?(?:[?#].*)?"
)


def address_problem(text: str) -> Diagnostic | None:
    """The diagnostic for the address of a page of the hub; None for all others.

    >>> print(address_problem("https://huggingface.co/org/repo/blob/main/model.safetensors").help)
    open('hf://org/repo@main/model.safetensors')
    """
    match = _ADDRESS.fullmatch(text)
    page = _HUB_PAGE.fullmatch(match[2]) if match is not None and match[1].lower() in ("http", "https") else None
    if page is None:
        return None
    revision = f"@{page[2]}" if page[2] else ""
    help = f"open({f'hf://{page[1]}{revision}' + (f'/{page[3]}' if page[3] else '')!r})"
    return Diagnostic("address", f"{text!r} is a page of the hub, which hf:// opens", text, help=help)
