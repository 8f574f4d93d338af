"""Values of odd kinds, one by one: tensors that are not plain memory, records that are not trusted, names that meet."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from operator import eq
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.modeling.defaults import DefaultInitialisation
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage.contents import Entry
from ckptsurgery.storage.formats.format import Announced
from ckptsurgery.storage.metadata_records import VERSIONS, recorded, versions_in
from ckptsurgery.storage.mirrors import leaf_spec, parts_of
from ckptsurgery.storage.output import safetensors_writer
from ckptsurgery.storage.output.torch_writer import TorchZipWriter
from ckptsurgery.storage.places.by_rank import mounts_by_rank
from ckptsurgery.storage.plain_memory import bare, oddity
from ckptsurgery.storage.sources.byte_source import MemoryBuffer, ProcessMemory, read_run
from ckptsurgery.storage.sources.parts import PartOfSource
from ckptsurgery.storage.unpickling.inert import Ordered


class Own(torch.Tensor):
    def detach(self) -> Own:  # type: ignore[override]
        return self


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_is_called_so() -> None:
    found = oddity(torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.quint8))
    assert found is not None and found[:2] == ("a quantised tensor (torch.quint8)", "tensor.dequantize()")


def test_a_subclass_in_a_transform_is_wrapped() -> None:
    seen = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(oddity(torch.nn.Parameter(tensor)) or oddity(tensor.as_subclass(Own)))
        return tensor * 1

    torch.func.vmap(look)(torch.ones(2, 3))
    assert [odd.kind for odd in seen if odd] == ["a tensor that a function transform wraps"]


def test_a_subclass_that_detaches_to_itself_becomes_plain() -> None:
    assert type(bare(torch.ones(2).as_subclass(Own))) is torch.Tensor


def test_a_dtype_without_a_name_is_named() -> None:
    odd = torch.empty(2, dtype=torch.bits8)
    assert leaf_spec(odd) is None
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open({"w": odd, "v": torch.ones(2)})
    (problem,) = caught.value.diagnostics
    assert problem.place == "w" and problem.headline.startswith("'w': ") and "bits8" in problem.headline


def test_a_part_of_an_ordered_mapping_is_one_too() -> None:
    tree = Ordered()
    tree.update({"b": 1, "a": [2]})
    tree.attributes = {"_metadata": 3}
    made = parts_of(tree)
    made["c"] = 4
    assert type(made) is Ordered and made.attributes == {"_metadata": 3}
    assert (list(made), list(tree)) == (["b", "a", "c"], ["b", "a"]) and made["a"] is tree["a"]


@pytest.mark.parametrize("text", [None, "{", '{"norm": "2"}', '{"norm": true}', "[2]", "[" * 100_000])
def test_versions_that_make_no_sense_are_none(text: str | None) -> None:
    assert versions_in({} if text is None else {VERSIONS: text}, ["norm.weight"]) is None


@pytest.mark.parametrize("metadata", [None, 3, "text", {}, {"": 2}, {3: {"version": 2}}, {"a": {"version": True}}])
def test_metadata_that_tells_no_versions_is_not_recorded(metadata: Any) -> None:
    assert recorded(metadata) == {}


def test_a_part_of_a_source_is_a_source() -> None:
    part = PartOfSource(MemoryBuffer("a buffer", b"0123456789"), 3, 4)
    assert part.identity == (*part.whole.identity, 3, 4)
    assert bytes(read_run(part, 1, 3)) == b"456"
    for read in (lambda: read_run(part, 1, 4), lambda: part.read_into([(1, memoryview(bytearray(4)))])):
        with pytest.raises(cs.CheckpointError, match=r"truncated-file.*ends at byte 4, 1 byte early"):
            read()
    part.close()
    with pytest.raises(OSError, match="memory of a process cannot be opened"):
        ProcessMemory().open()


def test_two_files_of_a_rank_are_not_mounts() -> None:
    names = ["mp_rank_00", "mp_rank_01"]
    below = ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"]
    assert len(mounts_by_rank(names, lambda: below, "x")) == 2
    assert mounts_by_rank(names, lambda: [*below, "mp_rank_01/other.pt"], "x") == {}


def test_a_hidden_index_is_not_a_checkpoint(tmp_path: Path) -> None:
    cs.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    assert list(cs.open(tmp_path)) == ["w"]


def test_a_scalar_takes_a_short_record_of_msgpack(tmp_path: Path) -> None:
    values = {"f": torch.tensor(1.5), "i": torch.tensor(3, dtype=torch.int8), "w": torch.ones(3)}
    cs.save(values, tmp_path / "x.msgpack")
    record = b"\x93\x90\xa7float32\xc4\x04" + b"\0\0\xc0\x3f"
    assert len(record) == 16  # fixext 16, as the format's specification calls it, of type 1
    assert b"\xa1f\xd8\x01" + record in (tmp_path / "x.msgpack").read_bytes()
    with cs.open(tmp_path / "x.msgpack") as checkpoint:
        assert all(torch.equal(checkpoint.load(key), value) for key, value in values.items())


def test_a_header_that_readers_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "MAX_HEADER", 100)
    with pytest.raises(cs.CheckpointError, match=r"(?s)header-too-large.*and readers accept 100.*max_shard_size"):
        cs.save({f"w{n}": torch.ones(2) for n in range(9)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_not_a_local_output(tmp_path: Path) -> None:
    from ckptsurgery.storage.output.writing import names_folder

    with pytest.raises(cs.CheckpointError, match=r"(?s)unsupported-output.*'s3://b/x.pt' is an address.*out/"):
        names_folder("s3://b/x.pt", Path("s3://b/x.pt"))


def written(path: Path, extras: dict[str, Any], key: str = "w") -> tuple[Any, list[str]]:
    writer = TorchZipWriter(Announced(path, {key: TensorSpec([2], "F32")}, extras=extras))
    with writer:
        writer.write(writer.places[key].file, writer.places[key].offset, bytes(8))
    return torch.load(path, weights_only=True), writer.left_out


@pytest.mark.parametrize(
    ("extras", "expected"),
    [
        ({"a": 1, "a.b": 2}, {"a": 1, "a.b": 2}),
        ({"a.b": 2, "a": 1}, {"a": 1, "a.b": 2}),
        ({"x.a.b": 2, "x.a": 1}, {"x": {"a": 1}, "x.a.b": 2}),
        ({"a": {"b": 1}, "a.b": 2, "a.c": 3}, {"a": {"b": 1, "c": 3}, "a.b": 2}),
    ],
)
def test_paths_that_meet_are_all_kept(tmp_path: Path, extras: dict[str, Any], expected: dict[str, Any]) -> None:
    found, left_out = written(tmp_path / "x.pt", extras)
    assert {key: value for key, value in found.items() if key != "state_dict"} == expected
    assert left_out == []


def test_extras_that_cannot_be_stored_are_told(tmp_path: Path) -> None:
    extras = {
        "kept": Entry(TensorSpec([2], "F32"), tensor=torch.tensor([1.0, 2.0])),
        "packed": Entry(TensorSpec([4], "F6_E2M3"), "x"),
        "meta": torch.ones(2, device="meta"),
        "state_dict.a": 1,
    }
    found, left_out = written(tmp_path / "x.pt", extras)
    assert left_out == ["meta", "packed", "state_dict.a"]
    assert torch.equal(found["kept"], torch.tensor([1.0, 2.0])) and set(found) == {"state_dict", "kept"}
    found, left_out = written(tmp_path / "y.pt", {"m._extra_state": 3}, "m._extra_state")
    assert left_out == ["m._extra_state"] and found["m._extra_state"].shape == (2,)


def test_numbers_beside_the_model_are_turned_round(tmp_path: Path) -> None:
    values = torch.arange(5, dtype=torch.int32)
    (tmp_path / "big").write_bytes(b"head" + values.numpy().byteswap().tobytes())
    entry = Entry(TensorSpec([5], "I32"), str(tmp_path / "big"), 4, None, True)
    assert torch.equal(written(tmp_path / "x.pt", {"n": entry})[0]["n"], values)


def test_a_model_is_as_it_was_after_its_hooks_registered_more() -> None:
    class Growing(torch.nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            self.register_buffer("seen", torch.ones(1), persistent=False)
            self.register_parameter("more", torch.nn.Parameter(torch.ones(1)))

    model = Growing(2, 2)
    for name in ("seen", "more"):
        delattr(model, name)
    before = dict(model.named_parameters())
    with DefaultInitialisation(model) as defaults:
        assert defaults.draw("weight", 0)[0].shape == (2, 2)
    assert dict(model.named_buffers()) == {} and list(model._parameters) == ["weight", "bias"]
    assert all(tensor is before[name] for name, tensor in model.named_parameters())
    assert model._non_persistent_buffers_set == set()


@pytest.mark.parametrize("writes", [torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree))])
def test_a_long_record_is_read_from_where_it_lies(writes: Callable[..., object], tmp_path: Path) -> None:
    notes = [bytes([number]) * 10_000 for number in range(3)]
    weights = numpy.arange(4.0)
    writes(
        {"model": {"w": torch.from_numpy(weights) if writes is torch.save else weights}, "notes": notes}, tmp_path / "x"
    )
    with cs.open(tmp_path / "x") as checkpoint:
        assert list(map(eq, checkpoint.extras["notes"], notes)) == [True] * 3
