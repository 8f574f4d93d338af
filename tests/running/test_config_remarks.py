"""A config that goes along and no longer agrees with the tensors follows them, or is reported field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs

CONFIG = {
    "torch_dtype": "float32", "tie_word_embeddings": True, "n_layer": 3, "vocab_size": 10, "hidden_size": 4,
    "eos_token_id": 6, "heads": 2, "text_config": {"num_hidden_layers": 3},
}  # fmt: skip


def folder(where: Path, **changed: Any) -> Path:
    embed = torch.randn(10, 4)
    tensors = {f"h.{i}.w": torch.randn(4, 4) for i in range(3)} | {"embed.weight": embed, "head.weight": embed}
    cs.save(tensors, where)
    (where / "config.json").write_text(json.dumps(CONFIG | changed))
    return where


def remarks(source: Path, recipe: cs.Recipe, **more: Any) -> dict[str, str]:
    out = source.parent / f"out{len(list(source.parent.iterdir()))}"
    report = cs.plan(source, recipe, **more).save(out, companions=True)
    followed = [note for note in report.notes if note.startswith("config.json: ")]
    assert bool(followed) == ((out / "config.json").read_bytes() != (source / "config.json").read_bytes())
    told = [w for w in report.warnings if w.code == "stale-config"]
    assert all(w.severity == "warning" and w.headline in str(report) for w in told)
    fields = (w.headline.removeprefix("config.json says ").partition(" = ") for w in told)
    return {name: text for name, _, text in fields}


def test_a_config_that_still_fits_is_told_nothing_of(tmp_path: Path) -> None:
    source = folder(tmp_path / "x")
    assert remarks(source, cs.Recipe(rest="keep")) == {}
    assert remarks(source, cs.Recipe(["h.{r...} -> layers.{r...}"], rest="keep")) == {}
    wrong = folder(tmp_path / "y", torch_dtype="float16", n_layer=7, vocab_size=99, tie_word_embeddings=False)
    assert remarks(wrong, cs.Recipe(rest="keep")) == {}


@pytest.mark.parametrize(
    ("recipe", "more", "told"),
    [
        (cs.Recipe(rest="keep", drop=["h.2.w"]), {}, {"n_layer": "2", "text_config.num_hidden_layers": "2"}),
        (
            cs.Recipe(["{m:embed,head}.weight -> {m}.weight | slice_rows(0, 8)"], rest="keep"),
            {},
            {"vocab_size": "the axes of 10 are of 8"},
        ),
    ],
    ids=["layers", "rows"],
)  # fmt: skip
def test_each_field_is_told_with_its_value_and_what_the_tensors_are(
    recipe: cs.Recipe, more: dict[str, Any], told: dict[str, str], tmp_path: Path
) -> None:
    found = remarks(folder(tmp_path / "x"), recipe, **more)
    assert found.keys() == told.keys()
    assert all(told[name] in text for name, text in found.items())


def followed(source: Path, recipe: cs.Recipe, **more: Any) -> tuple[dict[str, Any], list[str]]:
    out = source.parent / f"out{len(list(source.parent.iterdir()))}"
    report = cs.plan(source, recipe, **more).save(out, companions=True)
    assert not [w for w in report.warnings if w.code == "stale-config"]
    told = [note.removeprefix("config.json: ") for note in report.notes if note.startswith("config.json: ")]
    return json.loads((out / "config.json").read_text()), told


def test_the_dtype_follows(tmp_path: Path) -> None:
    config, told = followed(folder(tmp_path / "x"), cs.Recipe(rest="keep"), dtype="bf16")
    assert (config, told) == (CONFIG | {"torch_dtype": "bfloat16"}, ["torch_dtype = bfloat16"])


def test_names_that_are_no_longer_one_tensor_are_no_longer_tied(tmp_path: Path) -> None:
    recipe = cs.Recipe(["embed.weight -> embed.weight, other.weight"], rest="keep", drop=["head.weight"])
    config, told = followed(folder(tmp_path / "x"), recipe)
    assert (config, told) == (CONFIG | {"tie_word_embeddings": False}, ["tie_word_embeddings = False"])


def test_names_tied_anew_are_tied(tmp_path: Path) -> None:
    cs.save({"a.w": torch.ones(2, 2)}, tmp_path / "x")
    (tmp_path / "x/config.json").write_text('{"tie_word_embeddings": false}')
    config, told = followed(tmp_path / "x", cs.Recipe(rest="keep", tie={"b.w": "a.w"}))
    assert (config, told) == ({"tie_word_embeddings": True}, ["tie_word_embeddings = True"])


def quantised(where: Path, *names: str) -> Path:
    tensors = {}
    for name in names:
        tensors |= {name: torch.ones(4, 4).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    cs.save(tensors, where)
    config = {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
    (where / "config.json").write_text(json.dumps(config))
    (where / "quantize_config.json").write_text("{}")
    return where


def test_what_describes_the_quantisation_goes_with_the_last_quantised_tensor(tmp_path: Path) -> None:
    recipe = cs.Recipe(["w, w_scale_inv -> w | fp8_dequant(block=4)"], rest="keep")
    source = quantised(tmp_path / "x", "w")
    assert followed(source, recipe) == ({"dtype": "bfloat16"}, ["quantization_config dropped"])
    assert not list(tmp_path.glob("out*/quantize_config.json"))
    assert followed(source, cs.Recipe(rest="keep"))[1] == []
    assert list(tmp_path.glob("out*/quantize_config.json"))
    (name,) = remarks(quantised(tmp_path / "y", "w", "v"), recipe)
    assert name == "quantization_config"


def test_a_folder_over_itself_gets_a_config_that_follows(tmp_path: Path) -> None:
    source = quantised(tmp_path / "x", "w")
    recipe = cs.Recipe(["w, w_scale_inv -> w | fp8_dequant"])
    cs.plan(source, recipe).save(source, companions=True, overwrite=True)
    assert json.loads((source / "config.json").read_text()) == {"dtype": "bfloat16"}


EDITS = {
    "drop": ["heads", "absent"],
    "rename": {"n_layer": "num_layers", "text_config.num_hidden_layers": "text_config.depth"},
    "set": {"layers": "i", "width": "x", "kind": "'a text'", "twice": "config.hidden_size * 2", "listed": ["i", "'t'"],
            "lacking": "config.absent", "text_config.deep": {"size": "x", "flag": True}},
}  # fmt: skip


def test_a_recipe_says_what_becomes_of_the_config(tmp_path: Path) -> None:
    recipe = cs.Recipe(["h.{i}.w [x y] -> l.{i}.w [y x]"], rest="keep", config=EDITS)
    config, told = followed(folder(tmp_path / "x"), recipe)
    expected = {
        "torch_dtype": "float32", "tie_word_embeddings": True, "num_layers": 3, "vocab_size": 10, "hidden_size": 4,
        "eos_token_id": 6, "text_config": {"depth": 3, "deep": {"size": 4, "flag": True}}, "layers": 3, "width": 4,
        "kind": "a text", "twice": 8, "listed": [3, "t"],
    }  # fmt: skip
    assert config == expected
    assert list(config)[2] == "num_layers"
    assert "lacking is not set: its expression has no value" in told
    assert "absent dropped" not in told


def test_renames_invert_and_a_scope_roots_them(tmp_path: Path) -> None:
    recipe = cs.Recipe(["{k...} -> {k...}"], config={"rename": {"num_hidden_layers": "depth"}})
    source = folder(tmp_path / "x")
    there, _ = followed(source, recipe.scoped(config="text_config"))
    assert there["text_config"] == {"depth": 3}
    back = recipe.scoped(config="text_config").inverse()
    assert cs.load_recipe is not None and str(back.scopes[0].recipe.config) == str(recipe.inverse().config)
    chained, _ = followed(source, recipe.scoped(config="text_config").then(back))
    assert chained == CONFIG


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"remove": ["a"]}, r"\[config\] has no 'remove'"),
        ({"drop": "a"}, "not a list of paths"),
        ({"rename": {"a": 1}}, "not a table of paths"),
        ({"set": 3}, "not a table"),
    ],
)
def test_other_words_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(cs.RecipeError, match=text):
        cs.Recipe(rest="keep", config=config)


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text], lambda text: {"a": [{"b": text}]}])
def test_a_name_that_stands_for_nothing_is_refused_and_the_quoted_text_works(
    tmp_path: Path, wrap: Callable[[str], Any]
) -> None:
    with pytest.raises(cs.PlanError, match="neither dims, nor an axis, nor a captured index is called 'float16'") as e:
        cs.plan(folder(tmp_path / "x"), cs.Recipe(rest="keep", config={"set": {"torch_dtype": wrap("float16")}}))
    quoted = str(e.value.diagnostics[0].help).split('"')[1]
    meant = cs.Recipe(rest="keep", config={"set": {"torch_dtype": wrap(quoted)}})
    cs.plan(folder(tmp_path / "y"), meant).save(tmp_path / "z", companions=True)
    assert json.loads((tmp_path / "z/config.json").read_text())["torch_dtype"] == wrap("float16")


def test_a_config_is_made_where_the_source_has_another_one(tmp_path: Path) -> None:
    cs.save({"w": torch.ones(2, 2)}, tmp_path / "x")
    recipe = cs.Recipe(["w [a b] -> w [a b]"], config={"rename": {"dim": "hidden_size"}, "set": {"rows": "a"}})
    cs.plan(tmp_path / "x", recipe, config={"dim": 2}).save(tmp_path / "y", companions=True)
    assert json.loads((tmp_path / "y/config.json").read_text()) == {"hidden_size": 2, "rows": 2}


KINDS = ["full", "sliding", "full"]


@pytest.mark.parametrize(
    ("rules", "kinds"),
    [
        (["h.{i}.w -> h.{i}.w", "+ h.{i}.w -> h.{i+3}.w"], KINDS * 2),
        (["h.{i}.w -> layers.{(i t)}.w | repeat_over(t)"], [kind for kind in KINDS for _ in range(2)]),
        (["h.{i:1..2}.w -> h.{2-i}.w", "h.{i:0..0}.w -> h.{i+2}.w"], ["full", "sliding", "full"]),
        (["h.{i:0..1}.w -> h.{1-i}.w", "h.2.w -> h.2.w"], ["sliding", "full", "full"]),
        (["h.{i:0..1}.w -> h.{i}.w"], ["full", "sliding"]),
    ],
    ids=["stacked", "in a row", "reversed", "exchanged", "dropped"],
)
def test_a_list_by_layer_follows_the_layers(rules: list[str], kinds: list[str], tmp_path: Path) -> None:
    others = {"n_layer": 99, "mlp_only_layers": [0, 1, 2], "eos_token_id": [1, 2, 3]}
    source = folder(tmp_path / "x", text_config={"layer_types": KINDS}, **others)
    more = {"drop": ["h.2.w"]} if len(kinds) == 2 else {}
    recipe = cs.Recipe([*rules, "{k:embed,head}.weight -> {k}.weight"], dims={"t": 2}, **more)
    config, _ = followed(source, recipe)
    assert config == CONFIG | others | {"text_config": {"layer_types": kinds}}


def test_a_list_by_layer_that_the_layers_do_not_determine_is_told(tmp_path: Path) -> None:
    source = folder(tmp_path / "x", layer_types=KINDS)
    mean = cs.Recipe(["h.{i}.w [x y] -> h.0.w [x y] | mean_over(i)"], rest="keep")
    assert remarks(source, mean)["layer_types"] == "a list of 3, but its numbered parts come to 1 now"
    drawn = cs.Recipe(rest="keep", init={"h.3.w [4 4] F32": "zeros"})
    assert remarks(source, drawn)["layer_types"] == "a list of 3, but its numbered parts come to 4 now"


def test_copies_of_layers_are_no_untied_names(tmp_path: Path) -> None:
    rules = ["h.{i}.w -> encoder.{i}.w", "+ h.{i}.w -> decoder.{i}.w"]
    config, _ = followed(folder(tmp_path / "x"), cs.Recipe(rules, rest="keep"))
    assert config["tie_word_embeddings"] is True
    source = folder(tmp_path / "y", tie_word_embeddings=False)
    (source / "model.safetensors").unlink()
    cs.save({f"h.{i}.w": torch.zeros(2, 2) for i in range(2)}, source / "model.safetensors")
    config, _ = followed(source, cs.Recipe(["h.0.w -> h.0.w"], drop=["h.1.w"], tie={"h.1.w": "h.0.w"}))
    assert config["tie_word_embeddings"] is False
