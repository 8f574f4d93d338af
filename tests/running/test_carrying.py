"""What is filled through a ring is what is filled without one, whatever the steps; an error tells what it left.

The device of these tests is the CPU's own memory, which a thread copies to, late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs
from ckptsurgery.planning.plan import Plan
from ckptsurgery.running.progress import ByteBar
from ckptsurgery.running.sinks import existing_tensors
from ckptsurgery.running.sinks import new_tensors as tensor_sinks
from ckptsurgery.running.sinks.existing_tensors import CopySink
from ckptsurgery.running.sinks.new_tensors import StateDictSink, fill
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.sources.files import OpenFiles

HERE = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.int64, torch.complex64)


class Slow:
    """A way to the CPU's memory that takes a while."""

    def __init__(self) -> None:
        self.held, self.thread = 0, ThreadPoolExecutor(1)

    def buffer(self, nbytes: int) -> torch.Tensor:
        self.held += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        return self.thread.submit(self._copy, pairs).result

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        time.sleep(0.001)
        for target, source in pairs:
            target.copy_(source)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    link = Slow()
    for sinks in (tensor_sinks, existing_tensors):
        monkeypatch.setattr(sinks, "link_to", lambda device: link)
    yield link
    link.thread.shutdown()


@pytest.fixture
def never_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tensor of a file that is loaded on its own is a failure."""
    load = Checkpoint.load

    def refused(self: Checkpoint, key: str) -> torch.Tensor:
        assert self.entries[key].file is None, f"{key} became a tensor of its own"
        return load(self, key)

    monkeypatch.setattr(Checkpoint, "load", refused)


def made_on_device(plan: Plan) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors, and the keys of those that came by the ring."""
    sink = StateDictSink(plan.steps, (), HERE)
    fill(sink, plan.steps, plan.checkpoint, lambda nbytes: None)
    return sink.made, set(sink._rings)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape) if count else torch.empty(shape)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    x, y = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return same and torch.equal(x, y)


def saved(tensors: dict[str, torch.Tensor], path: Path) -> str:
    cs.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tensors_of_every_kind_arrive(tmp_path: Path, suffix: str, never_a_tensor: None) -> None:
    torch.manual_seed(0)
    shapes = ((), (0, 3), (1,), (5, 7), (3, 2, 4))
    tensors = {f"{dtype}-{shape}".replace("torch.", ""): random(shape, dtype) for dtype in DTYPES for shape in shapes}
    plan = cs.plan(saved(tensors, tmp_path / f"x.{suffix}"), "{k} -> new.{k}")
    made, ringed = made_on_device(plan)
    assert made.keys() == {"new." + key for key in tensors}
    assert ringed == {key for key in made if made[key].numel()}
    assert all(equal(made["new." + key], tensor) for key, tensor in tensors.items())


RULES = {
    "fused": "l.{i}.{p:q,k,v} [rows:p d] -> l.{i}.qkv [(p rows:p) d]",
    "stacked": "l.{i}.{p} [a d] -> {p} [i a d]",
    "split": "w [(p:x,y a) d] -> w.{p:x,y} [a d]",
    "copied twice": "w -> w, again",
    "transposed": "w [a b] -> w [b a]",
    "cast": "w -> w | cast(f16)",
}


def big(path: Path) -> str:
    tensors = {f"l.{i}.{p}": torch.randn(300 + 100 * n, 64) for i in range(3) for n, p in enumerate("qkv")}
    return saved({**tensors, "w": torch.randn(800, 64)}, path / "big.safetensors")


@pytest.mark.parametrize("name", RULES)
def test_what_moves_long_runs_goes_by_the_ring_and_all_else_is_left(tmp_path: Path, name: str) -> None:
    source = big(tmp_path)
    if name == "stacked":
        source = saved({f"l.{i}.w": torch.randn(300, 64) for i in range(3)}, tmp_path / "stack.safetensors")
    plan = cs.plan(source, cs.Recipe([RULES[name]], rest="drop"))
    made, ringed = made_on_device(plan)
    wanted = plan.state_dict()
    assert ringed == (set() if name in ("transposed", "cast") else wanted.keys())
    assert made.keys() == wanted.keys()
    assert all(equal(tensor, wanted[key]) for key, tensor in made.items())


