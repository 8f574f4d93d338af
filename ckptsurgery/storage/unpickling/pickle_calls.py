"""What the calls in a checkpoint's pickle mean: the allow-list of the restricted unpickler.

Each meaning takes the machine and the arguments that the file gives, and returns an inert value; None, or arguments
that do not fit, leave an `Opaque` record behind. Nothing here allocates what a number in the file asks for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, MOST_DIMENSIONS, dtype_name
from .inert import Array, Blob, Fields, FileBytes, NumpyType, Opaque, Ordered, Storage, Tensor
from .nodes import holds_tensors
from .pickle_stack import PickleStack

__all__ = ["CALLS", "POWERFUL", "set_array_state", "set_type_state", "storage_dtype", "storage_width"]

Meaning = Callable[["PickleStack", tuple[Any, ...]], Any]

CALLS: dict[str, Meaning] = {}

# Modules whose functions reach out of a pickle: a tensor that is built by one is refused by that name.
POWERFUL = frozenset({
    "__builtin__", "builtins", "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "pty", "runpy",
    "importlib", "ctypes", "pickle", "_pickle", "code", "commands", "popen2", "webbrowser", "operator", "types",
    "marshal", "multiprocessing", "asyncio", "pdb", "timeit", "cProfile", "profile",
})  # fmt: skip

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8", "_UntypedStorage": "U8",
}  # fmt: skip


def storage_width(kind: Any) -> int:
    """Bytes an element of a storage class takes; quantised ones included."""
    dtype = storage_dtype(kind)
    name = kind.name if type(kind) is Opaque else ""
    return DTYPES[dtype].itemsize if dtype else 4 if name == "QInt32Storage" else 1


def storage_dtype(kind: Any) -> str | None:
    """The dtype of a storage class (`torch.FloatStorage`), or None where no dtype here matches (quantised ones)."""
    return _STORAGES.get(kind.name) if type(kind) is Opaque else None


def _meaning(*paths: str) -> Callable[[Meaning], Meaning]:
    def register(meaning: Meaning) -> Meaning:
        for path in paths:
            CALLS[path] = meaning
            if path.startswith("builtins."):
                CALLS["__builtin__." + path.removeprefix("builtins.")] = meaning
        return meaning

    return register


# tensors


def _view(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None, grad: Any = False, bits: Any = None
) -> Any:
    name = "_rebuild_tensor"
    if type(storage) is not Storage:
        return Opaque("torch._utils", name, (storage,), "its data come from " + _called(storage))
    dtype = dtype or storage.dtype
    if dtype is None:
        return Opaque("torch._utils", name, (), "its dtype is unknown here")
    lists = type(shape) in (tuple, list) and type(strides) in (tuple, list) and len(shape) == len(strides)
    if lists and len(shape) > MOST_DIMENSIONS:
        return Opaque("torch._utils", name, (), f"it has {len(shape):,} dimensions; {MOST_DIMENSIONS} is the limit")
    numbers = (offset, *shape, *strides) if lists else ()
    if not numbers or set(map(type, numbers)) != {int} or min(numbers) < 0:
        return Opaque("torch._utils", name, (), "its shape, strides or offset make no sense")
    if storage.location == "meta":
        return Opaque("torch._utils", name, (), "a meta tensor, which has no data")
    if isinstance(bits, dict) and any(bits.values()):
        what = " and ".join(str(k) for k, v in bits.items() if v)
        return Opaque("torch._utils", name, (), f"a lazy view with its {what} bit set: save it after resolve_conj()")
    return Tensor(storage, offset, tuple(shape), tuple(strides), dtype, grad is True)


def _called(thing: Any) -> str:
    if type(thing) is Opaque and thing.note:
        return f"{thing.path} ({thing.note})"
    return thing.path if type(thing) is Opaque else f"a {type(thing).__name__}"


@_meaning("torch._utils._rebuild_tensor")
def _rebuild_tensor(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    storage, offset, shape, strides, *_ = args
    return _view(storage, offset, shape, strides)


@_meaning("torch._utils._rebuild_tensor_v2")
def _rebuild_tensor_v2(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    storage, offset, shape, strides, grad, *rest = args
    return _view(storage, offset, shape, strides, None, grad, rest[1] if len(rest) > 1 else None)


@_meaning("torch._utils._rebuild_tensor_v3")
def _rebuild_tensor_v3(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    storage, offset, shape, strides, grad, _, dtype, *rest = args
    name = _torch_dtype(dtype)
    if name is None:
        return Opaque("torch._utils", "_rebuild_tensor_v3", (), f"its dtype {dtype!r} is unknown here")
    return _view(storage, offset, shape, strides, name, grad, rest[0] if rest else None)


def _torch_dtype(dtype: Any) -> str | None:
    if type(dtype) is not Opaque or dtype.module != "torch":
        return None
    try:
        return dtype_name(dtype.name)
    except CheckpointError:
        return None


@_meaning(
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.nn.modules.module.Parameter",
)
def _parameter(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    data = args[0] if args else None
    if type(data) is Opaque and not data.note:
        return Opaque("torch._utils", "_rebuild_parameter", args, f"a parameter over {_called(data)}")
    return data if type(data) in (Tensor, Opaque, Array) else None


@_meaning("torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._utils._rebuild_device_tensor_from_numpy",
          "torch._utils._rebuild_xla_tensor")  # fmt: skip
def _from_device(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    data, dtype, *_ = args
    held = data.dtype if type(data) in (Tensor, Array) else None
    if held is None or held != _torch_dtype(dtype):
        return Opaque("torch._utils", "_rebuild_device_tensor", (), f"its data would have to be cast to {dtype!r}")
    return data


@_meaning("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")
def _rebuild_from_type(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    function, kind, inner, *state = args
    made = vm.call(function, inner)
    beside = isinstance(state[0], (dict, tuple)) and holds_tensors(state[0]) if state else False
    if type(made) is not Opaque and not beside:
        return made  # a plain subclass, whose elements are in its storage
    if type(made) is Opaque and made.note and made.name != "_rebuild_wrapper_subclass":
        return made
    name = _called(kind)
    note = _SUBCLASSES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    note = note or f"a tensor of the class {name}, which keeps its data in a form of its own"
    kept = (made, state[0], name.rpartition(".")[2]) if state else (made,)  # what the files of all ranks are joined by
    return Opaque("torch._tensor", "_rebuild_from_type_v2", kept, note)


_SUBCLASSES = {
    "DTensor": "a DTensor, a part of a sharded tensor: open the folder of all ranks' files, or save full_tensor()",
    "NestedTensor": "a nested tensor (jagged), which has no one shape",
}


def _no_plain_tensor(path: str, note: str) -> None:
    module, _, name = path.rpartition(".")

    @_meaning(path)
    def meaning(vm: PickleStack, args: tuple[Any, ...]) -> Any:
        return Opaque(module, name, args, note)


for _path, _note in {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor: save it after to_dense()",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor: save it after to_dense()",
    "torch._utils._rebuild_nested_tensor": "a nested tensor, which has no one shape",
    "torch._utils._rebuild_qtensor": "a quantised tensor: save it after dequantize()",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no data",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class that keeps its data in a form of its own",
    "torch.nn.parameter.UninitializedParameter": "an uninitialised parameter, which has no shape yet",
    "torch.nn.parameter.UninitializedBuffer": "an uninitialised buffer, which has no shape yet",
}.items():
    _no_plain_tensor(_path, _note)


@_meaning("torch.storage._load_from_bytes")
def _nested_storage(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    # how a storage is pickled without torch.save: a legacy torch file in a byte string
    if vm.nested is not None and isinstance(args[0], (FileBytes, Blob)):
        vm.spend(8 * (args[0].nbytes if isinstance(args[0], Blob) else len(args[0])))  # it is parsed anew each time
        return vm.nested(args[0])
    return Opaque("torch.storage", "_load_from_bytes", (), "bytes spelt as text, by protocol 2: use torch.save")


# plain values


@_meaning("collections.OrderedDict")
def _ordered(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return _fill(vm, Ordered(), args)


@_meaning("collections.Counter", "collections.defaultdict", "builtins.dict")
def _mapping(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return _fill(vm, {}, args)


def _fill(vm: PickleStack, made: dict[Any, Any], args: tuple[Any, ...]) -> dict[Any, Any]:
    source = args[-1] if args and type(args[-1]) is not Opaque else ()
    pairs = list(source.items()) if isinstance(source, dict) else source
    if pairs is None:
        return made
    vm.spend(104 * len(pairs))
    for key, value in pairs:
        made[vm.key(key)] = value
    return made


@_meaning("argparse.Namespace", "types.SimpleNamespace")
def _namespace(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return Fields() if not args else None


@_meaning("builtins.set", "builtins.frozenset")
def _set(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    items = _items(vm, args, 104)
    return {vm.key(item) for item in items} if items is not None else None


@_meaning("builtins.list", "collections.deque")
def _list(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    items = _items(vm, args[:1])
    return list(items) if items is not None else None


@_meaning("builtins.tuple", "torch.Size")
def _tuple(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    if len(args) == 1 and type(args[0]) is tuple:
        return args[0]  # nothing is made
    items = _items(vm, args)
    return tuple(items) if items is not None else None


def _items(vm: PickleStack, args: tuple[Any, ...], size: int = 8) -> Any:
    if not args:
        return ()
    if len(args) != 1 or type(args[0]) not in (list, tuple, set):
        return None
    vm.spend(size * len(args[0]))
    return args[0]


@_meaning("builtins.int", "builtins.long", "builtins.float", "builtins.bool", "builtins.complex")
def _number(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 and type(args[0]) in (int, float, bool) else _complex(args)


def _complex(args: tuple[Any, ...]) -> Any:
    return complex(*args) if len(args) == 2 and all(type(a) in (int, float) for a in args) else None


@_meaning("builtins.str", "builtins.unicode")
def _str(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 and type(args[0]) is str else None


@_meaning("builtins.bytes", "builtins.bytearray")
def _bytes(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    # bytes(10**12) and bytearray(10**12) would allocate: numbers are not answered
    if not args:
        return b""
    if type(args[0]) is Blob:
        return args[0]
    if isinstance(args[0], bytes):
        vm.spend(len(args[0]))
        return args[0]
    return _encoded(vm, args) if len(args) == 2 else None


@_meaning("_codecs.encode")
def _encoded(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    # how protocol 2 spells bytes
    text, encoding, *_ = args if len(args) > 1 else (*args, "utf-8")
    if type(text) is not str or encoding not in ("latin1", "latin-1", "iso-8859-1", "ascii", "utf-8"):
        return None
    vm.spend(len(text))
    return text.encode(encoding)


@_meaning("builtins.slice", "builtins.range", "__builtin__.xrange")
def _bounds(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return None


@_meaning("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.Path", "pathlib.WindowsPath",
          "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath")  # fmt: skip
def _path_of(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    if not all(type(part) is str for part in args):
        return None
    vm.spend(4 * sum(map(len, args)))
    head = args[0].rstrip("/") if args else ""
    return "/".join((head, *args[1:])) or "/"


@_meaning("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copy_reg.__newobj__")
def _reconstructed(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    kind = args[0]
    return vm.call(kind, ()) if type(kind) is Opaque and kind.args is None else None


# numpy


def _numpy(*names: str) -> Callable[[Meaning], Meaning]:
    roots = ("numpy.core.", "numpy._core.", "numpy.")
    return _meaning(*(root + name for name in names for root in roots))


@_numpy("multiarray._reconstruct")
def _new_array(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return Array() if type(args[0]) is Opaque and args[0].path.endswith((".ndarray", ".memmap")) else None


@_numpy("dtype")
def _new_type(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    code = args[0]
    if type(code) is Opaque:
        code = code.name  # ml_dtypes' bfloat16 names its scalar class
    if type(code) is not str:
        return None
    return NumpyType(code.lstrip("<>|="), code.startswith(">"))


def set_type_state(target: NumpyType, state: Any) -> None:
    """A numpy dtype's `__setstate__`: `(version, byte order, …)`."""
    target.big_endian = type(state) is tuple and len(state) > 1 and state[1] in (">", b">")


