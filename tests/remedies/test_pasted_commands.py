"""What a command prints as help is pasted into the next command, or into the recipe file."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import plan_cases
import pytest
import torch
from pasting import Case, filled, merged, plan, problem_of
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.errors import Remedy
from ckptsurgery.toml_writing import entry_text

OPTIONS = re.compile(r"--[a-z-]+(?: (?:'[^']*'|[^\s,'-][^\s,']*))?(?: --[a-z-]+(?: (?:'[^']*'|[^\s,'-][^\s,']*))?)*")
CASES = [
    case
    for case in (*plan_cases.recipes(), *plan_cases.targets())
    if case.call is plan and not isinstance(case.arguments().get("target"), cs.Checkpoint)
]


def run(arguments: Sequence[str]) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="ckptsurgery")


def told(result: Result) -> dict[str, str]:
    """What a command printed on stderr: each error, with its help."""
    blocks = [b for b in result.stderr.split("\n\n") if b.startswith("error[")]
    parts = [block.partition(" = help: ") for block in blocks]
    return {text: help for text, _, help in parts}


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    lines = ["schema = 1"]
    lines += [entry_text(part, value) for part, value in recipe.items()]
    path.write_text("\n".join(lines))


def command_of(case: Case, folder: Path) -> tuple[list[str], Path, dict[str, Any]]:
    """The command line of a case, its recipe file, and what is in that."""
    arguments = case.arguments()
    recipe = arguments.pop("recipe")
    recipe = recipe if isinstance(recipe, dict) else {"rules": [recipe]}
    cs.save(arguments.pop("source"), folder / "source.safetensors")
    words = ["plan", str(folder / "source.safetensors"), "--recipe", str(folder / "mine.toml")]
    if arguments.get("target") is not None:
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
        wanted = {k: torch.zeros(s.shape, dtype=dtypes[s.dtype]) for k, s in arguments.pop("target").items()}
        cs.save(wanted, folder / "target.safetensors")
        words += ["--target", str(folder / "target.safetensors")]
    for name, value in arguments.pop("dims", {}).items():
        pairs = {f"{name}.{c}": v for c, v in value.items()} if isinstance(value, dict) else {name: value}
        words += [word for key, one in pairs.items() for word in ("--dim", f"{key}={one}")]
    if "dtype" in arguments:
        words += ["--dtype", arguments.pop("dtype")]
    assert not arguments
    write_recipe(folder / "mine.toml", recipe)
    return words, folder / "mine.toml", recipe


def options_in(help: str, case: Case, folder: Path) -> list[str]:
    """The options that a help begins with, the values that are left open filled in."""
    found = OPTIONS.match(help)
    words = shlex.split(found.group()) if found else []
    return [_filled(word, before, case, folder) for before, word in zip(["", *words], words)]


def _filled(word: str, option: str, case: Case, folder: Path) -> str:
    if "…" not in word:
        return word
    if option == "--config":
        (folder / "config.json").write_text(json.dumps(case.blanks["config"]))
        return str(folder / "config.json")
    if option == "--target":
        cs.save({k: torch.zeros(s.shape) for k, s in case.blanks["target"].items()}, folder / "asked.safetensors")
        return str(folder / "asked.safetensors")
    return word.replace("…", str(case.blanks[re.split(r"[.=]", word)[-2]]))


def appended(words: list[str], options: list[str]) -> list[str]:
    """The command with more options; sizes that go in the place of others take it."""
    named = {re.split(r"[.=]", w)[0] for before, w in pairwise(options) if before == "--dim"}
    kept = [i for i, w in enumerate(words) if w == "--dim" and re.split(r"[.=]", words[i + 1])[0] in named]
    return [w for i, w in enumerate(words) if i not in kept and i - 1 not in kept] + options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_plan_prints_can_be_pasted(case: Case, tmp_path: Path) -> None:
    words, path, recipe = command_of(case, tmp_path)
    seen: set[str] = set()
    for _ in range(3):
        result = run(words)
        problems = told(result)
        assert result.exit_code == (1 if problems else 0), result.output
        if not problems:
            return
        assert not seen & problems.keys(), "the same problem again"
        seen |= problems.keys()
        help = next(iter(problems.values()))
        entry = re.match(r"(.*) in \S*mine\.toml", help)
        options = options_in(help, case, tmp_path)
        if options:
            words = appended(words, options)
        elif entry:
            for part, value in tomllib.loads(entry[1]).items():
                recipe = {**recipe, part: merged(recipe.get(part), value)}
            write_recipe(path, recipe)
        else:
            return  # a text to replace, or a sentence
    raise AssertionError("not settled in three rounds")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_python_prints_is_the_data(case: Case) -> None:
    for remedy in problem_of(case, case.arguments()).remedies:
        if remedy.kind not in ("argument", "recipe") or not replace(remedy).complete:
            continue
        text = str(replace(remedy, effect="")).removesuffix(" in the recipe").replace(" = ", "=", 1)
        ((name, value),) = eval(f"dict({text})", {"cs": cs}).items()
        wanted = cs.Recipe(**remedy.value) if isinstance(value, cs.Recipe) else remedy.value
        assert (name, value) == (remedy.argument, wanted)


A, B = torch.arange(32.0).reshape(4, 8), torch.arange(32.0, 64.0).reshape(4, 8)


def spoilt_index(folder: Path, total_size: int) -> str:
    """A folder of two shards whose index says another size."""
    cs.plan({"a": A, "b": B}, cs.Recipe(rest="keep")).save(folder / "m", max_shard_size="130")
    index = folder / "m" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["metadata"]["total_size"] = total_size
    index.write_text(json.dumps(found))
    return str(folder / "m")


def file_of(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    cs.save(tensors, folder / "m.safetensors")
    return str(folder / "m.safetensors")


def told_tied(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "m.safetensors", {"b": "a"})
    return str(folder / "m.safetensors")


def torch_file(folder: Path, what: Any) -> str:
    torch.save(what, folder / "m.pt")
    return str(folder / "m.pt")


FINDINGS = {
    "dtype-mix": (lambda f: file_of(f, {"a": A, "b": B, "c": A.half()}), {"a": A, "b": B, "c": A}),
    "lost-tie": (lambda f: file_of(f, {"a": A, "b{}": A.clone()}), {"a": A, "b{}": A}),
    "ties-differ": (lambda f: told_tied(f, {"a": A, "b": B}), {"a": A}),
    "pickle": (lambda f: torch_file(f, {"a": A}), {"a": A}),
    "pickle in a subtree": (lambda f: torch_file(f, {"x": {"a": A, "b": A.clone()}, "y": {"a": B, "b": B}}), None),
    "total-size": (lambda f: spoilt_index(f, total_size=10**9), {"a": A, "b": B}),
}


@pytest.mark.parametrize("code", FINDINGS)
def test_the_command_that_doctor_prints_settles_its_finding(code: str, tmp_path: Path) -> None:
    make, wanted = FINDINGS[code]
    source = make(tmp_path)
    code, _, inside = code.partition(" in a ")
    options = ["--subtree", "x"] if inside else []
    code = "lost-tie" if inside else code
    block = next(b for b in run(["doctor", source, *options]).stdout.split("\n\n") if f"[{code}]" in b)
    help = block.partition(" = help: ")[2]
    word = r"(?:'[^']*'|[^\s,]+)"
    command = re.match(rf"ckptsurgery (convert {word} {word}(?: --overwrite| --[a-z-]+ {word})*)", help)
    assert command, help
    words = [w if w != "…" else str(tmp_path / "out.safetensors") for w in shlex.split(command.group(1))]
    result = run(words)
    assert result.exit_code == 0, (words, result.stderr)
    assert f"[{code}]" not in run(["doctor", words[2]]).stdout
    if wanted is not None:
        with cs.open(words[2]) as made:
            assert made.keys() == wanted.keys() and all(torch.equal(made[k].load(), t) for k, t in wanted.items())


@pytest.mark.parametrize("word", ["drop", "keep"])
def test_trees_beside_the_model_are_settled_as_printed(word: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    source = torch_file(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    words = ["convert", source, str(tmp_path / "o.pt"), "--rule", "{l} -> fc.{l}"]
    ((text, help),) = told(run(words)).items()
    assert "left-behind" in text
    options = next(m.group() for m in OPTIONS.finditer(help) if m.group().endswith(word))
    result = run([*words, *shlex.split(options)])
    assert result.exit_code == 0, result.stderr
    assert ("optimizer" in torch.load(tmp_path / "o.pt", weights_only=True)) == (word == "keep")
    misspelt = told(run([*words[:2], str(tmp_path / "p.pt"), *words[3:], "--beside", f"optimiser={word}"]))
    assert any("did you mean 'optimizer'?" in help for help in misspelt.values())


def test_a_conversion_in_python_is_the_one_of_the_command(tmp_path: Path) -> None:
    source = file_of(tmp_path, {"a": A, "b": A.clone()})
    found = next(f for f in cs.doctor(source).findings if f.code == "lost-tie")
    (remedy,) = found.remedies
    target = str(tmp_path / "out.safetensors")
    made: Remedy = replace(remedy, value={**filled(remedy.value, {"destination": target})}, effect="")
    eval(str(made), {"cs": cs})
    with cs.open(target) as checkpoint:
        assert [tie.names for tie in checkpoint.ties] == [("a", "b")] and torch.equal(checkpoint["b"].load(), A)
