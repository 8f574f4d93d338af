"""Every bad file that has a name is refused with place and remedy, or read rightly; and nothing of it ever runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nasty import CASES, MARKER
from targets import TARGETS, refusal, walk

import ckptsurgery as cs


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_refused_by_name_or_read_rightly(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    codes, places = {"read"}, {str(path)}
    try:
        walk(path, write=False)
    except cs.CheckpointError as error:
        refusal(error)
        codes = {diagnostic.code for diagnostic in error.diagnostics}
        places = {diagnostic.place for diagnostic in error.diagnostics}
    assert len(codes) == 1
    assert codes <= set(case.codes)
    assert all(place and place.startswith(str(tmp_path)) for place in places)  # the file, or another of its folder
    assert not (tmp_path / MARKER).exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [name for name in CASES if "paths" in name])
def test_paths_without_end_are_not_flattened(name: str, tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match="nested-too-deep") as caught:
        cs.open(CASES[name].make(tmp_path), subtree="")
    assert len(str(caught.value)) < 2000


def test_a_tensor_beside_a_call_is_whole(tmp_path: Path) -> None:
    with cs.open(CASES["a tensor, and beside it a call of torch.hub"].make(tmp_path)) as checkpoint:
        assert checkpoint.load("w").tolist() == [0, 1, 2, 3]


def test_a_shard_behind_a_link_is_read(tmp_path: Path) -> None:
    with cs.open(CASES["an index whose shard is a link out of the folder"].make(tmp_path)) as checkpoint:
        assert checkpoint["w"].load().tolist() == [0]


def test_readers_keep_their_promise_over_thousands_of_mutations(repository: Path, tmp_path: Path) -> None:
    """In a process whose memory is limited, and with an audit hook that sees what it opens, removes or runs."""
    command = [sys.executable, str(repository / "scripts" / "fuzz" / "mutate.py"), "--cases", "300"]
    halves = list(TARGETS)[::2], list(TARGETS)[1::2]
    running = []
    for half in ([*halves[0], "named"], halves[1]):
        only = [word for name in half for word in ("--only", name)]
        running.append(subprocess.Popen([*command, *only], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors for _, errors in done)
    lines = [json.loads(line) for out, _ in done for line in out.splitlines()]
    assert {line["reader"] for line in lines} == {*TARGETS, "named"}
    assert all(line["accepted"] and line["refused"] for line in lines)
    print(f"bad files: {sum(line['accepted'] + line['refused'] for line in lines):,} tried")


def test_readers_keep_their_promise_where_coverage_leads(repository: Path, tmp_path: Path) -> None:
    """A bounded run of the coverage-guided fuzzer, with a seed; the long one is started by hand."""
    script = repository / "scripts" / "fuzz" / "coverage_guided.py"
    running = []
    for reader in ("safetensors", "torch-zip", "pickle"):
        command = [sys.executable, str(script), reader, "-runs=800", "-seed=1", "-timeout=60", "-print_final_stats=1"]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        )
    for process in running:
        output = process.communicate()[0]
        assert process.returncode == 0, output[-5000:]
        assert "stat::number_of_executed_units: 800" in output
