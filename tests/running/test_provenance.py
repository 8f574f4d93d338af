"""An output can say what it was made from, and goes back by that alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import ckptsurgery as cs

KEY = "ckptsurgery.provenance"
RULES = ["h.{i}.{p:q,k}.w [rows:p d] -> l.{i}.qk [(p rows:p) d]", "wte [v d] -> embed [d v]"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shapes = {"wte": (6, 4), "h.0.q.w": (8, 4), "h.0.k.w": (2, 4), "h.1.q.w": (8, 4), "h.1.k.w": (2, 4)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    cs.save(state, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


@pytest.mark.parametrize(
    ("out", "options"), [("o.safetensors", {}), ("o", {"max_shard_size": 150}), ("o.pt", {}), ("o", {"resume": True})]
)
def test_an_output_goes_back_by_its_provenance_alone(source: Path, out: str, options: dict[str, Any]) -> None:
    before = source.read_bytes()
    made = cs.plan(source, RULES).save(source.parent / out, provenance=True, **options)
    told = json.loads(cs.open(source.parent / out).metadata[KEY])
    assert told["sources"] == [
        {"file": "s.safetensors", "nbytes": len(before), "blake2b": hashlib.blake2b(before, digest_size=32).hexdigest()}
    ]
    assert (told["version"], "rows:p" in told["recipe"]) == (cs.__version__, True)
    assert sum(KEY.encode() in Path(file).read_bytes() for file in made.files) == 1
    source.unlink()
    back = cs.inverse(source.parent / out)
    back.save(source.parent / "back.safetensors", check=True)
    assert (source.parent / "back.safetensors").read_bytes() == before


def test_target_config_dims_and_dtype_are_part_of_it(source: Path) -> None:
    target = {
        "embed": cs.TensorSpec([6, 4], "F32"),
        "r.0": cs.TensorSpec([2, 4], "F32"),
        "r.1": cs.TensorSpec([2, 4], "F32"),
    }
    rules = ["wte -> embed", "? h.{i:0..n}.k.w -> r.{i}"]
    small = cs.plan(source, cs.Recipe(rules, drop=["h.{i}.q.w"]), target=target, config={"a": 1}, dims={"n": 1})
    small.save(source.parent / "o.safetensors", provenance=True)
    with pytest.raises(cs.PlanError, match="dropped"):
        cs.inverse(source.parent / "o.safetensors")
    with cs.open(source) as checkpoint:
        cast = cs.plan(checkpoint, "{k...} -> m.{k...}", dtype="f64")
        cast.save(source.parent / "wide.safetensors", provenance=True)
    told = json.loads(cs.open(source.parent / "wide.safetensors").metadata[KEY])
    assert told["dtype"] == "f64"


def test_ties_go_there_and_back(tmp_path: Path) -> None:
    w = torch.randn(3, 4)
    cs.save({"a": w, "b": w}, tmp_path / "s.safetensors")
    cs.plan(tmp_path / "s.safetensors", "{k} [x y] -> m.{k} [y x]").save(tmp_path / "o.safetensors", provenance=True)
    cs.inverse(tmp_path / "o.safetensors").save(tmp_path / "back.safetensors")
    with cs.open(tmp_path / "back.safetensors") as checkpoint:
        assert [tie.names for tie in checkpoint.ties] == [("a", "b")]
        assert torch.equal(checkpoint.load("a"), w)


def test_provenance_of_a_source_is_not_that_of_its_copy(source: Path) -> None:
    cs.plan(source, RULES).save(source.parent / "o.safetensors", provenance=True)
    report = cs.plan(source.parent / "o.safetensors", "{k...} -> {k...}").save(source.parent / "p.safetensors")
    assert "provenance" in str(report)
    assert KEY not in cs.open(source.parent / "p.safetensors").metadata


@pytest.mark.parametrize("text", ["", "3", "{}", '{"recipe": "= =", "target": null, "headers": {}, "config": null}'])
def test_provenance_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata={KEY: text})
    with pytest.raises(cs.CkptSurgeryError):
        cs.inverse(tmp_path / "x.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(cs.CheckpointError, match="no-provenance"):
        cs.inverse(tmp_path / "y.safetensors")


def test_the_command_goes_back_without_a_recipe(source: Path) -> None:
    before, folder = source.read_bytes(), source.parent
    command = [sys.executable, "-m", "ckptsurgery", "convert"]
    there = [str(source), str(folder / "o"), *(word for rule in RULES for word in ("--rule", rule)), "--provenance"]
    subprocess.run([*command, *there], check=True, capture_output=True)
    source.unlink()
    subprocess.run([*command, str(folder / "o"), str(source), "--inverse", "--check"], check=True, capture_output=True)
    assert source.read_bytes() == before


def parts(told: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each part of a JSON value."""
    yield at
    for name, value in told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ():
        yield from parts(value, (*at, name))


