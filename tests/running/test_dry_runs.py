"""A dry run refuses what the run would refuse, says what it would write, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs

W = {"a.weight": torch.ones(4, 3), "b.weight": torch.zeros(3, 4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    cs.save(W, tmp_path / "in" / "m.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"new": 1}')
    state = {"state": {0: {"exp_avg": torch.ones(4, 3)}, 1: {"exp_avg": torch.ones(3, 4)}}, "param_groups": []}
    torch.save({"model": W, "optimizer": state}, tmp_path / "in" / "m.pt")
    return tmp_path / "in" / "m.safetensors"


def listed(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


TURNED = ["{k}.weight [x y] -> {k}.weight [y x]"]
CASES: list[tuple[str, str, list[str] | str, dict[str, Any], str | None]] = [
    ("a file", "o.safetensors", TURNED, {}, None),
    ("a folder", "o", TURNED, {"max_shard_size": 50, "companions": True}, None),
    ("what is there", "in/m.safetensors", TURNED, {}, "output-exists"),
    ("what is there, replaced", "in/m.safetensors", TURNED, {"overwrite": True}, None),
    ("shards in a file", "o.safetensors", TURNED, {"max_shard_size": 50}, "shards-need-a-folder"),
    ("companions of a file", "o.safetensors", TURNED, {"companions": True}, "companions-need-a-folder"),
    ("memory", "o.safetensors", TURNED, {"max_memory": 3}, "too-much-memory"),
    ("a format", "o.onnx", TURNED, {}, "unsupported-output"),
    ("in place", "in/m.safetensors", ["{k}.weight -> {k}.w"], {"in_place": True}, None),
    ("in place, bytes", "in/m.safetensors", TURNED, {"in_place": True}, "in-place-bytes"),
    ("two that do not go together", "o.safetensors", TURNED, {"resume": True, "sync": False}, "bad-argument"),
]


@pytest.mark.parametrize(("out", "rules", "options", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_dry_run_is_the_run_but_for_the_writing(
    source: Path, out: str, rules: list[str], options: dict[str, Any], code: str | None
) -> None:
    root = source.parent.parent
    plan, before = cs.plan(source, rules), listed(root)
    told = []
    for dry_run in (True, False):
        try:
            told.append(plan.save(root / out, dry_run=dry_run, **options))
        except cs.CkptSurgeryError as error:
            told.append(str(error))
            assert code in [d.code for d in error.diagnostics]
        if dry_run:
            assert listed(root) == before
    if code is not None:
        assert told[0] == told[1]
    else:
        dry, real = told
        assert dry.ledger == real.ledger and dry.files == real.files and "dry run" in dry.notes[-1]
        assert dry.bytes_written == real.bytes_written and listed(root) != before


def test_trees_that_would_no_longer_fit_are_told(source: Path) -> None:
    plan = cs.plan(source.with_suffix(".pt"), TURNED)
    for dry_run in (True, False):
        with pytest.raises(cs.PlanError, match="optimizer"):
            plan.save(source.with_name("o.pt"), dry_run=dry_run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_companions_replace_others_where_that_is_asked_for(source: Path, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"old": 1}')
    cs.plan(source, TURNED).save(out, overwrite=overwrite, companions=True)
    assert (out / "config.json").read_text() == ('{"new": 1}' if overwrite else '{"old": 1}')


def test_a_folder_over_itself_keeps_its_companions(source: Path) -> None:
    folder = source.parent
    cs.plan(source, TURNED).save(folder, overwrite=True, companions=True)
    assert (folder / "config.json").read_text() == '{"new": 1}'
