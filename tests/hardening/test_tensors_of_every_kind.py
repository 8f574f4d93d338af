"""A law for tensors in memory: whatever is done with a tensor of any kind, the bytes are right or it is refused.

Refused means a `CkptSurgeryError` that names the tensor, with no file and no other tensor changed. All of it runs in a
child process: reading an address that is none ends a process, and the parent has to see that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

SHAPE = (4, 6)


def base(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, 25).to(dtype).reshape(SHAPE)


class Plain(torch.Tensor):
    """A subclass that adds a name and nothing else."""


class Liar(torch.Tensor):
    """A subclass whose every function gives zeros."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return torch.zeros_like(made) if isinstance(made, torch.Tensor) else made


class Own(nn.Parameter):
    """A subclass of Parameter."""


class Watching(torch.Tensor):
    """A dispatch subclass over memory of its own, as logging tensors are made."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            return function(*args, **(kwargs or {}))


class Coded(torch.Tensor):
    """Codes and a scale, as quantised weights are made: no memory of its own."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, meta: Any, size: Any, stride: Any) -> Any:
        return Coded(parts["codes"], parts["scale"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "Coded"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Coded(args[0].codes, args[0].scale)
        dense = [a.codes.to(a.scale.dtype) * a.scale if isinstance(a, Coded) else a for a in args]
        return function(*dense, **(kwargs or {}))


class Opaque(Coded):
    """As `Coded`, and nobody can take it apart."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def sharded() -> Tensor:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(base(), init_device_mesh("cpu", (1,)), [Shard(0)])


def fake() -> Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(SHAPE)


def freed(left: int) -> Tensor:
    tensor = base()
    tensor.untyped_storage().resize_(left)
    return tensor


def masked() -> Tensor:
    return torch.masked.masked_tensor(base(), base() > 3)  # type: ignore[attr-defined]


def nested(**options: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], **options)


def inference() -> Tensor:
    with torch.inference_mode():
        return base() * 1


# kind -> the tensor; what it holds is found by `dense`
VALUES: dict[str, Callable[[], Tensor]] = {
    "contiguous": base,
    "transposed": lambda: base().reshape(6, 4).t(),
    "stepped": lambda: torch.arange(96.0).reshape(8, 12)[::2, ::2],
    "offset": lambda: torch.arange(99.0)[7:31].reshape(SHAPE),
    "expanded": lambda: torch.arange(6.0).expand(4, 6),
    "overlapping": lambda: torch.arange(30.0).as_strided(SHAPE, (2, 1), 3),
    "flipped": lambda: base().flip(0),
    "channels-last": lambda: (
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)[0].reshape(SHAPE)
    ),
    "conj": lambda: torch.complex(base(), base() + 1).conj(),
    "conj-transposed": lambda: torch.complex(base(), base() + 1).reshape(6, 4).mH,
    "neg": lambda: torch._neg_view(base()),
    "conj-imag": lambda: torch.complex(base(), base() + 1).conj().imag,
    "bf16": lambda: base(torch.bfloat16),
    "float8": lambda: base().to(torch.float8_e4m3fn),
    "bool": lambda: base() > 7,
    "with-grad": lambda: base().requires_grad_() * 1,
    "inference": inference,
    "lazy-clone": lambda: torch._lazy_clone(base()),
    "plain-subclass": lambda: base().as_subclass(Plain),
    "lying-subclass": lambda: base().as_subclass(Liar),
    "parameter": lambda: nn.Parameter(base()),
    "buffer": lambda: nn.Buffer(base()),
    "parameter-subclass": lambda: Own(base()),
    "parameter-over-subclass": lambda: nn.Parameter(base().as_subclass(Plain)),
}
ODD: dict[str, Callable[[], Tensor]] = {
    "watching": lambda: base().as_subclass(Watching),
    "coded": lambda: Coded(base().to(torch.int8), torch.tensor(0.5)),
    "opaque": lambda: Opaque(base().to(torch.int8), torch.tensor(0.5)),
    "coded-parameter": lambda: nn.Parameter(Coded(base().to(torch.int8), torch.tensor(0.5)), requires_grad=False),
    "sharded": sharded,
    "sharded-parameter": lambda: nn.Parameter(sharded()),
    "fake": fake,
    "functional": lambda: torch._to_functional_tensor(base()),
    "coo": lambda: base().to_sparse(),
    "csr": lambda: base().to_sparse_csr(),
    "csc": lambda: base().to_sparse_csc(),
    "bsr": lambda: base().to_sparse_bsr((2, 2)),
    "mkldnn": lambda: base().to_mkldnn(),
    "quantised": lambda: torch.quantize_per_tensor(base(), 0.1, 0, torch.quint8),
    "by-channel": lambda: torch.quantize_per_channel(base(), torch.ones(4), torch.zeros(4), 0, torch.qint8),
    "nested": nested,
    "jagged": lambda: nested(layout=torch.jagged),
    "meta": lambda: base().to("meta"),
    "uninitialised": lambda: nn.parameter.UninitializedParameter(),
    "uninitialised-buffer": lambda: nn.parameter.UninitializedBuffer(),
    "freed": lambda: freed(0),
    "half-freed": lambda: freed(40),
    "zero-tensor": lambda: torch._efficientzerotensor(SHAPE),
    "masked": masked,
}
KINDS = VALUES | ODD


def dense(tensor: Tensor) -> Tensor:
    """The elements of a tensor of plain memory, one by one, by torch alone and not by strides; of shards the whole."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    with torch._C.DisableTorchFunctionSubclass():
        bare = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        made = torch.empty(tuple(bare.shape), dtype=bare.dtype)
        for row in range(bare.shape[0]):
            for column in range(bare.shape[1]):
                made[row, column] = bare[row, column].clone()
        return made


def same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (a, b))
    x, y = (t.detach().resolve_conj().resolve_neg().contiguous() for t in (a, b))
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def holding(*tensors: Tensor) -> nn.Module:
    """A model with a plain buffer first, then these."""
    model = nn.Module()
    model.register_buffer("a", torch.zeros(3))
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(f"w{number}", tensor)
        else:
            model.register_buffer(f"w{number}", tensor)
    return model


A = torch.tensor([1.0, 2.0, 3.0])


def saved(name: str, **options: Any) -> Callable[[Tensor, Path], dict[str, Tensor]]:
    def run(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
        cs.save({"a": A, "w": tensor}, folder / name, **options)
        return cs.open(folder / name).state_dict()

    return run


def of_model(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    cs.save(holding(tensor), folder / "x.safetensors")
    return {"w": cs.open(folder / "x.safetensors").load("w0")}


def planned(rule: str, name: str | None = None) -> Callable[[Tensor, Path], dict[str, Tensor]]:
    def run(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
        plan = cs.plan({"a": A, "w": tensor}, ["a -> a", rule])
        if name is None:
            return plan.state_dict()
        plan.save(folder / name, check=True)
        return cs.open(folder / name).state_dict()

    return run


def loaded(assign: bool) -> Callable[[Tensor, Path], dict[str, Tensor]]:
    def run(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
        quantised = tensor.dtype in (torch.quint8, torch.qint8)
        model = holding(torch.zeros(SHAPE, dtype=torch.float32 if quantised else tensor.dtype))
        try:
            cs.load_into(model, {"a": A, "w0": tensor}, assign=assign)
        except cs.CkptSurgeryError:
            assert model.a.tolist() == [0, 0, 0], "the model was changed and the load refused"
            raise
        return {"w": model.w0, "a": model.a}

    return run


def filled(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    """The tensor as a target."""
    model = holding(tensor)
    quantised = tensor.dtype in (torch.quint8, torch.qint8)
    new = torch.full(SHAPE, 2, dtype=torch.float32 if quantised else tensor.dtype)
    try:
        cs.load_into(model, {"a": A, "w0": new}, assign=False)
    except cs.CkptSurgeryError:
        assert model.a.tolist() == [0, 0, 0], "the model was changed and the load refused"
        raise
    return {"new": dense(model.w0)}


def compared(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    try:
        other = dense(tensor)
    except Exception:
        other = base()  # it has no elements, and is refused before they are compared
    found = cs.diff({"w": tensor}, {"w": other})
    assert found.identical, found
    return {}


def examined(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    found = cs.doctor({"a": A, "w": tensor})
    if not found.healthy:
        raise cs.CheckpointError(found.findings)
    return {}


def looked_at(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    assert cs.ties({"a": A, "w": tensor, "v": tensor})[0].names == ("w", "v")
    cs.summary({"w": tensor})
    cs.ties(holding(tensor))
    cs.summary(holding(tensor))
    return {}


def opened(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    checkpoint = cs.open({"w": tensor})
    read = torch.frombuffer(bytearray(checkpoint.read("w")), dtype=torch.uint8)
    assert same(read, dense(tensor).reshape(-1).view(torch.uint8)), "the bytes that are read"
    return {"w": checkpoint.load("w")}


def of_file(tensor: Tensor, folder: Path) -> dict[str, Tensor]:
    """The tensor in a file beside plain ones: all of them arrive, or each of these is refused until it is dropped."""
    with tempfile.TemporaryDirectory() as apart:
        path = Path(apart) / "source.pt"
        try:
            torch.save({"model": {"a": A, "w": tensor}, "epoch": 3}, path)
        except Exception:
            return {}  # torch cannot write it either
        try:
            cs.save(path, folder / "x.safetensors")
        except cs.CkptSurgeryError:
            report = cs.plan(path, cs.Recipe(rest="keep", drop=["w"])).save(Path(apart) / "rest.safetensors")
            assert report.dropped == ("w",)
            assert torch.equal(cs.open(Path(apart) / "rest.safetensors").load("a"), A)
            for attempt in (
                lambda: cs.plan(path, "{k...} -> x.{k...}").state_dict(),
                lambda: cs.open(path).state_dict(),
                lambda: cs.diff(path, path),
                lambda: cs.load_into(holding(), path),
            ):
                with pytest.raises(cs.CkptSurgeryError, match="w"):
                    attempt()
            raise
    return cs.open(folder / "x.safetensors").state_dict()


OPERATIONS: dict[str, Callable[[Tensor, Path], dict[str, Tensor]]] = {
    "save": saved("x.safetensors"),
    "save .pt": saved("x.pt"),
    "save checked": saved("x.safetensors", check=True),
    "save .pt checked": saved("x.pt", check=True),
    "save shards": saved("x", max_shard_size=64),
    "save a model": of_model,
    "state_dict": planned("w -> w"),
    "split": planned("w [(p r) c] -> {p:x,y} [r c]"),
    "transpose": planned("w [r c] -> t [c r]"),
    "transpose checked": planned("w [r c] -> t [c r]", "x.pt"),
    "cast": planned("w -> wide | cast(f32)"),
    "load": loaded(assign=False),
    "assign": loaded(assign=True),
    "fill": filled,
    "diff": compared,
    "doctor": examined,
    "look": looked_at,
    "open": opened,
    "file": of_file,
}


def expected(key: str, tensor: Tensor) -> Tensor:
    whole = dense(tensor)
    match key:
        case "w":
            return whole
        case "x":
            return whole[:2]
        case "y":
            return whole[2:]
        case "t":
            return whole.t().contiguous()
        case "wide":
            return whole.to(torch.float32)
        case "new":
            return torch.full(SHAPE, 2, dtype=whole.dtype)
    return A


def verdict(kind: str, tensor: Tensor, name: str) -> str | None:
    """What an operation did wrong to a tensor; None where it did right."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            made = OPERATIONS[name](tensor, folder)
        except cs.CkptSurgeryError as error:
            left = [path.name for path in folder.rglob("*")]
            if left:
                return f"refused, and wrote {left}"
            if kind in VALUES and name not in MAY_REFUSE.get(kind, ()):
                return f"refused a tensor that can be read: {error}"
            return None if "w" in str(error) else f"refused without its name: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        wrong = [key for key, value in made.items() if not same(value, expected(key, tensor))]
        return f"wrong bytes of {wrong}" if wrong else None


# What cannot be done to these has other reasons than memory: dtypes that do not go into each other, and views that
# repeat their elements or cannot be written to.
MAY_REFUSE = {
    "conj": ("cast", "file"),
    "conj-transposed": ("cast", "file"),
    "neg": ("file",),
    "conj-imag": ("file",),
    "float8": ("cast",),
    "bool": ("cast",),
    "expanded": ("fill",),
    "overlapping": ("fill",),
    "lying-subclass": ("fill",),
}


@contextmanager
def transforms() -> Iterator[Callable[[Callable[[Tensor], Any]], None]]:
    def inside(run: Callable[[Tensor], Any]) -> None:
        def one(tensor: Tensor) -> Tensor:
            run(tensor)
            return tensor.sum()

        torch.vmap(one)(torch.stack([base(), base()]))
        torch.func.grad(one)(base())

    yield inside


def main() -> None:
    warnings.simplefilter("ignore")

    def tell(*record: object) -> None:
        print(json.dumps(record), flush=True)

    for kind in KINDS:
        for name in OPERATIONS:
            tell("begun", kind, name)
            tell("ended", kind, name, verdict(kind, KINDS[kind](), name))
    with transforms() as inside:
        for name in OPERATIONS:
            tell("begun", "transform", name)
            inside(lambda tensor, name=name: tell("ended", "transform", name, verdict("transform", tensor, name)))
    tell("all done")


def test_of_a_tensor_of_any_kind_the_bytes_are_right_or_it_is_refused() -> None:
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=500)
    records = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0 and records[-1:] == [["all done"]], (records[-1:], child.stderr[-2000:])
    wrong = [record[1:] for record in records if record[0] == "ended" and record[3] is not None]
    assert not wrong, "\n".join(f"{kind}, {name}: {why}" for kind, name, why in wrong)
    assert sum(record[0] == "ended" for record in records) >= len(KINDS) * len(OPERATIONS)


if __name__ == "__main__":
    main()
