from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.running.checking import check_output
from ckptsurgery.running.streaming import output_aliases

W = torch.arange(24.0).reshape(6, 4)
RECIPES = [
    cs.Recipe(rest="keep"),
    cs.Recipe(["h.{i}.w [(p a) b] -> l.{i}.{p:q,k,v}.w [a b]"], rest="keep"),
    cs.Recipe(["h.{i}.w [a b] -> all [i b a]"], rest="keep"),
    cs.Recipe(["h.{i}.w -> h.{i}.w | cast(bf16)"], rest="keep"),
    cs.Recipe(["s -> s"], rest="keep", tie={"t": "s"}),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    cs.save({"h.0.w": W, "h.1.w": W + 1, "tied": W, "s": torch.tensor(3), "e": torch.zeros(0, 2)}, path)
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out"])
def test_what_was_written_passes_the_check(source: Path, recipe: cs.Recipe, out: str) -> None:
    report = cs.plan(source, recipe).save(source.with_name(out), check=True)
    assert any("read back" in note for note in report.notes)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_any_changed_bit_is_found_and_its_key_named(source: Path, recipe: cs.Recipe) -> None:
    plan, out = cs.plan(source, recipe), source.with_name("out.safetensors")
    plan.save(out)
    with cs.open(out) as written:
        places = {key: extent for key in written if (extent := written.extent(key)) and extent.nbytes}
        alias = {name: set(tie.names) for tie in written.ties for name in tie.names}
    whole = out.read_bytes()
    for key, extent in places.items():
        broken = bytearray(whole)
        broken[extent.offset + extent.nbytes - 1] ^= 1
        out.write_bytes(broken)
        with pytest.raises(cs.CheckpointError, match="check-values-differ") as error:
            check_output(plan, plan.checkpoint, out, [str(out)], output_aliases(plan, plan.checkpoint))
        assert set(error.value.diagnostics[0].notes) & alias.get(key, {key})


def test_missing_keys_other_shapes_and_lost_ties_are_all_named(source: Path) -> None:
    plan, out = cs.plan(source, cs.Recipe(rest="keep")), source.with_name("out.safetensors")
    cs.save({"h.0.w": W, "h.1.w": W.bfloat16(), "tied": W.clone(), "e": torch.zeros(0, 2), "more": W + 2}, out)
    with pytest.raises(cs.CheckpointError) as error:
        check_output(plan, plan.checkpoint, out, [str(out)], output_aliases(plan, plan.checkpoint))
    codes = [d.code.removeprefix("check-") for d in error.value.diagnostics]
    assert codes == ["keys-missing", "keys-unexpected", "specs-differ", "ties-lost"]


def test_replacing_the_source_itself_can_be_checked(source: Path) -> None:
    before = cs.open(source).state_dict()
    cs.plan(source, cs.Recipe(rest="{k...} -> m.{k...}")).save(source, overwrite=True, check=True)
    assert all(torch.equal(t, before[k.removeprefix("m.")]) for k, t in cs.open(source).state_dict().items())
