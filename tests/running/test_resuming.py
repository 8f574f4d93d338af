from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.running.executor import copying
from ckptsurgery.running.fingerprints import fingerprint
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.output import resuming
from ckptsurgery.storage.output.staging import MARK, Writer
from ckptsurgery.storage.output.writing import WriterOptions, open_writer

KEYS = [f"h.{i}.w" for i in range(8)]
RECIPE = cs.Recipe(["h.{i:0..3}.w -> l.{i}.w", "h.{i:4..7}.w -> l.{i}.w | mul(2)"])
OUTS = ["out.safetensors", "new-folder", "old-folder"]


class Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises, at a moment of the test's choosing."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    cs.save({key: torch.full((300, 1024), float(n)) for n, key in enumerate(KEYS)}, path)
    (tmp_path / "old-folder").mkdir()
    return path


def reads_until(patch: pytest.MonkeyPatch, count: int | None) -> list[int]:
    """Interrupt after that many reads of the source; the list grows by one for each read."""
    seen: list[int] = []
    read_file_into, load = Checkpoint.read_file_into, Checkpoint.load

    def counted() -> None:
        if count is not None and len(seen) >= count:
            raise Interrupted
        seen.append(1)

    def reading(self: Checkpoint, file: str, offset: int, buffer: memoryview) -> None:
        counted()
        read_file_into(self, file, offset, buffer)

    def loading(self: Checkpoint, key: str) -> torch.Tensor:
        counted()
        return load(self, key)

    patch.setattr(Checkpoint, "read_file_into", reading)
    patch.setattr(Checkpoint, "load", loading)
    return seen


