"""Output appears whole or not at all, says what it holds, and is what others read."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import DTYPES, TensorSpec
from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.output.writing import Writer, WriterOptions, open_writer, parse_size

STATE = {
    "i8": torch.arange(7, dtype=torch.int8),
    "f32": torch.randn(5, 5),
    "empty": torch.empty(0, 3),
    "f64": torch.tensor(0.5, dtype=torch.float64),
    "bf16": torch.randn(3).bfloat16(),
}


def save(path: Path | str, state: Mapping[str, torch.Tensor] = STATE, **options: Any) -> Writer:
    source = open_checkpoint(state)
    with open_writer(path, source.specs, WriterOptions(**options)) as writer:
        for key in writer.order:
            writer.write(writer.places[key].file, writer.places[key].offset, source.read(key))
    return writer


def assert_holds(path: Path, state: Mapping[str, torch.Tensor] = STATE) -> None:
    with open_checkpoint(path) as ckpt:
        loaded = ckpt.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) and loaded[key].dtype == state[key].dtype for key in state)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refused(path: Path | str, specs: Mapping[str, TensorSpec] | None = None, **options: Any) -> list[str]:
    with (
        pytest.raises(CheckpointError) as caught,
        open_writer(path, specs or {"w": TensorSpec([2], "F32")}, WriterOptions(**options)),
    ):
        pass
    assert all(d.help for d in caught.value.diagnostics)
    return [d.code for d in caught.value.diagnostics]


def test_a_file_is_what_the_reference_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = save(path, metadata={"made": "by hand"}, aliases={"tied": "f32"})
    loaded = load_file(path)
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"format": "pt", "made": "by hand", "tied": "f32"}
    assert writer.files == [str(path)]
    with open_checkpoint(path) as ckpt:
        assert [tie.names for tie in ckpt.ties] == [("f32", "tied")]


def test_tensors_lie_aligned_wide_ones_first_and_else_in_the_given_order(tmp_path: Path) -> None:
    state = {f"{name}.{dtype}": torch.zeros(3, dtype=dtype) for name in "ba" for dtype in (torch.int8, torch.float64)}
    writer = save(tmp_path / "x.safetensors", state)
    assert writer.order == ["b.torch.float64", "a.torch.float64", "b.torch.int8", "a.torch.int8"]
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        for key in ckpt:
            extent = ckpt.extent(key)
            assert extent is not None
            assert extent.offset % DTYPES[ckpt[key].dtype].itemsize == 0


@given(data=st.data())
def test_any_specs_make_a_file_that_reads_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    spec = st.builds(
        TensorSpec,
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(["U8", "BF16", "F32", "F64", "C64", "BOOL"]),
    )
    keys = st.text(min_size=1, max_size=4).filter(lambda k: k.isprintable() and k != "__metadata__")
    specs = data.draw(st.dictionaries(keys, spec, max_size=6))
    limit = data.draw(st.none() | st.integers(1, 60))
    raw = {key: data.draw(st.binary(min_size=s.nbytes, max_size=s.nbytes)) for key, s in specs.items()}
    with open_writer(folder / "out", specs, WriterOptions(max_shard_size=limit)) as writer:
        for key in data.draw(st.permutations(list(specs))):
            place = writer.places[key]
            writer.write(place.file, place.offset, raw[key])
    with open_checkpoint(folder / "out") as ckpt:
        assert ckpt.specs == specs
        assert {key: bytes(ckpt.read(key)) for key in ckpt} == raw
        assert limit is None or all(
            sum(e.spec.nbytes for e in ckpt.entries.values() if e.file == file)
            <= max(limit, *(s.nbytes for s in specs.values()))
            for file in ckpt.files
        )


def test_a_folder_is_one_file_until_a_limit_makes_shards(tmp_path: Path) -> None:
    save(tmp_path / "one")
    assert names(tmp_path / "one") == ["model.safetensors"]
    writer = save(tmp_path / "many", max_shard_size=100, aliases={"tied": "f32"})
    assert names(tmp_path / "many") == sorted(Path(file).name for file in writer.files)
    assert names(tmp_path / "many")[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 7 + 100 + 8 + 6, "tied": "f32"}
    assert list(index["weight_map"]) == list(STATE)
    assert_holds(tmp_path / "many", {**STATE, "tied": STATE["f32"]})
    with open_checkpoint(tmp_path / "many") as ckpt:
        state = ckpt.state_dict()
        assert state["tied"] is state["f32"]
        assert list(state) == [*STATE, "tied"]


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_a_torch_suffix_makes_a_file_that_torch_loads(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    save(path, aliases={"tied": "f32"})
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == [*STATE, "tied"]
    assert loaded["tied"].data_ptr() == loaded["f32"].data_ptr()
    assert_holds(path, {**STATE, "tied": STATE["f32"]})
    assert refused(path) == ["output-exists"]


def test_transformers_loads_sharded_tied_output(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    source = open_checkpoint(model)
    tied = {alias: tie.names[0] for tie in source.ties for alias in tie.names[1:]}
    assert tied
    specs = {key: spec for key, spec in source.specs.items() if key not in tied}
    for folder, limit in ((tmp_path / "one", None), (tmp_path / "many", "1kB")):
        with open_writer(folder, specs, WriterOptions(aliases=tied, max_shard_size=limit)) as writer:
            for key in writer.order:
                writer.write(writer.places[key].file, writer.places[key].offset, source.read(key))
        model.config.save_pretrained(folder)
        loaded = GPT2LMHeadModel.from_pretrained(folder)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100}])
@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_a_failure_leaves_nothing_behind(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name.endswith(".safetensors") and options:
        return
    for error in (RuntimeError, KeyboardInterrupt):
        specs = {key: TensorSpec(value.shape, value.dtype) for key, value in STATE.items()}
        with pytest.raises(error), open_writer(tmp_path / "new" / name, specs, WriterOptions(**options)) as writer:
            assert names(tmp_path / "new")
            writer.write(writer.places["i8"].file, writer.places["i8"].offset, b"1234567")
            raise error
        assert names(tmp_path) == []


def test_a_tensor_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="incomplete-output"),
        open_writer(tmp_path / "x.safetensors", {"w": TensorSpec([2], "F32")}),
    ):
        pass
    assert names(tmp_path) == []


def test_nothing_can_be_written_outside_of_a_file(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="write-out-of-range"),
        open_writer(tmp_path / "x.safetensors", {"w": TensorSpec([2], "F32")}) as writer,
    ):
        writer.write(writer.places["w"].file, writer.places["w"].offset + 4, b"12345")


def test_temporary_files_are_no_checkpoint_while_they_are_written(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError), open_writer(tmp_path / "y.safetensors", {"w": TensorSpec([2], "F32")}):
        assert len(names(tmp_path)) == 2
        assert_holds(tmp_path)
        raise RuntimeError


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors")
    save(tmp_path / "out")
    before = (tmp_path / "x.safetensors").read_bytes()
    assert refused(tmp_path / "x.safetensors") == ["output-exists"]
    assert refused(tmp_path / "out") == ["output-exists"]
    assert (tmp_path / "x.safetensors").read_bytes() == before
    other = {"w": torch.ones(2)}
    save(tmp_path / "x.safetensors", other, overwrite=True)
    assert_holds(tmp_path / "x.safetensors", other)
    assert names(tmp_path) == ["out", "x.safetensors"]


def test_an_existing_folder_without_a_checkpoint_keeps_its_companions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_overwriting_a_folder_removes_what_the_old_index_named_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save(folder, max_shard_size=10)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"another")
    former = names(folder)
    save(folder, max_shard_size=100, overwrite=True)
    assert len(names(folder)) < len(former)
    assert_holds(folder)
    save(folder, overwrite=True)
    assert names(folder) == ["model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    assert_holds(folder)
    save(folder, max_shard_size=100, overwrite=True)
    assert "model.safetensors" not in names(folder)
    assert_holds(folder)


def test_an_index_that_points_elsewhere_removes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "precious.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../precious.safetensors"}}')
    save(folder, overwrite=True)
    assert names(folder) == ["model.safetensors"]
    assert names(tmp_path) == ["out", "precious.safetensors"]


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path)
    with open_checkpoint(path) as ckpt:
        held = ckpt.load("f32")
        with open_writer(path, ckpt.specs, WriterOptions(overwrite=True)) as writer:
            for key in writer.order:
                writer.write(writer.places[key].file, writer.places[key].offset, ckpt.read(key))
        assert torch.equal(held, STATE["f32"])
        assert bytes(ckpt.read("i8")) == bytes(range(7))
    assert_holds(path)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    save(tmp_path / "blob.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob.safetensors")
    save(tmp_path / "link.safetensors", {"w": torch.ones(2)}, overwrite=True)
    assert_holds(tmp_path / "blob.safetensors")
    assert_holds(tmp_path / "link.safetensors", {"w": torch.ones(2)})


def test_the_mode_of_output_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


def test_what_the_format_cannot_hold_is_told_at_once(tmp_path: Path) -> None:
    specs = {"c": TensorSpec([2], "C128"), "f": TensorSpec([3], "F4"), "__metadata__": TensorSpec([1], "U8")}
    found = refused(tmp_path / "x.safetensors", specs, aliases={"a": "none", "c": "f"}, metadata={"n": 3})
    assert found == [
        "dtype-not-in-safetensors",
        "odd-packed-shape",
        "reserved-name",
        "alias-clash",
        "alias-of-nothing",
        "bad-metadata",
    ]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("x.safetensors", {"max_shard_size": "1GB"}, "shards-need-a-folder"),
        ("x.pt", {"max_shard_size": "1GB"}, "shards-need-a-folder"),
        ("x.h5", {}, "unsupported-output"),
        ("x", {"max_shard_size": "many"}, "bad-size"),
        ("x", {"max_shard_size": 0}, "bad-size"),
        ("file/x.safetensors", {}, "not-a-folder"),
        ("file/x", {}, "not-a-folder"),
        ("file", {}, "output-exists"),
        ("y" * 300 + ".safetensors", {}, "bad-path"),
        ("a\0b.safetensors", {}, "bad-path"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_written(
    name: str, options: dict[str, Any], code: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("here already")
    assert refused(tmp_path / name, **options) == [code]
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path: Path) -> None:
    huge = {"w": TensorSpec([1 << 55], "F32")}
    assert refused(tmp_path / "x.safetensors", huge) == ["disk-full"]
    assert refused(tmp_path / "out", huge) == ["disk-full"]
    assert names(tmp_path) == []


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """The size of files is limited, which fails as a full disk does: in the system call."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    program = (
        "import sys\nfrom ckptsurgery.errors import CheckpointError\nfrom ckptsurgery.specs import TensorSpec\n"
        "from ckptsurgery.storage.output.writing import WriterOptions, open_writer\n"
        "try:\n    with open_writer(sys.argv[1], {'w': TensorSpec([9000], 'U8')}) as w:\n"
        "        w.write(w.places['w'].file, w.places['w'].offset, bytes(9000))\n"
        "except CheckpointError as error: print(error.diagnostics[0].code)\n"
    )
    for name in ("x.safetensors", "out"):
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=limit)
        assert done.stdout.strip() == "file-too-large"
        assert names(tmp_path) == []