def test_two_targets_of_one_source_are_two_tensors(tmp_path: Path) -> None:
    plan = cs.plan(big(tmp_path), cs.Recipe(["w -> w, again"], rest="drop"))
    made, _ = made_on_device(plan)
    assert made["w"].data_ptr() != made["again"].data_ptr()


def test_many_short_runs_are_left_to_the_cpu(tmp_path: Path) -> None:
    parts = {f"x.{i}": torch.randn(64, 100) for i in range(8)}
    plan = cs.plan(saved(parts, tmp_path / "x.safetensors"), "x.{i} [a b] -> x [a (i b)]")
    made, ringed = made_on_device(plan)
    assert not ringed
    assert equal(made["x"], torch.stack(list(parts.values()), 1).flatten(1))


def model_and_plan(path: Path) -> tuple[nn.Module, Plan, dict[str, torch.Tensor]]:
    tensors = {f"{i}.weight": torch.randn(6, 40) for i in range(9)} | {"8.bias": torch.randn(6)}
    model = nn.Sequential(*(nn.Linear(40, 6, bias=i == 8) for i in range(9)))
    return model, cs.plan(saved(tensors, path / "m.safetensors"), "{k...} -> {k...}", target=model), tensors


def load(plan: Plan, model: nn.Module) -> tuple[CopySink, int]:
    """The sink, and the bytes that were counted."""
    with ByteBar(1, "loading") as bar:
        sink = CopySink(plan.steps, (), model)
        fill(sink, plan.steps, plan.checkpoint, bar)
        return sink, bar.done


def test_a_model_is_filled_in_its_own_memory(tmp_path: Path, never_a_tensor: None) -> None:
    model, plan, tensors = model_and_plan(tmp_path)
    before = {key: (t.data_ptr(), t._version) for key, t in model.state_dict().items()}
    sink, done = load(plan, model)
    assert sink._rings.keys() == set(sink.written) == set(tensors) and not sink.torn
    assert done == sum(t.nbytes for t in tensors.values())
    for key, tensor in model.state_dict().items():
        assert equal(tensor, tensors[key])
        assert tensor.data_ptr() == before[key][0] and tensor._version > before[key][1]


def test_what_takes_no_bytes_is_copied_into(tmp_path: Path) -> None:
    model, plan, tensors = model_and_plan(tmp_path)
    model[0].weight = nn.Parameter(torch.zeros(40, 6).t())
    with torch.inference_mode():
        model[2].weight = nn.Parameter(torch.zeros(6, 40))
    sink, _ = load(plan, model)
    assert set(tensors) - sink._rings.keys() == {"0.weight", "2.weight"}
    assert all(equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("broken", ["0.weight", "4.weight", "8.bias"])
def test_a_read_that_fails_tells_new_old_and_torn(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_sinks, "BUFFER", 512)
    model, plan, tensors = model_and_plan(tmp_path)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    lies = plan.checkpoint.extent(broken)
    assert lies is not None
    read_into, at = OpenFiles.read_into, lies.offset + lies.nbytes - 1

    def failing(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        if offset <= at < offset + len(buffer):
            raise cs.CheckpointError(cs.Diagnostic("read-failed", "the disk gave up"))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", failing)
    sink = CopySink(plan.steps, (), model)
    with pytest.raises(cs.CheckpointError, match="the disk gave up"):
        fill(sink, plan.steps, plan.checkpoint, lambda nbytes: None)
    assert broken not in sink.written
    assert not {*sink.written} & {*sink.torn}
    for key, tensor in model.state_dict().items():
        if key in sink.written:
            assert equal(tensor, tensors[key])
        elif key not in sink.torn:
            assert equal(tensor, before[key])