def save(
    source: Path, out: str, count: int | None = None, recipe: cs.Recipe = RECIPE, resume: bool = True
) -> tuple[int, cs.Report | None]:
    """Reads of the source, and the report unless the run was interrupted after `count` of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CHUNK", 1 << 18)
        seen = reads_until(patch, count)
        with cs.open(source) as checkpoint:
            try:
                shards = "3MB" if "folder" in out else None
                report = cs.plan(checkpoint, recipe).save(source.with_name(out), shards, resume=resume)
            except Interrupted:
                return len(seen), None
        return len(seen), report


def left(source: Path) -> Iterator[str]:
    return (path.name for path in source.parent.rglob(f"*{MARK}*"))


def clear(path: Path) -> None:
    for file in [path, *path.glob("*")]:
        if file.is_file():
            file.unlink()
    if path.name == "new-folder":
        path.rmdir()


@pytest.mark.parametrize("out", OUTS)
def test_an_interrupted_run_is_continued_wherever_it_broke_off(source: Path, out: str) -> None:
    path = source.with_name(out)
    whole, _ = save(source, out)
    clear(path)
    for count in range(1, whole, 3):
        assert save(source, out, count) == (count, None)
        assert not path.is_file()
        assert not path.is_dir() or not [file for file in path.iterdir() if MARK not in file.name]
        rest, report = save(source, out)
        assert rest == whole - count
        assert report is not None
        assert any("resumed: " in note for note in report.notes)
        assert cs.diff(source, path, RECIPE).identical
        assert not list(left(source))
        clear(path)


def test_what_is_made_of_whole_tensors_is_not_made_again(source: Path) -> None:
    recipe = cs.Recipe(["h.{i}.w -> a.{i}, b.{i} | low_rank(2)"])
    whole, _ = save(source, "whole.safetensors", recipe=recipe)
    for count in range(2, whole, 2):
        assert save(source, "out.safetensors", count, recipe) == (count, None)
        rest, report = save(source, "out.safetensors", recipe=recipe)
        assert rest < whole and report is not None
        out = source.with_name("out.safetensors")
        assert out.read_bytes() == source.with_name("whole.safetensors").read_bytes()
        out.unlink()


def test_what_was_discarded_is_left_alone_after_it(source: Path) -> None:
    with cs.open(source) as checkpoint:
        plan = cs.plan(checkpoint, RECIPE)
        options = WriterOptions(overwrite=False, resume=fingerprint(plan, checkpoint, {}))
        writer = open_writer(source.with_name("out.safetensors"), plan.specs, options)
    assert isinstance(writer, resuming.ResumableWriter)
    with pytest.raises(Interrupted), writer:
        assert list(left(source))
        writer.discard()
        assert not list(left(source))
        with pytest.raises(Interrupted), open_writer(source.with_name("out.safetensors"), plan.specs, options) as other:
            mine = sorted(left(source))
            writer.abort()  # the files are another writer's now
            assert mine and sorted(left(source)) == mine
            other.abort()
            raise Interrupted
        raise Interrupted
    assert not list(left(source))


def test_a_run_may_be_interrupted_again_and_again(source: Path) -> None:
    whole, _ = save(source, "whole.safetensors")
    reads = 0
    for _ in range(whole):
        read, report = save(source, "out.safetensors", 2)
        reads += read
        if report is not None:
            break
    assert reads == whole
    assert source.with_name("whole.safetensors").read_bytes() == source.with_name("out.safetensors").read_bytes()


def test_an_interrupted_run_that_was_not_to_be_resumed_leaves_nothing(source: Path) -> None:
    save(source, "out.safetensors", 3, resume=False)
    assert not list(left(source))


def test_a_run_that_wrote_nothing_leaves_nothing(source: Path) -> None:
    save(source, "out.safetensors", 0)
    assert not list(left(source))


def test_another_plan_takes_nothing_over_and_names_what_lies_there(source: Path) -> None:
    save(source, "out.safetensors", 5)
    before = set(left(source))
    _, report = save(source, "out.safetensors", recipe=cs.Recipe(rest="keep"))
    assert report is not None
    assert cs.diff(source, source.with_name("out.safetensors")).identical
    assert set(left(source)) == before
    assert any("unfinished output of another run" in note for note in report.notes)


def test_a_changed_source_takes_nothing_over(source: Path) -> None:
    save(source, "out.safetensors", 5)
    cs.save({key: torch.full((300, 1024), -1.0) for key in KEYS}, source, overwrite=True)
    _, report = save(source, "out.safetensors")
    assert report is not None
    assert cs.diff(source, source.with_name("out.safetensors"), RECIPE).identical


def test_what_the_journal_does_not_say_is_written_again(source: Path) -> None:
    whole, _ = save(source, "whole.safetensors")
    save(source, "out.safetensors", 5)
    (journal,) = source.parent.glob("*.journal")
    head, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([head, *lines])[:-1])  # the last line is cut off, as a crash may leave it
    rest, _ = save(source, "out.safetensors")
    assert rest == whole
    assert cs.diff(source.with_name("whole.safetensors"), source.with_name("out.safetensors")).identical


def test_a_damaged_unfinished_file_is_not_trusted(source: Path) -> None:
    whole, _ = save(source, "whole.safetensors")
    save(source, "out.safetensors", 5)
    (unfinished,) = (p for p in source.parent.glob(f"*{MARK}*") if p.suffix != ".journal")
    with unfinished.open("r+b") as file:
        file.truncate(1000)
    assert save(source, "out.safetensors")[0] == whole


def test_two_runs_do_not_write_one_output(source: Path) -> None:
    save(source, "out.safetensors", 5)
    before = sorted(left(source))
    (path,) = source.parent.glob("*.journal")
    journal = resuming.Journal(source.with_name("out.safetensors"), path.suffixes[-2].partition("tmp-")[2])
    assert journal.path == path
    journal.open()
    with pytest.raises(cs.CheckpointError, match="output-busy"):
        save(source, "out.safetensors")
    assert sorted(left(source)) == before
    journal.close()
    assert save(source, "out.safetensors")[1] is not None


def test_what_cannot_be_resumed_says_so(source: Path) -> None:
    with pytest.raises(cs.CheckpointError, match="not-resumable"):
        cs.plan(source, RECIPE).save(source.with_name("out.pt"), resume=True)
    with pytest.raises(cs.CheckpointError, match="not-resumable"):
        cs.plan({"w": torch.ones(1)}, cs.Recipe(rest="keep")).save(source.with_name("out.safetensors"), resume=True)


def test_syncs_are_few(source: Path) -> None:
    synced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "_SYNC_EVERY", 1 << 20)
        record = resuming.Journal.record
        patch.setattr(resuming.Journal, "record", lambda self, runs: (synced.append(len(runs)), record(self, runs))[1])
        save(source, "out.safetensors", 30)
    assert 2 <= len(synced) <= 12


def test_what_ops_make_is_taken_over_too(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    torch.manual_seed(0)
    cs.save({key: torch.randn(700, 256) for key in KEYS}, source)
    recipe = cs.Recipe(
        [
            "h.0.w, h.1.w -> joined | lerp(0.25)",
            "h.2.w, h.3.w -> turned | slerp(0.5)",
            "h.{i:4..5}.w [r c] -> mean [r c] | mean_over(i)",
            "h.6.w [r c] -> scaled [c r] | mul(3)",
            "h.7.w -> q, s | fp8_quant(per=channel)",
        ]
    )
    whole, _ = save(source, "whole.safetensors", recipe=recipe)
    wanted = source.with_name("whole.safetensors").read_bytes()
    taken = 0
    for count in range(1, whole):
        assert save(source, "out.safetensors", count, recipe) == (count, None)
        rest, report = save(source, "out.safetensors", recipe=recipe)
        assert report is not None and source.with_name("out.safetensors").read_bytes() == wanted
        taken += whole - rest
        clear(source.with_name("out.safetensors"))
    assert taken > whole


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_each_file_of_a_store_counts_for_what_is_resumed(changed: int) -> None:
    store, recipe = fsspec.filesystem("memory"), cs.Recipe(rest="keep")
    folder = f"memory://resuming-{changed}/in"
    cs.save({f"w{n}": torch.full((512,), float(n)) for n in range(3)}, folder, max_shard_size="2kB")
    shard = sorted(name for name in store.find(f"/resuming-{changed}") if name.endswith(".safetensors"))[changed]

    def run() -> str:
        with cs.open(folder) as checkpoint:
            return fingerprint(cs.plan(checkpoint, recipe), checkpoint, {})

    before = run()
    assert run() == before
    store.pipe_file(shard, store.cat_file(shard))
    assert run() != before


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_goes_on_behind_the_targets_that_were_written(count: int, tmp_path: Path) -> None:
    whole = torch.arange(4 * 32 * 128.0).view(128, 128)
    torch.save({"w": whole.T.contiguous().T}, tmp_path / "source.pt")  # no run of bytes, so it is read as a whole
    plan = cs.plan(tmp_path / "source.pt", cs.Recipe(["w [(p r) c] -> {p:a,b,c,d} [r c]"]))
    write, seen = Writer.write, list[int]()

    def writing(self: Writer, file: str, offset: int, data: Any) -> None:
        if len(seen) == count:
            raise Interrupted
        seen.append(1)
        write(self, file, offset, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Writer, "write", writing)
        plan.save(tmp_path / "out.safetensors", resume=True)
    report = plan.save(tmp_path / "out.safetensors", resume=True)
    assert any(f"resumed: {count * 16_384:,} bytes" in note for note in report.notes)
    made = cs.open(tmp_path / "out.safetensors").state_dict()
    assert all(torch.equal(made[key], part) for key, part in zip("abcd", whole.split(32)))