def test_pieces_may_come_from_several_threads_in_any_order(tmp_path: Path) -> None:
    specs = {f"t{i}": TensorSpec([1000], "U8") for i in range(8)}
    with open_writer(tmp_path / "x.safetensors", specs) as writer:

        def fill(i: int) -> None:
            place = writer.places[f"t{i}"]
            for at in reversed(range(0, 1000, 10)):
                writer.write(place.file, place.offset + at, bytes([i]) * 10)

        threads = [threading.Thread(target=fill, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        assert {key: set(ckpt.read(key)) for key in ckpt} == {f"t{i}": {i} for i in range(8)}


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_relative_paths_and_trailing_slashes(in_folder: Path) -> None:
    save("x.safetensors")
    save("out/")
    save("deep/er/y.safetensors")
    save("v1.0/")
    assert names(in_folder) == ["deep", "out", "v1.0", "x.safetensors"]
    assert_holds(in_folder / "deep" / "er")


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", "0", "1e9", "5 i", 0, -1, True, 2.5])
def test_a_size_that_is_none_is_refused(text: Any) -> None:
    if text == 2.5:
        assert parse_size("2.5kB") == 2500
    else:
        with pytest.raises(CheckpointError, match="bad-size"):
            parse_size(text)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name, max_shard_size=50)
    for file in names(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name, near", [("m.safetensor", "m.safetensors"), ("m.ckp", "m.ckpt"), ("m.PTT", "m.pt")])
def test_a_misspelt_suffix_is_no_folder(tmp_path: Path, name: str, near: str) -> None:
    with pytest.raises(cs.CheckpointError) as error:
        cs.save({"w": torch.ones(2)}, tmp_path / name)
    (found,) = error.value.diagnostics
    assert found.code == "unsupported-output" and near in found.help and not list(tmp_path.iterdir())
    cs.save({"w": torch.ones(2)}, f"{tmp_path / name}/")
    assert list(cs.open(tmp_path / name)) == ["w"]


@pytest.mark.parametrize("name", ["model-v1.5", "run.final", "my.model"])
def test_a_dot_in_a_folders_name_is_a_dot(tmp_path: Path, name: str) -> None:
    cs.save({"w": torch.ones(2)}, tmp_path / name)
    assert list(cs.open(tmp_path / name)) == ["w"]


def test_a_link_that_leads_nowhere_is_not_replaced_unasked(tmp_path: Path) -> None:
    link = tmp_path / "out.safetensors"
    link.symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(cs.CheckpointError) as refused:
        cs.save({"x": torch.ones(1)}, link)
    assert refused.value.diagnostics[0].code == "output-exists" and link.is_symlink()
    cs.save({"x": torch.ones(1)}, link, overwrite=True)
    assert cs.open(link).state_dict()["x"].item() == 1


def test_weights_that_stay_in_an_overwritten_folder_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    cs.save({"x": torch.ones(1)}, folder)
    torch.save({"old": torch.ones(1)}, folder / "pytorch_model.bin")
    report = cs.plan({"x": torch.zeros(1)}, cs.Recipe(rest="keep")).save(folder, overwrite=True)
    assert [note for note in report.notes if "pytorch_model.bin" in note and "stay" in note]
    (folder / "pytorch_model.bin").unlink()
    again = cs.plan({"x": torch.ones(9)}, cs.Recipe(rest="keep")).save(folder, overwrite=True, max_shard_size=8)
    assert not [note for note in again.notes if "stay" in note]
