from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, and where it left its files."""
    folder = tmp_path_factory.mktemp("demo") / "files"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ckptsurgery", "demo", "--folder", str(folder)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, folder


def test_the_transfer_is_exact(told: tuple[str, Path]) -> None:
    (difference,) = re.findall(r"differ by (\S+) at most", told[0])
    assert float(difference) < 1e-5


def test_what_was_transferred_learns_the_new_task_better(told: tuple[str, Path]) -> None:
    (scratch, transferred) = (float(n) for n in re.findall(r"mean +([\d.]+)% +([\d.]+)%", told[0])[0])
    assert transferred > scratch + 5


def test_the_report_accounts_for_the_head(told: tuple[str, Path]) -> None:
    assert re.search(r"initialised +2 tensors", told[0])
    assert re.search(r"dropped +2 tensors", told[0])


def test_the_files_are_kept_on_request_and_can_be_used(told: tuple[str, Path]) -> None:
    folder = told[1]
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "ours.toml"]
    command = ["plan", str(folder / "last.pt"), "--recipe", str(folder / "ours.toml"), "--json"]
    command += ["--target", "ckptsurgery.demo.models:Student"]
    done = subprocess.run([sys.executable, "-m", "ckptsurgery", *command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["initialised"].keys() == {"classifier.weight", "classifier.bias"}
