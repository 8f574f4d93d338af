"""Folders: indices are allow-lists, shards belong together, and what is not plain is asked back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.output.transactions import MARK, RECORD, Replacement

A, B = torch.arange(3.0), torch.ones(2)
C = B.clone()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B, "unlisted": C}, tmp_path / "model-00002-of-00002.safetensors")
    index(tmp_path, {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"})
    (tmp_path / "config.json").write_text('{"layers": 2}')
    return tmp_path


def index(folder: Path, weight_map: object, **metadata: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 20, **metadata}, "weight_map": weight_map}))
    return path


def codes(source: Path, **options: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    return [d.code for d in caught.value.diagnostics]


def test_an_index_is_an_allow_list_in_its_own_order(folder: Path) -> None:
    for source in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(source) as ckpt:
            assert list(ckpt) == ["b", "a"]
            assert ckpt.config == {"layers": 2}
            assert torch.equal(ckpt.load("a"), A)


def test_without_an_index_all_files_are_one_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert list(open_checkpoint(folder)) == ["a", "b", "unlisted"]
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert codes(folder) == ["missing-shard"]


def test_a_key_in_two_shards_is_an_error(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"a": A}, tmp_path / "m-00002-of-00002.safetensors")
    assert codes(tmp_path) == ["duplicate-key"]


def test_two_files_of_different_names_are_two_checkpoints(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "one.safetensors")
    save_file({"c": A}, tmp_path / "two.safetensors")
    assert codes(tmp_path) == ["ambiguous-folder"]
    assert list(open_checkpoint(tmp_path, by_file=True)) == ["one/a", "one/b", "two/c"]


def test_all_missing_shards_are_told_at_once(folder: Path) -> None:
    index(folder, {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert [d.code for d in caught.value.diagnostics] == ["missing-shard"] * 2
    assert "'x.safetensors'" in str(caught.value)
    assert "(2 keys)" in str(caught.value)


def test_a_key_missing_from_its_shard_is_named(folder: Path) -> None:
    index(folder, {"a": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a' is in 'model-00002-of-00002\.safetensors', which does not hold it"):
        open_checkpoint(folder)


OUTSIDE = ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:x", "", ".", "sub/", "\\\\host\\x", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(name: str, folder: Path) -> None:
    assert codes(index(folder, {"a": name})) == ["unsafe-index"]


def test_links_are_followed_as_the_cache_of_the_hub_needs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for number, file in enumerate(folder.iterdir()):
        blob = file.rename(folder / f"blob{number}")
        (snapshot / file.name).symlink_to(blob)
    with open_checkpoint(snapshot) as ckpt:
        assert list(ckpt) == ["b", "a"]
        assert ckpt.config == {"layers": 2}
    with open_checkpoint(snapshot / "model-00001-of-00002.safetensors") as shard:
        assert shard.config == {"layers": 2}


def test_shards_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": A}, tmp_path / "sub" / "x.safetensors")
    index(tmp_path, {"a": "sub/x.safetensors"})
    assert list(open_checkpoint(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"weight_map": ', "bad-index"),
        ('{"weight_map": {"a": 1}}', "bad-index"),
        ('{"weight_map": []}', "bad-index"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "duplicate-key"),
        ('{"metadata": {}}', "json-page"),
        ("", "empty-file"),
    ],
)
def test_an_index_that_is_none_is_refused(text: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert codes(tmp_path) == [code]


def test_aliases_of_an_index_are_tied_keys(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index(folder, shards, head="a", b="a", note="no such key")
    with open_checkpoint(folder) as ckpt:
        assert list(ckpt) == ["a", "b", "head"]
        assert [(tie.names, tie.kind) for tie in ckpt.ties] == [(("a", "head"), "alias")]
        assert ckpt.nbytes == 20
        state = ckpt.state_dict()
        assert state["head"] is state["a"]
        assert ckpt.metadata == {"note": "no such key"} | {"b": "a"}


def test_an_alias_in_a_shards_own_metadata_counts_when_the_index_lists_it(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors", metadata={"head": "a"})
    index(tmp_path, {"a": "x.safetensors", "head": "x.safetensors"})
    with open_checkpoint(tmp_path) as ckpt:
        assert ckpt.aliases == {"head": "a"}
    index(tmp_path, {"a": "x.safetensors"})
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    save_file({"safe": A}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
    assert list(open_checkpoint(tmp_path)) == ["safe"]


def test_two_checkpoints_side_by_side_are_asked_back(folder: Path) -> None:
    save_file({"a": A}, folder / "model.safetensors")
    assert codes(folder) == ["ambiguous-folder"]
    assert list(open_checkpoint(folder / "model.safetensors")) == ["a"]


def test_an_index_of_the_usual_name_is_preferred_to_a_variant(folder: Path) -> None:
    save_file({"half": A.half()}, folder / "model.fp16.safetensors")
    variant = folder / "model.safetensors.index.fp16.json"
    variant.write_text(json.dumps({"weight_map": {"half": "model.fp16.safetensors"}}))
    assert list(open_checkpoint(folder)) == ["b", "a"]
    assert list(open_checkpoint(variant)) == ["half"]


def test_torch_files_in_folders(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": B}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert list(open_checkpoint(tmp_path)) == ["a", "b"]
    weight_map = {"b": "pytorch_model-00002-of-00002.bin", "a": "pytorch_model-00001-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_checkpoint(tmp_path)) == ["b", "a"]


def test_of_several_torch_files_none_is_guessed(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "best.pt")
    assert list(open_checkpoint(tmp_path)) == ["a"]
    torch.save({"a": B}, tmp_path / "last.ckpt")
    assert codes(tmp_path) == ["ambiguous-folder"]
    torch.save({"usual": B}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path)) == ["usual"]


def test_by_file_puts_the_stem_before_the_keys(tmp_path: Path) -> None:
    torch.save({"w": A}, tmp_path / "consolidated.00.pth")
    torch.save({"w": B}, tmp_path / "consolidated.01.pth")
    (tmp_path / "params.json").write_text("{}")
    with open_checkpoint(tmp_path, by_file=True) as ckpt:
        assert list(ckpt) == ["consolidated.00/w", "consolidated.01/w"]
        assert torch.equal(ckpt.load("consolidated.01/w"), B)
    save_file({"w": A}, tmp_path / "consolidated.00.safetensors")
    assert codes(tmp_path, by_file=True) == ["duplicate-mount"]


def test_hidden_and_temporary_files_are_no_checkpoint(folder: Path) -> None:
    save_file({"z": A}, folder / f".model.safetensors{MARK}1-2")
    (folder / "._model.safetensors").write_bytes(b"resource fork")
    assert list(open_checkpoint(folder)) == ["b", "a"]


def test_a_save_that_was_decided_counts_before_its_files_have_their_names(folder: Path) -> None:
    """The record says what the folder holds: here one file takes the place of all shards, and nothing is renamed."""
    save_file({"new": torch.ones(2)}, folder / f".model.safetensors{MARK}1-2")
    old = sorted(path.name for path in folder.glob("*.safetensors"))
    renamed = ((f".model.safetensors{MARK}1-2", "model.safetensors"),)
    Replacement(folder, ("model.safetensors.index.json",), renamed, tuple(old)).write()
    assert list(open_checkpoint(folder)) == ["new"]
    decided = Replacement.read(folder)
    assert decided is not None
    decided.carry_out()
    assert list(open_checkpoint(folder)) == ["new"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", "a\0b", 3])
def test_a_record_that_reaches_out_of_its_folder_is_refused(name: object, folder: Path) -> None:
    for told in ([name, "model.safetensors"], [f".x{MARK}1", name]):
        (folder / RECORD).write_text(json.dumps({"hidden": [], "renamed": [told], "removed": []}))
        assert codes(folder) == ["bad-record"]
    (folder / RECORD).write_text(json.dumps({"hidden": [], "renamed": [], "removed": [name]}))
    assert codes(folder) == ["bad-record"]


def test_a_subtree_is_entered_and_its_prefix_stripped(folder: Path) -> None:
    save_file({"m.a": A, "m.b.c": B, "mm": C, "m.": B + 1}, folder / "x.safetensors", metadata={"m.tied": "m.a"})
    with open_checkpoint(folder / "x.safetensors", subtree="m") as ckpt:
        assert set(ckpt) == {"a", "b.c", "tied"}
        assert ckpt.aliases == {"tied": "a"}
    assert set(open_checkpoint(open_checkpoint(folder / "x.safetensors"), subtree="m.b")) == {"c"}
    assert codes(folder / "x.safetensors", subtree="n") == ["missing-subtree"]


def test_a_config_that_is_none_is_left_alone(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert open_checkpoint(folder).config is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.npz", "b.npz"), "several files of other formats"),
        (("x/model.safetensors", "y/model.safetensors"), "its weights in folders below"),
    ],
)
def test_a_folder_without_weights_at_the_top_says_what_is_there(
    names: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not even read")
    with pytest.raises(CheckpointError, match=f"holds {words}"):
        open_checkpoint(tmp_path)


def test_series_of_shards_side_by_side_are_listed_with_what_to_do(tmp_path: Path) -> None:
    for stem in ("model", "other"):
        for number in (1, 2):
            save_file({f"{stem}{number}": A}, tmp_path / f"{stem}-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    (problem,) = caught.value.diagnostics
    assert problem.code == "ambiguous-folder"
    assert [note for note in problem.notes if "1 more shards, which no index joins: move the other models" in note]
