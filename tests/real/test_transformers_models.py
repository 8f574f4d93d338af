"""Models of transformers: what save_pretrained wrote goes into a model on the meta device, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import ckptsurgery as cs

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {**SIZES, **ENDS, "num_key_value_heads": 2, "max_position_embeddings": 32}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 0,
    **ENDS,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}

IDS = {"input_ids": torch.arange(12).view(2, 6) * 5 % 61 + 3}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
SPEECH = {
    "input_features": torch.linspace(-1, 1, 8 * 32).view(1, 8, 32),
    "decoder_input_ids": torch.tensor([[0, 5, 9]]),
}

MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "bert": (hf.BertForMaskedLM, {**SIZES, "max_position_embeddings": 32}, IDS),
    "llama": (hf.LlamaForCausalLM, {**DECODER, "tie_word_embeddings": False}, IDS),
    "llama tied": (hf.LlamaForCausalLM, {**DECODER, "tie_word_embeddings": True}, IDS),
    "llama scaled": (hf.LlamaForCausalLM, {**DECODER, "rope_scaling": SCALED}, IDS),
    "gemma": (hf.Gemma2ForCausalLM, {**DECODER, "head_dim": 4}, IDS),
    "t5": (hf.T5ForConditionalGeneration, T5, {**IDS, "decoder_input_ids": torch.tensor([[0], [4]])}),
    "bart": (hf.BartForConditionalGeneration, {**SEQ2SEQ, "max_position_embeddings": 32}, IDS),
    # its loader renames keys by a hook, and what the hooked part holds is tied to what lies outside of it
    "mamba": (hf.MambaForCausalLM, {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, IDS),
    "whisper": (hf.WhisperForConditionalGeneration, {**SEQ2SEQ, **AUDIO}, SPEECH),
    "mixtral": (hf.MixtralForCausalLM, {**DECODER, "num_local_experts": 4}, IDS),
    "vit": (hf.ViTForImageClassification, {**IMAGE, "num_labels": 5}, PIXELS),
}
BY_RECIPE = ("mixtral", "vit")  # laid out in files as transformers 4 had them in memory


def built(name: str) -> nn.Module:
    kind, config, _ = MODELS[name]
    return kind(kind.config_class(**config))


def made(name: str) -> nn.Module:
    """A model with random weights, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(name).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return built(name)


def output(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**MODELS[name][2]).logits


def assert_whole_and_equal(model: nn.Module, source: nn.Module, name: str) -> None:
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    theirs = dict(source.named_buffers())
    assert all(torch.equal(b, theirs[n]) and b.dtype == theirs[n].dtype for n, b in model.named_buffers())
    assert torch.equal(output(model, name), output(source, name))
    names: dict[int, list[str]] = {}
    for key, parameter in source.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    mine = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in mine.values()}) == len(names)
    assert all(mine[key] is mine[group[0]] for group in names.values() for key in group)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in BY_RECIPE])
def test_a_saved_model_fills_a_meta_model(name: str, tmp_path: Path) -> None:
    source = made(name)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    model = on_meta(name)
    report = cs.load_into(model, tmp_path, assign=True)
    assert_whole_and_equal(model, source, name)
    assert report.coverage == 1 and not (report.cast or report.dropped or report.kept or report.missing_keys)


@pytest.mark.parametrize("name", BY_RECIPE)
def test_another_layout_in_the_files_is_an_error_that_names_the_recipe(name: str, tmp_path: Path) -> None:
    source = made(name)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(on_meta(name), tmp_path, assign=True)
    helps = [d.help for d in error.value.diagnostics if d.code == "recipe-fits"]
    assert len(helps) == 1 and helps[0] is not None and helps[0].startswith('recipe="')
    model = on_meta(name)
    report = cs.load_into(model, tmp_path, helps[0].split('"')[1], assign=True)
    assert_whole_and_equal(model, source, name)
    assert report.coverage == 1


class TestARecipeThatFillsMore:
    """It is named where something else is against the load too, and where a part is enough."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        made("vit").save_pretrained(tmp_path)
        return tmp_path

    def test_with_another_head(self, folder: Path) -> None:
        model = hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_labels=3))
        with pytest.raises(cs.LoadError) as error:
            cs.load_into(model, folder)
        (note,) = (d for d in error.value.diagnostics if d.code == "recipe-fits")
        assert note.remedies[0].value == "vit/hf_to_hf5"
        assert note.headline.endswith("fills 38 of the model's 40 tensors, 6 fit without it")
        with pytest.raises(cs.LoadError) as error:
            cs.load_into(model, folder, init="classifier")
        (note,) = (d for d in error.value.diagnostics if d.code == "recipe-fits")
        report = cs.load_into(model, folder, note.remedies[0].value, init="classifier")
        assert not report.missing_keys and "turns this source into this model" in note.headline

    def test_where_a_part_is_enough(self, folder: Path) -> None:
        report = cs.load_into(built("vit"), folder, partial=True)
        assert len(report.missing_keys) == 32
        assert any('recipe="vit/hf_to_hf5"' in note for note in report.notes)
        whole = cs.load_into(built("vit"), folder, "vit/hf_to_hf5", partial=True)
        assert whole.coverage == 1 and not any("recipe=" in note for note in whole.notes)


@pytest.mark.parametrize("name", ["bert", "llama tied", "mamba"])
def test_copied_into_a_model_with_values_it_is_the_same(name: str, tmp_path: Path) -> None:
    source, model = made(name), built(name)
    source.save_pretrained(tmp_path)
    parameters = [id(p) for p in model.parameters()]
    cs.load_into(model, tmp_path)
    assert [id(p) for p in model.parameters()] == parameters
    assert_whole_and_equal(model, source, name)


@pytest.mark.parametrize("name", ["llama tied", "mamba"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_bf16_file_into_an_fp32_model_is_a_cast_that_is_told(name: str, assign: bool, tmp_path: Path) -> None:
    source = made(name).bfloat16()
    source.save_pretrained(tmp_path)
    model = on_meta(name) if assign else built(name)
    report = cs.load_into(model, tmp_path, assign=assign)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(report.cast) == set(report.loaded) and "BF16 -> F32" in str(report)
    assert all(torch.equal(p, q.float()) for p, q in zip(model.parameters(), source.parameters(), strict=True))
    with pytest.raises(cs.CkptSurgeryError):
        cs.load_into(built(name), tmp_path, dtype="error")


def test_a_bare_backbone_goes_into_a_model_with_a_head_and_back(tmp_path: Path) -> None:
    source = made("bert")
    source.bert.save_pretrained(tmp_path / "body")
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=32, num_labels=3))
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, tmp_path / "body")
    assert "classifier" in str(error.value) and "bert.pooler" in str(error.value)
    report = cs.load_into(model, tmp_path / "body", init=["classifier", "bert.pooler"])
    assert report.initialised == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )
    body = source.bert.state_dict()
    assert all(torch.equal(v, body[k]) for k, v in model.bert.state_dict().items() if k in body)
    assert "prefix 'bert.' put on" in report.notes
    model.save_pretrained(tmp_path / "whole")
    bare = hf.BertModel(model.config)
    report = cs.load_into(bare, tmp_path / "whole", drop="classifier")
    assert all(torch.equal(v, model.bert.state_dict()[k]) for k, v in bare.state_dict().items())
    assert report.dropped == ("classifier.bias", "classifier.weight")