def edited(told: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    whole = json.loads(json.dumps(told))
    part = whole
    for name in at[:-1]:
        part = part[name]
    part[at[-1]] = value
    return whole


def test_provenance_that_was_edited_is_told_or_leads_back_all_the_same(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    out, broken = source.parent / "o.safetensors", source.parent / "x.safetensors"
    cs.plan(source, cs.Recipe(RULES, dims={"d": "config.d"}), config={"d": 4}).save(out, provenance=True)
    told, tensors, before = json.loads(cs.open(out).metadata[KEY]), load_file(out), cs.open(source).state_dict()
    ends: set[str] = set()
    for at in parts(told):
        for value in (None, -1, 7, "x", [], ["F32", 3], {}, {"a": 1}):
            save_file(tensors, broken, metadata={KEY: json.dumps(edited(told, at, value))})
            try:
                back = cs.inverse(broken).state_dict()
                assert all(torch.equal(before[key], tensor) for key, tensor in back.items()), at
            except cs.CkptSurgeryError as error:
                ends.add(error.diagnostics[0].code)
                assert error.diagnostics[0].help
    # Headers that fit each other and not the tensors are an output that was changed since.
    assert ends == {"bad-provenance", "shape-mismatch"}


def test_an_output_that_was_changed_since_is_told(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = source.parent / "o.safetensors"
    cs.plan(source, RULES).save(out, provenance=True)
    metadata, tensors = cs.open(out).metadata, load_file(out)
    for state in (
        {**tensors, "more": torch.ones(1)},
        {key: tensor for key, tensor in tensors.items() if key != "embed"},
        {**tensors, "embed": tensors["embed"][:2].clone()},
    ):
        save_file(state, out, metadata=metadata)
        with pytest.raises(cs.PlanError) as found:
            cs.inverse(out)
        assert {"more", "embed"} & set(" ".join(map(str, found.value.diagnostics)).replace("'", " ").split())


@pytest.mark.parametrize(
    "name",
    [
        "hf_mixtral__litgpt",
        "hf_llama__gguf",
        "meta_llama__hf4_llama",
        "hf5_gpt2__nanogpt",
        "timm_swin__hf4_swin",
        "hf4_llama_tied__hf5",
        "hub_deepseek_v3__hf5",
    ],
)
def test_real_recipes_lead_back_bit_for_bit(name: str, tmp_path: Path, corpus: Any) -> None:
    """From shards to other shards and back again, and no recipe is named on the way back."""
    case = corpus.pair(name)
    state = case.numbered()
    size = sum(tensor.nbytes for tensor in state.values())
    cs.save(state, tmp_path / "s", max_shard_size=size // 3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    plan = cs.plan(tmp_path / "s", corpus.recipe_for(name), config=case.config)
    plan.save(tmp_path / "o", max_shard_size=size // 4, provenance=True)
    (tmp_path / "s").rename(tmp_path / "gone")
    cs.inverse(tmp_path / "o").save(tmp_path / "s", max_shard_size=size // 3, check=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before


@pytest.fixture
def corpus(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real conversions that recipes are tested with."""
    monkeypatch.syspath_prepend(str(repository / "tests" / "recipes"))
    import conversions

    return conversions


@pytest.mark.parametrize("form", ["npy", "json", "memory", "stage", "scope"])
def test_numbers_of_files_are_part_of_it(source: Path, form: str) -> None:
    folder = source.parent
    numpy.save(folder / "ids.npy", numpy.array([2, 0, 1, 3, 5, 4]))
    (folder / "ids.json").write_text("[2, 0, 1, 3, 5, 4]")
    text = 'schema = 1\nrest = "keep"\nrules = ["wte [v d] -> wte [v d] | take(v, ids)"]\n'
    (folder / "own.toml").write_text(f'{text}[data]\nids = "ids.{"json" if form == "json" else "npy"}"\n')
    recipe = cs.load_recipe(folder / "own.toml")
    if form == "memory":
        recipe = recipe.replace(data={"ids": torch.tensor([2, 0, 1, 3, 5, 4])})
    elif form == "stage":
        recipe = cs.Recipe(["h.{r...} -> x.{r...}"], rest="keep").then(recipe)
    elif form == "scope":
        recipe = recipe.scoped("", "m.")
    cs.plan(source, recipe).save(folder / "o" / "o.safetensors", provenance=True)
    for name in ("ids.npy", "ids.json", "own.toml"):
        (folder / name).unlink()
    back = cs.inverse(folder / "o" / "o.safetensors").state_dict()
    assert cs.diff(source, back).identical
