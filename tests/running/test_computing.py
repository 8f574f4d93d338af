"""What is written is what the plan makes, however finely the work is cut."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.ops.base import Op, Specs, Tensors
from ckptsurgery.planning.cutting import cut_of, extent_of, regions_of
from ckptsurgery.planning.layout import Layout
from ckptsurgery.running.executor import execution
from ckptsurgery.running.executor.computing import one_thread_each
from ckptsurgery.running.executor.execution import execute
from ckptsurgery.running.executor.programs import Loads, move_box
from ckptsurgery.running.executor.sinks import FileSink
from ckptsurgery.running.executor.tasks import Task, run_tasks
from ckptsurgery.storage.output.staging import Writer
from ckptsurgery.storage.output.writing import open_writer
from ckptsurgery.storage.sources.files import OpenFiles


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {}
    for i in range(2):
        made |= {f"l.{i}.{p}.weight": torch.randn(rows, 6) for p, rows in (("q", 8), ("k", 4), ("v", 4))}
        made |= {f"l.{i}.e.{e}.{p}": torch.randn(5, 7) for e in range(3) for p in ("gate", "up", "down")}
        made[f"l.{i}.fused"] = torch.randn(3, 4, 10)
        made[f"l.{i}.norm"] = torch.randn(7).to(torch.bfloat16)
    made["count"] = torch.tensor(3)
    made["empty"] = torch.zeros(0, 4)
    return made


RECIPES: dict[str, list[str]] = {
    "names": [],
    "transposed": ["l.{i}.{p:q,k,v}.weight [o d] -> m.{i}.{p} [d o]"],
    "fused": ["l.{i}.{p:q,k,v}.weight [rows:p d] -> m.{i}.qkv [(p rows:p) d]"],
    "fused and transposed": ["l.{i}.{p:q,k,v}.weight [rows:p d] -> m.{i}.qkv [d (p rows:p)]"],
    "stacked": ["l.{i}.e.{e}.{p} [o d] -> m.{i}.{p} [e o d]"],
    "stacked and transposed": ["l.{i}.e.{e}.{p} [o d] -> m.{i}.{p} [e d o]"],
    "stacked by turns": ["l.{i}.e.{e}.{p:gate,up} [o d] -> m.{i}.gate_up [e (o p) d]"],
    "stacked side by side": ["l.{i}.e.{e}.{p:gate,up} [o d] -> m.{i}.gate_up [e d (p o)]"],
    "stacked and cast": ["l.{i}.e.{e}.{p} [o d] -> m.{i}.{p} [e d o] | cast(bf16)"],
    "cast and stacked": ["l.{i}.e.{e}.{p} [o d] | cast(bf16) -> m.{i}.{p} [e d o]"],
    "split": ["l.{i}.fused [a b c] -> m.{i}.{a} [b c]"],
    "split by turns": ["l.{i}.fused [a b c] -> m.{i}.{c} [b a]"],
    "inner axes turned": ["l.{i}.fused [a b c] -> m.{i} [a c b]"],
    "all axes turned": ["l.{i}.fused [a b c] -> m.{i} [c b a] | mul(2)"],
    "cast": ["l.{i}.{p:q,k,v}.weight -> m.{i}.{p} | cast(f16)"],
    "cast and moved": ["l.{i}.fused [a b c] -> m.{i} [b a c] | add(1) | cast(f64)"],
    "added to": ["l.{i}.norm -> m.{i}.norm | add(1)"],
    "two places": ["l.{i}.fused [a b c] -> m.{i} [c a b], n.{i} [a b c]"],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    cs.save(tensors(), path)
    return path


@pytest.mark.parametrize("region", [1, 40, 300, 1 << 20])
@pytest.mark.parametrize("rules", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_files_hold_the_bits_of_the_state_dict(
    source: Path, rules: list[str], region: int, suffix: str, as_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not as_bytes:  # what is this small would move as runs of bytes
        monkeypatch.setattr(execution, "copies_bytes", lambda program: False)
    with cs.open(source) as checkpoint:
        plan = cs.plan(checkpoint, cs.Recipe(rules, rest="keep"))
        out = source.with_name("out" + suffix)
        with open_writer(out, plan.specs) as writer:
            execute(plan.steps, checkpoint, FileSink(writer), lambda count: None, region=region, budget=1 << 12)
        expected = plan.state_dict()
    with cs.open(out) as made:
        assert set(made) == set(expected)
        for key, tensor in expected.items():
            assert bytes(made.read(key)) == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()), key


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (5, 70001), (70001, 5), (257, 512)])
@pytest.mark.parametrize("target", ["w.{e} [b a]", "w [b (e a)]", "w [b e a]", "w [e b a]"])
def test_large_matrices_are_turned_a_panel_at_a_time(
    tmp_path: Path, target: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    whole = [torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8) for _ in range(2)]
    cs.save({f"w.{e}": bits.view(dtype)[..., 0] for e, bits in enumerate(whole)}, tmp_path / "source.pt")
    plan = cs.plan(tmp_path / "source.pt", f"w.{{e}} [a b] -> {target}")
    plan.save(tmp_path / "out.pt")
    with cs.open(tmp_path / "out.pt") as made:
        for key, tensor in plan.state_dict().items():
            assert bytes(made.read(key)) == bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()), key


@pytest.mark.parametrize("order", ["".join(axes) for axes in permutations("abx")])
@pytest.mark.parametrize("axes", ["a b x", "a (b x)"])
@pytest.mark.parametrize("shape", [(9, 130, 120), (300, 7, 260), (70, 1030, 2)])
def test_large_boxes_are_turned_in_every_order(
    tmp_path: Path, axes: str, order: str, shape: tuple[int, int, int]
) -> None:
    whole = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    cs.save({"w": whole.flatten(1) if "(" in axes else whole}, tmp_path / "source.safetensors")
    recipe = cs.Recipe([f"w [{axes}] -> w [{' '.join(order)}]"], dims={"x": shape[2]})
    cs.plan(tmp_path / "source.safetensors", recipe).save(tmp_path / "out.safetensors")
    expected = whole.permute(["abx".index(axis) for axis in order])
    with cs.open(tmp_path / "out.safetensors") as made:
        assert torch.equal(made["w"].load(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("target", ["w.{p} [b a]", "w.{p} [a b]", "w.{p} [b a], v [p b a]"])
def test_large_matrices_are_split_by_turns_and_turned(tmp_path: Path, target: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randint(0, 256, (300, 3 * 311, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0]
    cs.save({"w": whole}, tmp_path / "source.pt")
    plan = cs.plan(tmp_path / "source.pt", cs.Recipe([f"w [a (b p)] -> {target}"], dims={"p": 3}))
    plan.save(tmp_path / "out.pt")
    with cs.open(tmp_path / "out.pt") as made:
        for key, tensor in plan.state_dict().items():
            assert bytes(made.read(key)) == bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()), key


@pytest.mark.parametrize("rules", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("limit", [1, 3, 8, 1000])
def test_regions_fill_each_target_once_and_read_no_element_twice(rules: list[str], limit: int) -> None:
    for step in cs.plan(tensors(), cs.Recipe(rules, rest="keep")).steps:
        cut = cut_of(step.program)
        if cut is None:
            continue
        regions = list(regions_of(cut.layout, limit))
        for number, spec in enumerate(step.program.outputs):
            runs = [(r.start, r.stop) for r in regions if r.target == number]
            assert [0, *(stop for _, stop in runs)] == [*(start for start, _ in runs), spec.numel]
        pieces = [p for r in regions for p in r.pieces]
        assert sum(p.numel for p in pieces) == sum(s.numel for s in step.program.outputs)
        assert (
            sum(extent_of(p.shape, p.source_strides) for p in pieces) <= sum(s.numel for s in step.program.inputs) * 2
        )


def test_a_stack_of_experts_is_cut_by_the_expert() -> None:
    experts = {f"e.{n}": torch.ones(4, 6) for n in range(5)}
    (step,) = cs.plan(experts, "e.{e} [o d] -> e [e d o]").steps
    cut = cut_of(step.program)
    assert cut is not None
    assert [(r.start, r.stop) for r in regions_of(cut.layout, 24)] == [(24 * n, 24 * n + 24) for n in range(5)]
    assert [(r.start, r.stop) for r in regions_of(cut.layout, 60)] == [(0, 48), (48, 96), (96, 120)]


def test_what_is_split_by_turns_is_read_once_as_a_whole() -> None:
    (step,) = cs.plan({"w": torch.ones(6, 4)}, cs.Recipe(["w [(r p) d] -> {p:a,b,c} [r d]"], dims={"p": 3})).steps
    assert cut_of(step.program) is None


def test_a_layout_without_elements_has_no_regions() -> None:
    assert not list(regions_of(Layout.identity([(0, 3)]), 10))


def test_a_value_that_does_not_fit_is_told_of_the_whole_tensor(tmp_path: Path) -> None:
    values = torch.zeros(64)
    values[[3, 40]] = 1e6
    cs.save({"w": values}, tmp_path / "w.safetensors")
    plan = cs.plan(tmp_path / "w.safetensors", "w -> w | cast(f16)")
    writer = open_writer(tmp_path / "out.safetensors", plan.specs)
    with pytest.raises(cs.CheckpointError, match="2 of 64 values") as told, writer:
        execute(plan.steps, plan.checkpoint, FileSink(writer), lambda count: None, region=32)
    assert told.value.diagnostics[0].place == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_small_neighbours_are_read_and_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cs.save({f"w.{i}": torch.randn(i % 5, 7) for i in range(500)}, tmp_path / "w.safetensors")
    plan = cs.plan(tmp_path / "w.safetensors", "w.{i} -> v.{i} | cast(f64)")
    calls: list[str] = []
    read, write = OpenFiles.read_into, Writer.write
    monkeypatch.setattr(OpenFiles, "read_into", lambda *args: (calls.append("read"), read(*args)))
    monkeypatch.setattr(Writer, "write", lambda *args: (calls.append("write"), write(*args)))
    plan.save(tmp_path / "out.safetensors")
    assert sorted(calls) == ["read", "write"]
    with cs.open(tmp_path / "out.safetensors") as made:
        assert all(torch.equal(made[key].load(), tensor) for key, tensor in plan.state_dict().items())


def test_a_value_that_does_not_fit_is_told_of_its_tensor_among_small_neighbours(tmp_path: Path) -> None:
    values = {f"w.{i}": torch.zeros(4) for i in range(9)}
    values["w.7"][2] = 1e6
    cs.save(values, tmp_path / "w.safetensors")
    with pytest.raises(cs.CheckpointError, match="1 of 4 values") as told:
        cs.plan(tmp_path / "w.safetensors", "w.{i} -> w.{i} | cast(f16)").save(tmp_path / "out.safetensors")
    assert told.value.diagnostics[0].place == "w.7"


@dataclass(frozen=True)
class Fails(Op):
    """An op that fails on its third chunk."""

    name = "fails"
    elementwise = True

    def infer(self, specs: Specs) -> Specs:
        return specs

    def run(self, tensors: Tensors) -> Tensors:
        if float(tensors[0].max()) >= 2:
            raise RuntimeError("broken on purpose")
        return tensors


def test_a_failure_in_a_worker_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    cs.save({"w": torch.arange(100.0)}, tmp_path / "w.safetensors")
    plan = cs.plan(tmp_path / "w.safetensors", cs.Recipe(["w -> w | cast(f64)"]))
    program = plan.steps[0].program
    object.__setattr__(program.instructions[-1], "op", Fails())
    writer = open_writer(tmp_path / "out.safetensors", plan.specs)
    with pytest.raises(RuntimeError, match="broken on purpose"), writer:
        execute(plan.steps, plan.checkpoint, FileSink(writer), lambda count: None, region=8)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_first_failure_stops_what_has_not_begun() -> None:
    begun: list[int] = []

    def task(number: int) -> Task:
        def run() -> int:
            begun.append(number)
            if number == 3:
                raise ValueError("the third")
            return 0

        return Task(1, run)

    with pytest.raises(ValueError, match="the third"):
        run_tasks((task(n) for n in range(1000)), lambda count: None)
    assert len(begun) < 100


def test_tasks_never_hold_more_than_the_budget_unless_one_alone_does() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def task(held: int) -> Task:
        def run() -> int:
            with lock:
                now[0] += held
                most[0] = max(most[0], now[0])
            with lock:
                now[0] -= held
            return held

        return Task(held, run)

    sizes = [3, 5, 2, 4, 1, 5] * 20
    done: list[int] = []
    run_tasks(map(task, sizes), done.append, budget=6)
    assert most[0] <= 6
    assert sum(done) == sum(sizes)
    run_tasks(iter([task(50), task(1)]), done.append, budget=6)


def test_the_number_of_intra_op_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    with one_thread_each():
        run_tasks(iter([Task(1, lambda: inside.append(torch.get_num_threads()) or 0)]), lambda count: None)
    assert inside == [1]
    assert torch.get_num_threads() == before


def test_a_source_of_many_computed_steps_is_loaded_once_and_then_let_go(source: Path) -> None:
    with cs.open(source) as checkpoint:
        (step,) = cs.plan(checkpoint, cs.Recipe(["l.0.fused [a b c] -> m.{c} [b a]"], rest="drop")).steps
        loads = Loads(checkpoint.load, [step, step])
        first = loads("l.0.fused")
        loads.done(step)
        assert loads("l.0.fused") is first
        loads.done(step)
        assert not loads.held


@pytest.mark.parametrize(("shape", "strides"), [((70, 80), (1, 70)), ((70, 80), (160, 2)), ((3, 70, 8), (1, 24, 3))])
@pytest.mark.parametrize("wide", [False, True])
def test_a_box_moves_whole_whatever_way_it_takes(shape: tuple[int, ...], strides: tuple[int, ...], wide: bool) -> None:
    box = torch.randn(20000).as_strided(shape, strides)
    target = torch.zeros(*shape[:-1], shape[-1] * (2 if wide else 1))[..., : shape[-1]]
    move_box(box, target)
    assert torch.equal(target, box)
