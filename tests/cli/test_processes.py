"""The program in processes of its own: what it imports, and what becomes of it when somebody pulls the plug."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

PROGRAM = [sys.executable, "-m", "ckptsurgery"]
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    cs.save({f"h.{n}.w": torch.full((2, 2), float(n)) for n in range(3)}, tmp_path / "old.safetensors")
    return tmp_path / "old.safetensors"


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A checkpoint that is worth going on with: 1 GiB of zeros that take no room on the disk."""
    size = 64 * MIB
    header: dict[str, object] = {
        f"h.{n}.w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(16)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 16 * size)
    return tmp_path / "huge.safetensors"


def modules_after(*arguments: str) -> set[str]:
    """What is imported once the command is done."""
    code = (
        "from ckptsurgery.cli import main\nsys.argv = ['ckptsurgery', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code"
    )
    return modules_of(code, *arguments)


def modules_of(code: str, *arguments: str) -> set[str]:
    """What is imported once the code has run."""
    code += "\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys\n{code}", *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


def strangers(modules: set[str]) -> set[str]:
    """Packages from outside the standard library."""
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"__main__"}


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "SRC"],
        ["inspect", "SRC", "--json"],
        ["inspect", "SRC", "--tree", "--filter", "h.{i}"],
        ["doctor", "SRC", "--headers"],
        ["ties", "SRC"],
        ["plan", "SRC", "--rule", "h.{i}.w -> l.{i}.w"],
        ["plan", "SRC", "--rule", "h.{i}.w [a b] -> l [i b a]"],
        ["convert", "SRC", "OUT", "--rule", "h.{i}.w -> l.{i}.w", "--check"],
        ["convert", "SRC", "OUT", "--rule", "h.{i}.w [a b] -> l [i a b]"],
        ["convert", "SRC", "OUT", "--resume"],
        ["diff", "SRC", "SRC"],
        ["recipes"],
        ["recipes", "match", "SRC"],
    ],
)
def test_looking_planning_and_moving_bytes_import_the_standard_library_and_typer_alone(
    source: Path, command: list[str]
) -> None:
    names = {"SRC": str(source), "OUT": str(source.with_name("out.safetensors"))}
    found = modules_after(*(names.get(word, word) for word in command))
    assert strangers(found) - {"ckptsurgery"} == strangers(modules_of("import typer"))


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["inspect", "SRC"], "reporting"),
        (["inspect", "SRC", "--tree", "--all"], "reporting"),
        (["inspect", "SRC", "--json"], "reporting"),
        (["ties", "SRC"], "reporting"),
        (["diff", "SRC", "SRC"], "comparing"),
        (["doctor", "SRC", "--headers"], "diagnosing"),
    ],
)
def test_looking_imports_nothing_that_plans_or_writes(source: Path, command: list[str], part: str) -> None:
    found = modules_after(*(str(source) if word == "SRC" else word for word in command))
    parts = {name.split(".")[1] for name in found if name.startswith("ckptsurgery.")}
    ground = {"boxes", "errors", "many_objects", "named_objects", "narrowing", "specs", "toml_writing", "wording"}
    ground |= {"notebook_view", "tables"}
    assert parts - {"running"} - ground == {"cli", "language", "storage", part}
    assert {name for name in found if name.startswith("ckptsurgery.running.")} <= {"ckptsurgery.running.progress"}
    written = {f"ckptsurgery.storage.output.{name}" for name in ("writing", "staging")}
    assert not found & {*written, "ckptsurgery.language.keys"}


STRUCK = """
import os, signal, sys
from ckptsurgery.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background hands on that it is ignored
number, left = int(sys.argv.pop(1)), [int(sys.argv.pop(1))]
def striking(call, size):
    def struck(*args):
        left[0] -= size(args)
        if left[0] < 0:
            left[0] = 1 << 60
            os.kill(os.getpid(), number)
        return call(*args)
    return struck
os.pwrite = striking(os.pwrite, lambda args: len(args[1]))
os.copy_file_range = striking(os.copy_file_range, lambda args: args[2])
main()
"""


def struck(source: Path, number: int, after: int, *options: str) -> subprocess.CompletedProcess[str]:
    """A conversion that gets a signal when it has written so many bytes, however fast the machine is."""
    out = source.with_name("out.safetensors")
    command = [sys.executable, "-c", STRUCK, str(int(number)), str(after), "convert", str(source), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_no_file_and_no_traceback(huge: Path, number: int, code: int) -> None:
    done = struck(huge, number, 8 * MIB)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert [path.name for path in huge.parent.iterdir()] == [huge.name]


def test_a_killed_conversion_is_resumed(huge: Path) -> None:
    assert struck(huge, signal.SIGINT, 300 * MIB, "--resume").returncode == 130
    assert not huge.with_name("out.safetensors").exists()
    (journal,) = huge.parent.glob(".*.journal")
    assert journal.read_text().count("\n") > 1
    assert struck(huge, signal.SIGKILL, 100 * MIB, "--resume").returncode == -signal.SIGKILL
    out = huge.with_name("out.safetensors")
    done = subprocess.run(
        [*PROGRAM, "convert", str(huge), str(out), "--resume"], capture_output=True, text=True, check=True
    )
    assert "resumed: " in done.stdout
    assert cs.diff(huge, out).identical
    assert sorted(path.name for path in huge.parent.iterdir()) == ["huge.safetensors", "out.safetensors"]
    out.unlink()


def test_who_stops_reading_is_not_complained_to(source: Path) -> None:
    cs.save({f"key.number.{n}.{'x' * n}": torch.zeros(1) for n in range(900)}, source, overwrite=True)
    process = subprocess.Popen(
        [*PROGRAM, "inspect", str(source), "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() in (141, -signal.SIGPIPE)


def test_results_go_to_stdout_and_problems_to_stderr(source: Path) -> None:
    done = subprocess.run([*PROGRAM, "inspect", str(source), "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["tensors"]) == 3
    done = subprocess.run([*PROGRAM, "plan", str(source), "--rule", "x -> y"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error[")


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(columns: int) -> None:
    environment = {**os.environ, "COLUMNS": str(columns)}
    for command in ([], ["inspect"], ["plan"], ["convert"], ["adapters", "merge"], ["recipes"], ["demo"]):
        done = subprocess.run([*PROGRAM, *command, "--help"], capture_output=True, text=True, env=environment)
        assert max(map(len, done.stdout.split("\n"))) <= columns