def set_array_state(vm: PickleStack, target: Array, state: Any) -> None:
    """A numpy array's `__setstate__`: `(version, shape, dtype, fortran, data)`."""
    shape, kind, fortran, data = state[-4:]
    if type(data) is list and type(kind) is NumpyType and kind.code.startswith("O"):
        target.type, target.data = kind, data  # an array of objects, which are its data
        data = None
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError("too many dimensions")
    if type(data) is str:
        vm.spend(len(data))
        data = data.encode("latin-1")  # a Python 2 string that happens to be ASCII
    if type(kind) is NumpyType and isinstance(data, (bytes, Blob)):
        target.type, target.shape, target.fortran, target.data = kind, tuple(shape), bool(fortran), data
    if not all(type(n) is int and n >= 0 for n in target.shape):
        raise ValueError("no shape")


@_meaning("jax._src.array._reconstruct_array", "jax._src.device_array.reconstruct_device_array",
          "dill._dill._create_array")  # fmt: skip
def _wrapped_array(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    """An array that a program has wrapped: the call that makes one of numpy, the arguments, and its state."""
    function, inner, state, *_ = args
    made = vm.call(function, inner)
    if type(made) is not Array:
        return None
    set_array_state(vm, made, state)
    return made


@_meaning("numpy.ma.core._mareconstruct", "numpy.ma._mareconstruct")
def _masked_array(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return Opaque("torch", "Tensor", args, "a masked array of numpy: save it after filled()")


@_numpy("numeric._frombuffer")
def _from_buffer(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    data, kind, shape, order = args
    made = Array()
    set_array_state(vm, made, (shape, kind, order == "F", data))
    return made


@_numpy("multiarray.scalar")
def _scalar(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    kind, data = args
    if type(data) is str:
        vm.spend(len(data))
        data = data.encode("latin-1")
    layout = _SCALARS.get(kind.code) if type(kind) is NumpyType else None
    if layout is None or not isinstance(data, bytes):
        return None
    return struct.unpack((">" if kind.big_endian else "<") + layout, data)[0]


_SCALARS = {
    "b1": "?", "?": "?", "u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "u8": "Q", "i8": "q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


@_meaning("joblib.numpy_pickle.NumpyArrayWrapper")
def _joblib_array(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    return Array()  # its state says what it is, and its bytes follow (see `joblib_arrays`)


@_meaning("joblib.numpy_pickle.NDArrayWrapper", "joblib.numpy_pickle.ZNDArrayWrapper",
          "joblib.numpy_pickle_compat.NDArrayWrapper", "joblib.numpy_pickle_compat.ZNDArrayWrapper")  # fmt: skip
def _old_joblib_array(vm: PickleStack, args: tuple[Any, ...]) -> Any:
    text = f"{vm.source!r} is a file of an old joblib, whose arrays are in other files; it is not read here"
    help = "if you trust the file, which runs code when it is loaded: "
    help += f"import joblib, pickle; pickle.dump(joblib.load({vm.source!r}), open('new.pkl', 'wb'))"
    raise CheckpointError(Diagnostic("unsupported-format", text, place=vm.source, help=help))
