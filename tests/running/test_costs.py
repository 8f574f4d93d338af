"""What a plan says it costs is what it takes: bytes read and written to the last one, memory within a factor of two."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.planning.costing import CHUNK, REGION
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.output.staging import Writer
from ckptsurgery.storage.sources.files import OpenFiles

MIB = 1 << 20
RULES = {
    "rename": ["l.{i}.{r...} -> m.{i}.{r...}"],
    "cast": ["l.{i}.{r...} -> m.{i}.{r...} | cast(bf16)"],
    "two places": ["l.{i}.{r...} -> m.{i}.{r...}, n.{i}.{r...}"],
    "transposed": ["l.{i}.{p} [a b] -> m.{i}.{p} [b a]"],
    "stacked": ["l.{i}.{p} [a b] -> m.{p} [i a b]"],
    "stacked and transposed": ["l.{i}.{p} [a b] -> m.{p} [i b a]"],
    "fused by turns": ["l.{i}.{p:a,b,c} [a b] -> m.{i} [(a p) b]"],
    "fused and cast": ["l.{i}.{p:a,b,c} [a b] -> m.{i} [(p a) b] | cast(f16)"],
    "split by turns": ["l.{i}.{p} [(a two) b] -> m.{i}.{p}.{two:x,y} [b a]"],
    "merged in blocks": ["l.{i}.a, l.{i}.b, l.{i}.c -> m.{i} | task_arithmetic(0.5)"],
    "merged after one pass": ["l.{i}.a, l.{i}.b -> m.{i} | slerp(0.3)", "l.{i}.c -> m.{i}.c"],
    "merged after two passes": ["l.{i}.a, l.{i}.b, l.{i}.c -> m.{i} | ties(0.3)"],
    "dropped": ["l.0.{p} -> m.{p}"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("costs") / "source"
    cs.save({f"l.{i}.{p}": torch.randn(128, 96) for i in range(3) for p in "abc"}, path, "300kB")
    return path


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_bytes_read_and_written_are_what_the_plan_said(
    source: Path, tmp_path: Path, rules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, written = [], []
    loading = threading.local()
    read_into, load, write = OpenFiles.read_into, Checkpoint.load, Writer.write

    def counted_read(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        if not getattr(loading, "now", False):
            read.append(len(buffer))
        read_into(self, path, offset, buffer)

    def counted_load(self: Checkpoint, key: str) -> torch.Tensor:
        read.append(self.specs[key].nbytes)  # read now, or mapped to be read later: the whole tensor is wanted
        loading.now = True
        try:
            return load(self, key)
        finally:
            loading.now = False

    def counted_write(self: Writer, file: str, offset: int, data: memoryview) -> None:
        written.append(memoryview(data).nbytes)
        write(self, file, offset, data)

    copy = Writer.copy

    def counted_copy(self: Writer, file: str, offset: int, source: int, start: int, nbytes: int) -> int:
        done = copy(self, file, offset, source, start, nbytes)
        read.append(done)
        written.append(done)
        return done

    monkeypatch.setattr(Writer, "copy", counted_copy)
    with cs.open(source) as checkpoint:
        plan = cs.plan(checkpoint, cs.Recipe(rules, rest="drop", dims={"two": 2} if "two" in rules[0] else {}))
        monkeypatch.setattr(OpenFiles, "read_into", counted_read)
        monkeypatch.setattr(Checkpoint, "load", counted_load)
        monkeypatch.setattr(Writer, "write", counted_write)
        report = plan.save(tmp_path / "out.safetensors")
    assert (sum(read), sum(written)) == (plan.cost.bytes_read, plan.cost.bytes_written)
    assert report.bytes_written == plan.cost.bytes_written


def test_tied_tensors_are_written_once_and_the_cost_says_so(tmp_path: Path) -> None:
    shared = torch.ones(40, 10)
    cs.save({"a": shared, "b": shared, "c": torch.ones(3)}, tmp_path / "tied.safetensors")
    plan = cs.plan(tmp_path / "tied.safetensors", "{k} -> m.{k}")
    report = plan.save(tmp_path / "out.safetensors")
    assert plan.cost.bytes_written == report.bytes_written == 1612
    assert plan.cost.bytes_read == 1612


def test_copies_hold_one_block_however_large_they_are() -> None:
    sizes = {"w": cs.TensorSpec([1 << 20, 1 << 10], "F32")}
    assert cs.plan(sizes, "w -> x").cost.peak_memory == CHUNK


def test_what_can_be_cut_holds_a_region_a_core_and_not_the_tensor() -> None:
    sizes = {f"e.{i}": cs.TensorSpec([4096, 1024], "BF16") for i in range(64)}
    stacked = cs.plan(sizes, "e.{i} [a b] -> e [i b a]").cost
    assert stacked.least_memory <= 2 * 4096 * 1024 * 2
    cast = cs.plan(sizes, "e.{i} -> e.{i} | cast(f16)").cost
    assert cast.least_memory <= 2 * REGION


def test_too_little_memory_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    plan = cs.plan(source, cs.Recipe(["l.{i}.{p} [a b] -> m.{i}.{p} [b a]"]))
    least = plan.cost.least_memory
    with pytest.raises(cs.PlanError, match="too-much-memory") as told:
        plan.save(tmp_path / "out.safetensors", max_memory=least - 1)
    assert f"{least:,} bytes" in str(told.value)
    assert not list(tmp_path.iterdir())
    plan.save(tmp_path / "out.safetensors", max_memory=least)


PEAK = """
import sys, torch, ckptsurgery as cs
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
plan = cs.plan(sys.argv[1], sys.argv[2])
warm = cs.plan({"w": torch.ones(4, 4)}, "w [a b] -> w [b a] | cast(f16)").save(sys.argv[3] + ".warm.safetensors")
before = peak()
plan.save(sys.argv[3])
print(plan.cost.peak_memory, peak() - before)
"""


@pytest.mark.parametrize(
    "rule",
    [
        "l.{i} -> m.{i}",
        "l.{i} -> m.{i} | cast(bf16)",
        "l.{i} [a b] -> m.{i} [b a]",
        "l.{i} [a b] -> m [i b a]",
        "l.{i} [a b] -> m.{i} [b a] | cast(f16)",
    ],
)
def test_peak_memory_is_within_a_factor_of_two_and_16_mib(tmp_path: Path, rule: str) -> None:
    cs.save({f"l.{i}": torch.ones(2048, 2048) for i in range(8)}, tmp_path / "source.safetensors")
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(tmp_path / "source.safetensors"),
        rule,
        str(tmp_path / "out.safetensors"),
    ]
    said, took = map(int, subprocess.check_output(command, text=True).split())
    assert took <= 2 * said + 16 * MIB
    assert said <= 2 * took + 16 * MIB


@pytest.mark.parametrize("rule", ["l.{i}.{p} -> m.{i}.{p}", "l.{i}.{p} [a b] -> m.{p} [i a b]"])
def test_what_only_moves_bytes_imports_no_torch(source: Path, tmp_path: Path, rule: str) -> None:
    code = (
        "import sys, ckptsurgery as cs; cs.plan(sys.argv[1], sys.argv[2]).save(sys.argv[3]);"
        "print([m for m in ('torch', 'numpy', 'tqdm') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(source), rule, str(tmp_path / "out.safetensors")]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_each_file_is_opened_once_for_its_data(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = OpenFiles._open
    monkeypatch.setattr(OpenFiles, "_open", lambda self, path: (opened.append(path), really(self, path))[1])
    plan = cs.plan(source, cs.Recipe(RULES["cast"], rest="drop"))
    plan.save(tmp_path / "out.safetensors")
    assert sorted(opened) == sorted(set(opened)) == sorted(plan.checkpoint.files)


@pytest.mark.parametrize(
    "rule",
    [
        "l.{i}.{p} [a b] -> m.{i}.{p} [b a]",
        "l.{i}.{p} [a b] -> m.{p} [i b a]",
        "l.{i}.{p} [(a two) b] -> m.{i}.{p}.{two:x,y} [b a]",
    ],
)
def test_what_only_moves_elements_imports_no_torch(source: Path, tmp_path: Path, rule: str) -> None:
    code = (
        "import sys, ckptsurgery as cs;"
        "recipe = cs.Recipe([sys.argv[2]], dims={'two': 2} if 'two' in sys.argv[2] else {});"
        "cs.plan(sys.argv[1], recipe).save(sys.argv[3]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(source), rule, str(tmp_path / "out.safetensors")]
    assert subprocess.check_output(command, text=True) == "False\n"


def test_a_matrix_that_is_turned_is_held_once() -> None:
    cost = cs.plan({"w": cs.TensorSpec([8192, 8192], "BF16")}, "w [a b] -> w [b a]").cost
    assert cost.bytes_read == cost.bytes_written == 8192 * 8192 * 2
    assert cost.least_memory <= 8192 * 8192 * 2 + 4 * MIB
