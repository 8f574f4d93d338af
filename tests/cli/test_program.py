from __future__ import annotations

import io
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from ckptsurgery.cli.output import complain, show
from ckptsurgery.cli.program import app
from ckptsurgery.cli.recipe_from_options import dims_from, pairs_from
from ckptsurgery.errors import CheckpointError, Diagnostic

COMMANDS = ["inspect", "plan", "convert", "diff", "ties", "recipes", "recipes show", "recipes match", "demo"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "ckptsurgery", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_the_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"ckptsurgery {version('ckptsurgery')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="ckptsurgery")
    assert result.exit_code == 0
    assert f"\n  ckptsurgery {command}" in result.output


def test_every_command_is_in_the_overview() -> None:
    overview = run("--help").stdout
    assert all(f"\n  {command} " in overview for command in COMMANDS if " " not in command)


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["convert", "a"], ["nothing"], ["ties", "a", "--nothing"], ["recipes", "show"]]
)
def test_wrong_usage_exits_with_2_and_says_how_to_ask(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_start_up_imports_nothing_heavy() -> None:
    code = "import sys, ckptsurgery.cli.program; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "numpy", "tqdm", "huggingface_hub", "rich", "transformers"]
    assert subprocess.check_output([sys.executable, "-c", code, *heavy], text=True) == "[]\n"


def test_name_value_options_are_read_or_refused() -> None:
    assert pairs_from(["a = b.c", "d=e=f"], "--tie", "x=y") == {"a": "b.c", "d": "e=f"}
    for wrong in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(typer.BadParameter):
            pairs_from(wrong, "--tie", "x=y")


def test_dims_are_numbers_lists_tables_or_expressions() -> None:
    texts = ["n=4", "b=[2, 2]", 'rows={"q": 8, "k": 2}', "g=config.kv ?? 1"]
    assert dims_from(texts) == {"n": 4, "b": [2, 2], "rows": {"q": 8, "k": 2}, "g": "config.kv ?? 1"}


def test_a_checkpoint_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show("key\x1b[2Jname \u202egnp")
    complain(CheckpointError(Diagnostic("bad-key", "a key with \x07 in it")))
    captured = capsys.readouterr()
    assert captured.out == "key\\x1b[2Jname \\u202egnp\n"
    assert captured.err == "error[bad-key]: a key with \\x07 in it\n"


@pytest.mark.parametrize("looked_at", [True, False])
def test_findings_and_complaints_are_coloured_where_a_person_looks(
    looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    problem = Diagnostic("bad-key", "a key", notes=("error: none",), help="mend it", severity="warning")
    for name, say in (("stdout", lambda: show(problem)), ("stderr", lambda: complain(CheckpointError(problem)))):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        monkeypatch.setattr(stream, "isatty", lambda: looked_at)
        monkeypatch.setattr(sys, name, stream)
        say()
        stream.seek(0)
        mark, title, help = "warning[bad-key]", ": a key", " = help: mend it"
        if looked_at:
            mark, title = f"\x1b[33m\x1b[1m{mark}\x1b[0m", f"\x1b[1m{title}\x1b[0m"
            help = f"\x1b[36m{help}\x1b[0m"
        assert stream.read() == f"{mark}{title}\n   error: none\n{help}\n"


def test_what_the_terminal_cannot_spell_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    show("├ w")
    stream.seek(0)
    assert stream.read() == "\\u251c w\n"


SOURCE_OPTIONS = {"--subtree", "--component", "--file", "--download"}
WITHOUT_MOUNTS = {"adapters merge", "adapters convert", "adapters extract"}
"""Commands whose base is one model, the names of which an adapter follows."""


def test_every_command_that_reads_a_checkpoint_takes_the_same_source_options():
    import typer

    def commands(group, name=""):
        for word, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{name}{word} ")
            else:
                yield f"{name}{word}", command

    reading = 0
    for name, command in commands(typer.main.get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        if not options & SOURCE_OPTIONS:
            continue
        reading += 1
        wanted = SOURCE_OPTIONS | (set() if name in WITHOUT_MOUNTS else {"--mount", "--by-file"})
        assert wanted <= options, (name, wanted - options)
        assert ("--component-other" in options) == (name in {"diff", "suggest", "verify", "adapters extract"}), name
    assert reading >= 13


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_terminal_gets_long_lines_wrapped(looked_at: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: looked_at)
    monkeypatch.setattr(sys, "stdout", stream)
    text = "plan\n  encoder.{i}.attention.{l} [d ...] -> layers.{i}.{l} [d ...]\n = help: " + "--drop 'a' " * 6
    show(text, wrap=True)
    show("x = 1  # " + "y" * 40)  # a file that is shown is never wrapped
    stream.seek(0)
    lines = stream.read().splitlines()
    assert lines[-1] == "x = 1  # " + "y" * 40
    if looked_at:
        assert lines[1:3] == ["  encoder.{i}.attention.{l} [d ...] ->", "      layers.{i}.{l} [d ...]"]
        assert text.splitlines()[2] in lines[3] and len(lines) == 5  # can be copied
    else:
        assert "\n".join(lines[:3]) == text
