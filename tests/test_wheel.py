"""The wheel: built, installed by itself into a fresh environment, and started there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ckptsurgery as cs

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_its_recipes_and_its_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "ckptsurgery").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "recipes").rglob("*.toml"):
        assert f"ckptsurgery/_recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"ckptsurgery", f"ckptsurgery-{cs.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # What the package depends on is lent by this environment; the package itself is the installed one.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import ckptsurgery; print(ckptsurgery.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    program = tmp_path / "env" / "bin" / "ckptsurgery"
    assert run(program, "--version", cwd=tmp_path) == f"ckptsurgery {cs.__version__}\n"
    listed = run(program, "recipes", cwd=tmp_path)
    assert all(name in listed for name in cs.list_recipes())
    assert run(program, "recipes", "show", cs.list_recipes()[0], cwd=tmp_path).startswith("schema = 1")
    assert "ckptsurgery demo" in run(program, "demo", "--help", cwd=tmp_path)
    assert "1797" in run(
        python, "-c", "from ckptsurgery.demo.data import load_digits as d; print(len(d()))", cwd=tmp_path
    )
