"""What metadata says of ties is told from what it says of all else; what is written here is read as it was meant."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model

import ckptsurgery as cs
from ckptsurgery.running.saving import FRAMEWORKS
from ckptsurgery.storage.metadata_records import aliases_in, declared, own_metadata
from ckptsurgery.storage.output.writing import WriterOptions, open_writer

W = torch.arange(6.0)


@pytest.mark.parametrize(
    ("metadata", "tied"),
    [
        ({"head.weight": "embed.weight"}, {"head.weight"}),
        ({"decoder.kernel": "embed.weight"}, {"decoder.kernel"}),
        ({"tied": "plain"}, {"tied"}),
        ({"model": "embed.weight"}, set()),
        ({"format": "plain"}, set()),
        ({"head.weight": "gone.weight"}, set()),
        ({"plain": "embed.weight"}, set()),
        ({"head.weight": "embed.weight", "ckptsurgery.ties": "[]"}, set()),
        ({"head": "embed.weight", "b.c": "plain", "ckptsurgery.ties": '["head"]'}, {"head"}),
        ({"head.weight": "embed.weight", "ckptsurgery.ties": "no list"}, {"head.weight"}),
        ({"ckptsurgery.ties": '["embed.weight", "ckptsurgery.ties", "gone"]'}, set()),
    ],
)  # fmt: skip
def test_a_pair_is_a_tie_where_the_name_could_be_a_parameter_or_is_marked(
    metadata: dict[str, str], tied: set[str], tmp_path: Path
) -> None:
    save_file({"embed.weight": W, "plain": W + 1}, tmp_path / "x.safetensors", metadata=metadata)
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.keys() - {"embed.weight", "plain"} == tied
        assert checkpoint.metadata == {k: v for k, v in metadata.items() if k not in tied and k != "ckptsurgery.ties"}


names = st.sampled_from(["a", "b", "m.a", "m.b", "n/a", "format", "pt"])


@given(st.dictionaries(names, names), st.sets(names, min_size=1), st.dictionaries(names, names))
def test_what_is_declared_is_what_is_read(metadata: dict[str, str], kept: set[str], ties: dict[str, str]) -> None:
    aliases = {alias: at for alias, at in ties.items() if alias not in kept and at in kept}
    told = declared(metadata, aliases, kept)
    assert aliases_in(told, kept) == aliases
    assert own_metadata(told, aliases) == metadata


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 24}])
@pytest.mark.parametrize("plain", [{}, {"model.name": "embed.weight"}, {"model": "embed.weight"}])
@pytest.mark.parametrize("alias", ["head", "head.weight"])
def test_every_writer_keeps_ties_and_metadata_apart(
    options: dict[str, Any], plain: dict[str, str], alias: str, tmp_path: Path
) -> None:
    specs = {"embed.weight": cs.TensorSpec([6], "F32"), "b": cs.TensorSpec([6], "F32")}
    with open_writer(
        tmp_path / "x", specs, WriterOptions(aliases={alias: "embed.weight"}, metadata=plain, **options)
    ) as writer:
        for place in writer.places.values():
            writer.write(place.file, place.offset, bytes(24))
    for path in ([tmp_path / "x"], [tmp_path / "x"] * 2):
        source = path[-1]
        with cs.open(source) as checkpoint:
            assert [tie.names for tie in checkpoint.ties] == [("embed.weight", alias)]
            assert {k: v for k, v in checkpoint.metadata.items() if k != "format"} == plain
        cs.save(cs.open(source), tmp_path / "y", overwrite=True, **options)
        assert cs.diff(source, tmp_path / "y").identical
        assert cs.open(tmp_path / "y").metadata == cs.open(source).metadata


def test_a_change_in_place_keeps_them_apart(tmp_path: Path) -> None:
    name = "a.name.that.is.long.enough.to.leave.room.for.what.is.said.of.ties.in.the.new.header"
    save_file({name: W}, tmp_path / "x.safetensors", metadata={"a.name": "e"})
    recipe = cs.Recipe([f"{name} -> e"], tie={"t.x": "e"})
    cs.plan(tmp_path / "x.safetensors", recipe).save(tmp_path / "x.safetensors", in_place=True)
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        assert set(checkpoint) == {"e", "t.x"}
        assert checkpoint.metadata["a.name"] == "e"


def test_what_save_model_writes_is_read(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "x.safetensors"), metadata={"model": "embed.weight"})
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        assert [set(tie.names) for tie in checkpoint.ties] == [{"embed.weight", "head.weight"}]


def test_an_index_may_mark_its_ties_too(tmp_path: Path) -> None:
    cs.save({"a.w": W, "b.w": W + 1}, tmp_path / "x", max_shard_size=24)
    index = tmp_path / "x" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["metadata"] |= {"c.w": "a.w", "d.w": "b.w", "ckptsurgery.ties": '["d.w"]'}
    index.write_text(json.dumps(told))
    with cs.open(tmp_path / "x") as checkpoint:
        assert set(checkpoint) == {"a.w", "b.w", "d.w"}
        assert checkpoint.metadata["c.w"] == "a.w"


keys = st.sampled_from(["a", "m.a", "n/a", "format", "total_size", "head", "head.weight", "b.weight"]) | st.text(
    st.characters(codec="utf-8"), max_size=3
)
values = st.sampled_from(["a.weight", "b.weight", "plain", "pt", "[]", "{}", '["head"]', "mine"]) | st.text(
    st.characters(codec="utf-8"), max_size=3
)
aliases = st.dictionaries(
    st.sampled_from(["head", "head.weight", "m.a", "total_size", "a", "format"]), st.sampled_from(["a.weight", "plain"])
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(keys, values), aliases, st.sampled_from([None, 24]), st.booleans())
def test_ties_and_the_owners_metadata_both_come_back(
    metadata: dict[str, str], ties: dict[str, str], shard: int | None, provenance: bool
) -> None:
    weights = {"a.weight": W, "plain": W + 1, "b.weight": W + 2}
    frameworks = [("format", name) for name in FRAMEWORKS]  # an output is torch's, whatever its source was
    kept = {k: v for k, v in metadata.items() if (k, v) not in frameworks}
    with TemporaryDirectory() as folder:
        source = Path(folder, "source.safetensors")
        save_file(weights, source, metadata=declared(metadata, {}, weights))
        outputs = [(source, cs.Recipe(rest="keep", tie=ties))] + [(None, cs.Recipe(rest="keep"))] * 2
        for number, (start, recipe) in enumerate(outputs):
            out = Path(folder, f"out{number}" + ("" if shard else ".safetensors"))
            plan = cs.plan(start or source, recipe)
            plan.save(out, max_shard_size=shard, provenance=provenance)
            with cs.open(out) as found:
                told = {k: v for k, v in found.metadata.items() if k != "ckptsurgery.provenance"}
                assert {k: v for k, v in told.items() if (k, v) not in frameworks} == kept
                groups = {frozenset(tie.names) for tie in found.ties}
                assert groups == {
                    frozenset({base, *(alias for alias, of in ties.items() if of == base)}) for base in ties.values()
                }
                assert set(found) == {*weights, *ties}
            source = out


def test_a_key_in_the_place_of_the_record_is_refused_where_a_record_is_needed() -> None:
    with pytest.raises(cs.CheckpointError, match="reserved-metadata"):
        declared({"ckptsurgery.ties": "mine", "head": "a note"}, {"head": "a.weight"}, {"a.weight"})


def test_of_many_ties_that_need_the_record_eight_are_listed() -> None:
    aliases = {f"a.{n}": "b" for n in range(10)}
    with pytest.raises(cs.CheckpointError) as caught:
        declared({"ckptsurgery.ties": "mine", "a.0": "a note"}, aliases, {"b"})
    (problem,) = caught.value.diagnostics
    assert "10 tied names" in problem.headline and problem.notes == tuple(f"a.{n} -> b" for n in range(8))


def test_a_framework_is_restated_and_said_and_any_other_format_is_its_owners(tmp_path: Path) -> None:
    for said, written in (("np", "pt"), ("pt", "pt"), ("v2 of mine", "v2 of mine")):
        save_file({"a": W}, tmp_path / "x.safetensors", metadata={"format": said})
        report = cs.save(tmp_path / "x.safetensors", tmp_path / "y.safetensors", overwrite=True)
        assert cs.open(tmp_path / "y.safetensors").metadata == {"format": written}
        assert any("became 'pt'" in note for note in report.notes) == (said == "np")
