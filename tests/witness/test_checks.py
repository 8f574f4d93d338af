"""What a check says of loads that are right, and how it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.witness.faults import NotAsPlanned

from .test_silent_failures import TINY, Net, trained

pytest_plugins = ["ckptsurgery.witness.pytest_plugin"]

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

SMALL = {**TINY, "head_dim": 8, "pad_token_id": 2}
ENCODER = {k: TINY[k] for k in TINY if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
IMAGE = {"image_size": 32, "patch_size": 8, **{k: v for k, v in ENCODER.items() if "size" in k or "num" in k}}
IMAGE.pop("vocab_size")
LOADERS = """
import torch
from safetensors.torch import load_file

def right():
    model = torch.nn.Linear(2, 2)
    model.load_state_dict(load_file("x.safetensors"))
    return model

def wrong():
    model = torch.nn.Linear(2, 2)
    model.load_state_dict({}, strict=False)
    return model
"""
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, SMALL),
    "llama, tied": (hf.LlamaForCausalLM, {**SMALL, "tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2ForCausalLM, SMALL),
    "qwen3": (hf.Qwen3ForCausalLM, SMALL),
    "gemma2, tied": (hf.Gemma2ForCausalLM, SMALL),
    "phi3": (hf.Phi3ForCausalLM, SMALL),
    "mixtral": (hf.MixtralForCausalLM, {**SMALL, "num_local_experts": 4}),
    "gpt2, tied": (hf.GPT2LMHeadModel, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bert": (hf.BertForMaskedLM, ENCODER),
    "vit": (hf.ViTForImageClassification, IMAGE),
    "dinov2": (hf.Dinov2Model, IMAGE),
    "t5": (hf.T5ForConditionalGeneration, {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}),
    "mamba": (hf.MambaForCausalLM, {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_correct_load_by_the_library_is_proved(name: str, tmp_path: Path) -> None:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    kind(kind.config_class(**sizes)).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, dtype=torch.float32)
    report = cs.check_loaded(model, tmp_path)
    assert report.coverage == 1
    assert not report.missing_keys


STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole_is_saved", [True, False])
@pytest.mark.parametrize(
    ("whole", "base", "sizes"),
    [
        (hf.DeiTForImageClassification, hf.DeiTModel, IMAGE),
        (hf.SegformerForImageClassification, hf.SegformerModel, STAGES),
    ],
)
def test_files_with_and_without_a_head_are_read_in_their_layout(
    whole: Any, base: Any, sizes: dict[str, Any], whole_is_saved: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    saved, asked = (whole, base) if whole_is_saved else (base, whole)
    saved._from_config(saved.config_class(**sizes)).save_pretrained(tmp_path)
    model = asked.from_pretrained(tmp_path, dtype=torch.float32)
    parts = {key.partition(".")[0] for key in model.state_dict()}
    with cs.open(tmp_path) as files:
        new = [name for name in parts & {"classifier", "pooler"} if not any(f"{name}." in key for key in files)]
    report = cs.check_loaded(model, tmp_path, keep=new)
    assert len(report.loaded) > 20


@pytest.mark.parametrize("saved", ["x.safetensors", "x.pt", "memory"])
@pytest.mark.parametrize("wrap", ["", "module.", "model.net."])
def test_a_correct_load_by_hand_is_proved(saved: str, wrap: str, tmp_path: Path) -> None:
    state = {wrap + k: v.clone() for k, v in trained(Net(tied=False)).state_dict().items()}
    source: Any = state
    if saved != "memory":
        source = tmp_path / saved
        (save_file if saved.endswith("s") else torch.save)(state, source)
    model = Net(tied=False)
    model.load_state_dict({k.removeprefix(wrap): v for k, v in state.items()})
    report = cs.check_loaded(model, source)
    assert set(report.loaded) == set(model.state_dict())
    assert not report.cast


def test_a_lossless_cast_is_right_and_reported() -> None:
    source = trained(Net(tied=False)).to(torch.bfloat16).state_dict()
    model = Net(tied=False)
    model.load_state_dict(source)
    assert "embed.weight" in cs.check_loaded(model, source).cast
    with pytest.raises(NotAsPlanned, match="cast"):
        cs.check_loaded(model, source, dtype="error")


def test_what_the_source_holds_in_vain_is_reported_and_no_fault() -> None:
    source = {**trained(Net(tied=False)).state_dict(), "optimizer_step": torch.ones(1)}
    model = Net(tied=False)
    model.load_state_dict(source, strict=False)
    assert cs.check_loaded(model, source).unexpected_keys == ("optimizer_step",)


def test_a_part_that_was_not_to_be_loaded_is_kept() -> None:
    source = {k: v for k, v in trained(Net(tied=False)).state_dict().items() if "head" not in k}
    model = Net(tied=False)
    model.load_state_dict(source, strict=False)
    with pytest.raises(NotAsPlanned) as caught:
        cs.check_loaded(model, source)
    remedy = caught.value.diagnostics[0].remedies[0]
    assert cs.check_loaded(model, source, **{remedy.argument: remedy.value}).kept == ("head.weight",)


def test_names_that_are_meant_to_be_apart_are_accepted() -> None:
    source = trained(Net()).state_dict()
    model = Net(tied=False)
    model.load_state_dict(source)
    with pytest.raises(NotAsPlanned, match="untied"):
        cs.check_loaded(model, source)
    assert cs.check_loaded(model, source, untied="head.weight").coverage == 1


def test_nothing_is_changed_by_a_check() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = trained(Net(tied=False), seed=9)
    before = {k: (v.clone(), v._version) for k, v in model.state_dict(keep_vars=True).items()}
    with pytest.raises(NotAsPlanned):
        cs.check_loaded(model, source)
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[k], v) and after[k]._version == count for k, (v, count) in before.items())


def test_tensors_that_are_not_in_one_run_of_memory_are_compared_as_well() -> None:
    source = {"weight": torch.arange(12.0).view(3, 4)}
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(source["weight"].T.contiguous().T)
    assert cs.check_loaded(model, source).coverage == 1
    with torch.no_grad():
        model.weight[2, 3] += 1
    with pytest.raises(NotAsPlanned):
        cs.check_loaded(model, source)


def test_a_bad_policy_is_refused_before_anything_is_read() -> None:
    with pytest.raises(cs.RecipeError, match="bad-argument"):
        cs.check_loaded(Net(), "no such file", dtype="source")


def test_a_watch_lets_the_exception_of_a_load_through() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), cs.watch_load(Net(), {"embed.weight": torch.ones(2)}):
        Net().load_state_dict({"embed.weight": torch.ones(2)}, strict=False)


def test_a_watch_over_a_call_that_builds_the_model() -> None:
    source = trained(Net(tied=False)).state_dict()
    with cs.watch_load(None, source) as watch:
        watch.model = Net(tied=False)
        watch.model.load_state_dict(source)
    assert watch.report is not None
    assert watch.report.coverage == 1


def test_the_fixtures_fail_a_test_without_a_traceback(check_loaded: Any, watch_load: Any) -> None:
    source = trained(Net(tied=False)).state_dict()
    with pytest.raises(pytest.fail.Exception, match="left-as-built"):
        check_loaded(Net(tied=False), source)
    with (
        pytest.raises(pytest.fail.Exception, match="unchanged since before the load"),
        watch_load(Net(tied=False), source),
    ):
        pass


def test_the_command_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "loads_it.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    right = run(app, ["check-loaded", "x.safetensors", "--model", "loads_it:right", "--json"])
    assert right.exit_code == 0
    assert {e["action"] for e in json.loads(right.stdout)["ledger"]} == {"loaded"}
    wrong = run(app, ["check-loaded", "x.safetensors", "--model", "loads_it:wrong"])
    assert wrong.exit_code == 1
    assert "model tensor" in wrong.output
