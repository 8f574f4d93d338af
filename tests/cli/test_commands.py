"""Every command on real files, in this process: what it prints, what it writes, what it returns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import ckptsurgery as cs
from ckptsurgery.cli.program import app

QKV = "blocks.{n}.qkv.{l} [(p d) ...] -> layers.{n}.{p:q,k,v}.{l} [d ...]"
REST = "blocks.{n}.fc.{l} -> layers.{n}.fc.{l}"
RULES = ["--rule", QKV, "--rule", REST, "--drop", "blocks.{n}.mask", "--rest", "keep"]
RECIPE = f'schema = 1\nsummary = "x"\nrules = ["{QKV}", "{REST}"]\ndrop = ["? blocks.{{n}}.mask"]\nrest = "keep"\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {}
    for n in range(2):
        tensors |= {f"blocks.{n}.qkv.weight": torch.randn(12, 4), f"blocks.{n}.qkv.bias": torch.randn(12)}
        tensors |= {f"blocks.{n}.fc.weight": torch.randn(4, 4), f"blocks.{n}.mask": torch.arange(3)}
    tensors["embed.weight"] = tensors["head.weight"] = torch.randn(5, 4)
    cs.save(tensors, tmp_path / "old.safetensors")
    (tmp_path / "config.json").write_text('{"heads": 2, "name": "tiny"}')
    (tmp_path / "mine.toml").write_text(RECIPE)
    return tmp_path / "old.safetensors"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="ckptsurgery")
    assert result.exit_code == code, result.output + result.stderr
    return result


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_inspect_shows_each_tensor_and_what_is_tied(source: Path) -> None:
    text = run("inspect", source).stdout
    assert "blocks.{0,1}.qkv.weight" in text
    assert "embed.weight = head.weight" in text
    assert as_json("inspect", source)["tensors"]["blocks.0.mask"]["shape"] == [3]
    assert "blocks.1.fc.weight" in run("inspect", source, "--all").stdout
    assert "├ " in run("inspect", source, "--tree").stdout
    assert "embed" not in run("inspect", source, "--filter", "blocks.{i}.fc").stdout.partition("tensors")[0]


def test_json_has_a_line_for_each_tensor(source: Path) -> None:
    """So that it can be searched and compared by lines; what it says does not depend on where lines end."""
    lines, whole = run("inspect", source, "--json").stdout.splitlines(), as_json("inspect", source)
    assert '    "blocks.0.mask": {"dtype": "I64", "shape": [3], "nbytes": 24},' in lines
    assert len(lines) <= len(whole["tensors"]) + 20
    with cs.open(source) as found:
        assert whole["nbytes"] == found.nbytes
        sizes = {key: spec.nbytes for key, spec in found.specs.items()}
    assert {key: row["nbytes"] for key, row in whole["tensors"].items()} == sizes


def test_plan_shows_explains_and_writes_nothing(source: Path) -> None:
    before = sorted(source.parent.iterdir())
    text = run("plan", source, *RULES).stdout
    assert "plan: 10 source keys -> " in text
    explained = run("plan", source, *RULES, "--explain", "layers.1.k.weight").stdout
    assert "blocks.1.qkv.weight" in explained
    assert as_json("plan", source, *RULES, "--explain", "blocks.0.mask")["role"] == "dropped"
    assert {step["kind"] for step in as_json("plan", source, *RULES)["steps"]} == {"copy", "move"}
    assert sorted(source.parent.iterdir()) == before


def test_convert_and_its_inverse_lead_back(source: Path) -> None:
    new, back = source.with_name("new.safetensors"), source.with_name("back.safetensors")
    recipe = source.with_name("mine.toml")
    report = as_json("convert", source, new, "--recipe", recipe, "--check")
    assert report["counts"]["dropped"] == 2
    assert any("read back" in note for note in report["notes"])
    run("convert", new, back, "--recipe", recipe, "--inverse")
    found = cs.diff(source, back)
    assert (list(found.only_a), len(found.only_b), found.values) == (["blocks.0.mask", "blocks.1.mask"], 0, {})


def test_recipes_are_chained_in_the_order_given(source: Path) -> None:
    second = source.with_name("second.toml")
    second.write_text('schema = 1\nrest = "{k...} -> model.{k...}"\n')
    out = source.with_name("out.safetensors")
    run("convert", source, out, "--recipe", source.with_name("mine.toml"), "-r", second)
    assert {key.partition(".")[0] for key in cs.open(out)} == {"model"}
    assert [tie.names for tie in cs.open(out).ties] == [("model.embed.weight", "model.head.weight")]


def test_dtype_casts_floats_and_the_report_says_so(source: Path) -> None:
    out = source.with_name("out.safetensors")
    assert "F32 -> BF16" in run("convert", source, out, "--dtype", "bf16", "--check").stdout
    written = cs.open(out)
    assert written["blocks.0.mask"].dtype == "I64"
    assert {t.dtype for key, t in written.items() if "mask" not in key} == {"BF16"}
    assert written.ties


def test_a_folder_is_sharded_and_takes_its_companions(source: Path) -> None:
    out = source.with_name("out")
    text = run("convert", source, out, "--max-shard-size", "300B", "--companions").stdout
    assert "copied along: config.json" in text
    assert (out / "model.safetensors.index.json").exists()
    assert (out / "config.json").exists()
    assert cs.diff(source, out).identical


def test_a_change_in_place_is_made_and_taken_back(source: Path) -> None:
    before = source.read_bytes()
    text = run("convert", source, source, "--rule", "blocks.{r...} -> b.{r...}", "--rest", "keep", "--in-place").stdout
    assert "restore-header" in text
    assert "b.0.mask" in cs.open(source)
    run("restore-header", source)
    assert source.read_bytes() == before
    assert "missing-file" in run("restore-header", source, code=1).stderr


def test_what_is_not_synced_is_the_same_and_does_not_go_with_what_relies_on_it(source: Path) -> None:
    synced, out = source.with_name("synced.safetensors"), source.with_name("out.safetensors")
    run("convert", source, synced)
    run("convert", source, out, "--no-sync")
    assert out.read_bytes() == synced.read_bytes()
    for option in ("--resume", "--in-place"):
        assert "cannot go without sync" in run("convert", source, out, "--no-sync", option, code=1).stderr


def test_companions_of_a_file_are_refused_before_it_is_written(source: Path) -> None:
    out = source.with_name("out.safetensors")
    assert "companions-need-a-folder" in run("convert", source, out, "--companions", code=1).stderr
    assert not out.exists()


def test_formats_are_changed_without_a_rule(source: Path) -> None:
    for name in ("out.pt", "again.safetensors"):
        run("convert", source, source.with_name(name))
        assert cs.diff(source, source.with_name(name)).identical


def test_ties_are_made_by_option(source: Path) -> None:
    out = source.with_name("out.safetensors")
    run("convert", source, out, "--drop", "head.weight", "--tie", "lm.weight=embed.weight")
    assert [tie.names for tie in cs.open(out).ties] == [("embed.weight", "lm.weight")]
    assert as_json("ties", out) == [{"names": ["embed.weight", "lm.weight"], "kind": "alias"}]


@pytest.mark.parametrize(
    "dims",
    [["--dim", "rows.q=2", "--dim", "rows.k=8", "--dim", "rows.v=2"], ["--dim", 'rows={"q": 2, "k": 8, "v": 2}']],
)
def test_dims_may_be_tables(source: Path, dims: list[str]) -> None:
    out = source.with_name("out.safetensors")
    rule = "blocks.{n}.qkv.{l} [(p rows:p) ...] -> l.{n}.{p:q,k,v}.{l} [rows:p ...]"
    run("convert", source, out, "--rule", rule, "--rest", "keep", *dims)
    assert cs.open(out)["l.0.k.bias"].shape == (8,)


def test_dims_may_be_lists_and_expressions(source: Path) -> None:
    out = source.with_name("out.safetensors")
    rules = ["--rule", "blocks.{(s b)}.{r...} -> stages.{s}.{b}.{r...}", "--dim", "b=1,1"]
    heads = ["--rule", "embed.weight [v (h d)] -> e [h v d]", "--dim", "h=config.heads", "--drop", "head.weight"]
    run("convert", source, out, *rules, *heads)
    assert cs.open(out)["e"].shape == (2, 5, 2)
    assert "stages.1.0.mask" in cs.open(out)
    (source.parent / "config.json").rename(source.parent / "other.json")
    refused = run("convert", source, out, *rules, *heads, "--overwrite", code=1).stderr
    assert "config" in refused
    run("convert", source, out, *rules, *heads, "--overwrite", "--config", source.parent / "other.json")


def test_a_target_may_be_a_checkpoint_a_model_or_specs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = source.with_name("wanted.safetensors")
    run("convert", source, wanted, *RULES)
    specs = source.with_name("specs.json")
    specs.write_text(run("inspect", wanted, "--json").stdout)
    (source.parent / "somebodys_models.py").write_text(
        "import torch\n"
        "def build():\n"
        "    m = torch.nn.Module()\n"
        "    m.embed, m.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)\n"
        "    m.head.weight = m.embed.weight\n"
        "    m.layers = torch.nn.ModuleList()\n"
        "    for _ in range(2):\n"
        "        m.layers.append(torch.nn.ModuleDict({k: torch.nn.Linear(4, 4) for k in 'qkv'}))\n"
        "        m.layers[-1]['fc'] = torch.nn.Linear(4, 4, bias=False)\n"
        "    return m\n"
    )
    monkeypatch.chdir(source.parent)
    for target in (wanted, specs, "somebodys_models:build"):
        run("plan", source, *RULES, "--target", target)
        refused = run("plan", source, "--drop", "head.weight", "--target", target, code=1).stderr
        assert "missing-keys" in refused


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_module:build", "No module named"),
        ("torch:no_such_thing", "no attribute"),
        ("no-such.json", "No such file"),
        ("config.json", "does not read like"),
    ],
)
def test_a_target_that_is_none_is_wrong_usage(
    source: Path, target: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    assert said in run("plan", source, "--target", target, code=2).stderr


def test_a_model_that_cannot_be_built_is_a_problem_of_that_model(source: Path) -> None:
    assert "torch.nn:Linear() failed: TypeError" in run("plan", source, "--target", "torch.nn:Linear", code=1).stderr


def test_dry_run_writes_nothing(source: Path) -> None:
    before = sorted(source.parent.iterdir())
    assert run("convert", source, source.with_name("o.safetensors"), "--dry-run").stdout.startswith("plan: ")
    assert sorted(source.parent.iterdir()) == before


def test_an_output_is_replaced_on_request_only(source: Path) -> None:
    out = source.with_name("out.safetensors")
    run("convert", source, out)
    before = out.read_bytes()
    assert "output-exists" in run("convert", source, out, "--dtype", "bf16", code=1).stderr
    assert out.read_bytes() == before
    run("convert", source, out, "--dtype", "bf16", "--overwrite")
    assert out.stat().st_size < len(before)


def test_memory_is_bounded_on_request(source: Path) -> None:
    out = source.with_name("out.safetensors")
    refused = run("convert", source, out, *RULES, "--max-memory", "10B", code=1).stderr
    assert "too-much-memory" in refused
    assert not out.exists()
    run("convert", source, out, *RULES, "--max-memory", "1GB")


def test_a_subtree_and_files_side_by_side_are_picked_by_option(source: Path) -> None:
    state = dict(cs.open(source).state_dict())
    torch.save({"ema": state, "model": state}, source.with_name("two.pt"))
    refused = run("inspect", source.with_name("two.pt"), code=1).stderr
    assert "ema" in refused
    assert cs.diff(source, cs.open(source.with_name("two.pt"), subtree="ema")).common == len(state)
    out = source.with_name("out.safetensors")
    run("convert", source.with_name("two.pt"), out, "--subtree", "ema")
    assert not cs.diff(source, out).only_a
    ranks = source.with_name("ranks")
    ranks.mkdir()
    for n in range(2):
        cs.save({"w": torch.full((2,), float(n))}, ranks / f"rank{n}.safetensors")
    run("convert", ranks, out, "--by-file", "--rule", "rank{r}/w [d] -> w [(r d)]", "--overwrite")
    assert cs.open(out)["w"].load().tolist() == [0, 0, 1, 1]


def test_diff_says_what_differs_and_exits_with_1_on_request(source: Path) -> None:
    out = source.with_name("out.safetensors")
    run("convert", source, out, *RULES)
    assert "identical: " in run("diff", source, source, "--exit-code").stdout
    assert "in a alone" in run("diff", source, out).stdout
    run("diff", source, out, "--exit-code", code=1)
    assert as_json("diff", source, out, "--recipe", source.with_name("mine.toml"))["identical"]
    aligned = as_json("diff", source, out, "--align", "values")
    assert aligned["alignment"]["coverage"] == 1.0 and not aligned["values"] and not aligned["only_b"]
    run("diff", source, out, "--align", "hope", code=2)
    assert as_json("diff", source, out, "--headers")["values"] is None


def test_recipes_are_listed_shown_and_matched(source: Path) -> None:
    names = list(as_json("recipes"))
    assert names == cs.list_recipes()
    assert names
    lines = run("recipes").stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, cs.load_recipe(name).summary] for name in names]
    assert run("recipes", "show", source.with_name("mine.toml")).stdout.startswith("schema = 1")
    inverse = run("recipes", "show", source.with_name("mine.toml"), "--inverse").stdout
    assert "layers.{n}.{p:q,k,v}.{l}" in inverse
    assert as_json("recipes", "show", names[0])["name"] == names[0]
    assert "no built-in recipe fits" in run("recipes", "match", source).stdout
    assert as_json("recipes", "match", source) == []


def test_every_shipped_recipe_can_be_shown_and_read_again(tmp_path: Path) -> None:
    for name in cs.list_recipes():
        path = tmp_path / "again.toml"
        path.write_text(run("recipes", "show", name).stdout)
        assert cs.load_recipe(path) == cs.load_recipe(name), name


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "no-such-file"], "missing-file"),
        (["plan", "old.safetensors", "--rule", "blocks.{i}.w"], "bad-rule"),
        (["plan", "old.safetensors", "--rule", "x -> y"], "unused-rule"),
        (["plan", "old.safetensors", "--recipe", "lama/meta_to_hf"], "unknown-recipe"),
        (["plan", "old.safetensors", "--dtype", "bf61"], "bad-argument"),
        (["plan", "old.safetensors", "--rest", "kep"], "bad-rest"),
        (["convert", "old.safetensors", "x.h5"], "unsupported-output"),
        (["convert", "old.safetensors", "x", "--max-shard-size", "many"], "bad-size"),
        (["convert", "old.safetensors", "x.pt", "--resume"], "not-resumable"),
    ],
)
def test_problems_exit_with_1_and_name_themselves(
    source: Path, arguments: list[str], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    before = sorted(source.parent.iterdir())
    result = run(*arguments, code=1)
    assert f"error[{code}]: " in result.stderr
    assert result.stdout == ""
    diagnostics = json.loads(run(*arguments, "--json", code=1).stderr)["diagnostics"]
    assert diagnostics[0]["code"] == code
    for told in diagnostics:  # the help is that of the terminal, and not that of Python
        assert told["help"] is None or re.sub(r"\s+", " ", told["help"]) in re.sub(r"\s+", " ", result.stderr)
    assert sorted(source.parent.iterdir()) == before


def test_wrong_values_of_options_exit_with_2(source: Path) -> None:
    for wrong in (["--dim", "heads"], ["--tie", "a"], ["--config", "no-such.json"], ["--dim", "a=1", "--dim", "a.q=2"]):
        run("plan", source, *wrong, code=2)


def test_resume_is_an_option_of_convert(source: Path) -> None:
    out = source.with_name("out.safetensors")
    run("convert", source, out, *RULES, "--resume")
    assert cs.open(out)["layers.0.q.weight"].shape == (4, 4)


def test_a_program_that_is_called_again_and_again_reads_its_words_as_before(source: Path) -> None:
    program = typer.main.get_command(app)
    assert isinstance(program, typer.core.TyperGroup)

    def called() -> list[Any]:
        assert program.main(["inspect", str(source), "--json"], standalone_mode=False) is None
        return [vars(parameter).get("process_value") for parameter in program.commands["inspect"].params]

    assert called() == called()


@pytest.mark.parametrize(
    ("command", "text", "name"), [("recipes", "LitGPT", "llama/hf_to_litgpt"), ("ops", "slerp", "slerp")]
)
def test_what_there_is_can_be_listed_and_searched(command: str, text: str, name: str) -> None:
    every, some = as_json(command, "list"), as_json(command, "list", text)
    assert every == as_json(command) and name in some and 0 < len(some) < len(every)
    assert "no " in run(command, "list", "nothing-has-this-text").stdout


def test_the_way_back_of_provenance_takes_no_options_of_a_recipe(tmp_path: Path) -> None:
    made, back = tmp_path / "made.safetensors", tmp_path / "back.safetensors"
    cs.save({"q": torch.ones(2, 3), "k": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    run("convert", tmp_path / "x.safetensors", made, "--rule", "{p:q,k} [d x] -> qk [(p d) x]", "--provenance")
    (step,) = as_json("plan", made, "--inverse")["steps"]
    assert [target["key"] for target in step["targets"]] == ["q", "k"]
    for option in (
        ["--dtype", "bf16"],
        ["--drop", "qk"],
        ["--tie", "x=q"],
        ["--dim", "d=9"],
        ["--rest", "keep"],
        ["--seed", "3"],
    ):
        refused = run("convert", made, back, "--inverse", *option, code=2)
        assert option[0] in refused.stderr and not back.exists()
    run("convert", made, back, "--inverse")
    assert cs.diff(tmp_path / "x.safetensors", back).identical
