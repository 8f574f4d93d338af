"""Loads that raise nothing and go wrong, after public reports; each is rebuilt with the loader that it was found in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import ckptsurgery as cs
from ckptsurgery.witness.faults import NotAsPlanned

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


class Net(nn.Module):
    """An embedding, two square layers with a norm, and a head that shares the embedding's weight."""

    def __init__(self, tied: bool = True, classes: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, classes, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def trained(model: Any, seed: int = 7) -> Any:
    """The model with values that no initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.4 + 0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def kinds(model: nn.Module, source: Any, *args: Any, **named: Any) -> dict[str, str]:
    """Model key -> the kind of its fault."""
    with pytest.raises(NotAsPlanned) as caught:
        cs.check_loaded(model, source, *args, **named)
    assert {d.code for d in caught.value.diagnostics} == {fault.kind for fault in caught.value.faults}
    return {fault.key: fault.kind for fault in caught.value.faults}


def of_weights(found: dict[str, str]) -> set[str]:
    """The kinds of matrices; a bias is too small to say what it holds."""
    return {kind for key, kind in found.items() if key.endswith("weight") and "norm" not in key}


def test_a_prefix_before_every_key_and_strict_false_load_nothing_at_all() -> None:
    source = {f"module.{k}": v for k, v in trained(Net()).state_dict().items()}
    model = Net()
    model.load_state_dict(source, strict=False)
    found = kinds(model, source)
    assert set(found) >= {k for k in model.state_dict() if k.endswith("weight")}
    assert of_weights(found) == {"left-as-built"}


def test_assignment_breaks_ties() -> None:
    """pytorch/pytorch#188346: the optimizer then updates the formerly shared weight twice."""
    source = trained(Net()).state_dict()
    model = Net()
    model.load_state_dict(source, assign=True)
    assert kinds(model, source) == {"head.weight": "untied"}
    with pytest.raises(NotAsPlanned), cs.watch_load(other := Net(), {k: v.clone() for k, v in source.items()}):
        other.load_state_dict({k: v.clone() for k, v in source.items()}, assign=True)


def test_assignment_of_one_tied_name_leaves_the_other_as_it_was() -> None:
    """TransformerLensOrg/TransformerLens#1725: the head computes with weights from before the load."""
    source = trained(Net()).state_dict()
    del source["head.weight"]
    with pytest.raises(NotAsPlanned) as caught, cs.watch_load(model := Net(), source):
        model.load_state_dict(source, strict=False, assign=True)
    assert {f.key: f.kind for f in caught.value.faults}["head.weight"] in ("never-loaded", "untied")


def test_tied_names_with_different_values_let_the_last_one_win() -> None:
    """pytorch/pytorch#62264: what was loaded under the first name is overwritten."""
    source = trained(Net(tied=False)).state_dict()
    model = Net()
    model.load_state_dict(source)
    assert kinds(model, source) == {"embed.weight": "holds-another"}


def test_a_head_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    """huggingface/transformers#28122: mismatched sizes that are ignored hold whatever the memory held."""
    config = hf.LlamaConfig(**TINY, num_labels=3)
    trained(hf.LlamaForSequenceClassification(config)).save_pretrained(tmp_path)
    model = hf.LlamaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    assert kinds(model, tmp_path) == {"score.weight": "shape-differs"}


def test_fp8_weights_come_in_without_their_scales(tmp_path: Path) -> None:
    """unslothai/unsloth#6200, huggingface/transformers#47145: weights some hundred times too large."""
    model = nn.Sequential(nn.Linear(256, 128, bias=False), nn.Linear(128, 8))
    weight = trained(copy.deepcopy(model))[0].weight.detach()
    scale = weight.abs().amax() / 448
    source = {k: v.contiguous() for k, v in model.state_dict().items()}
    source["0.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    source["0.weight_scale_inv"] = scale.reshape(1, 1).expand(1, 2).contiguous()
    save_file(source, tmp_path / "x.safetensors")
    model.load_state_dict({k: v.to(torch.float32) for k, v in source.items()}, strict=False)
    assert kinds(model, tmp_path / "x.safetensors") == {"0.weight": "unscaled-codes"}
    scaled = "0.weight, 0.weight_scale_inv -> 0.weight | fp8_dequant(block=128, dtype='F32')"
    recipe = cs.Recipe([scaled], rest="keep")
    assert kinds(model, tmp_path / "x.safetensors", recipe) == {"0.weight": "other-values"}
    cs.load_into(model, tmp_path / "x.safetensors", recipe)
    assert cs.check_loaded(model, tmp_path / "x.safetensors", recipe).coverage == 1


def test_an_adapter_under_another_prefix_lands_nowhere() -> None:
    """vllm-project/vllm#34186: B stays zero, and the adapted model is the base model."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})
            nn.init.zeros_(self.lora_B["default"].weight)

    source = {f"base_model.model.{k}": v for k, v in trained(Adapted()).state_dict().items()}
    model = Adapted()
    model.load_state_dict(source, strict=False)
    assert of_weights(kinds(model, source)) == {"left-as-built"}


def test_rotary_rows_of_keys_are_permuted_by_the_number_of_query_heads() -> None:
    """ggml-org/llama.cpp#3364, huggingface/transformers#31788: wrong wherever there are fewer key heads."""

    def permuted(w: Tensor, heads: int) -> Tensor:
        return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    source = {f"attention.{p}.weight": torch.randn(n, 32) for p, n in (("wq", 32), ("wk", 16))}
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32, bias=False), "k_proj": nn.Linear(32, 16, bias=False)})
    model.load_state_dict({f"{p}_proj.weight": permuted(source[f"attention.w{p}.weight"], 4) for p in "qk"})
    recipe = cs.Recipe(
        ["attention.{p:wq,wk}.weight [(h:p half two) d] -> {p:q,k}_proj.weight [(h:p two half) d]"],
        dims={"two": 2, "h": {"wq": 4, "wk": 2}},
    )
    assert kinds(model, source, recipe) == {"k_proj.weight": "rearranged"}


def test_buffers_outside_the_file_hold_what_the_memory_held() -> None:
    """huggingface/transformers#45902, pytorch/torchtitan#4783: `to_empty` after a build on the meta device."""
    config = hf.LlamaConfig(**TINY)
    source = trained(hf.LlamaForCausalLM(config)).state_dict()
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(1e-30)  # memory as it may have been left
    model.load_state_dict(source)
    assert set(kinds(model, source).values()) == {"buffer-differs"}


def test_a_cast_of_the_whole_model_reaches_buffers_outside_the_file() -> None:
    """NovaSky-AI/SkyRL#1725: rotary frequencies in BF16 rotate by other angles."""
    config = hf.LlamaConfig(**TINY)
    source = trained(hf.LlamaForCausalLM(config)).to(torch.bfloat16).state_dict()
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16).to(torch.float32)
    model.load_state_dict(source)
    assert set(kinds(model, source).values()) == {"buffer-differs"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_into_a_copy_of_the_state(tmp_path: Path) -> None:
    """pytorch/pytorch#138575 and others: the state dict has the values, the model has not."""
    source = trained(Net(tied=False)).state_dict()
    dcp.save(source, checkpoint_id=tmp_path / "dcp")
    model = Net(tied=False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotAsPlanned) as caught, cs.watch_load(model, source):
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert {fault.kind for fault in caught.value.faults} == {"left-as-built"}
    assert len(caught.value.faults) == len([v for v in source.values() if v.is_floating_point()])


def test_the_last_shard_is_never_read() -> None:
    shards = [{}, {}]  # type: list[dict[str, Tensor]]
    source = trained(Net(tied=False)).state_dict()
    for key, tensor in source.items():
        shards["layers.3" in key or "head" in key][key] = tensor
    model = Net(tied=False)
    for shard in shards[:1]:
        model.load_state_dict(shard, strict=False)
    assert set(kinds(model, source)) == set(shards[1])


def test_layers_are_numbered_from_one_on() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False)
    with torch.no_grad():
        for key, tensor in source.items():
            number = int(key.split(".")[1]) if key.startswith("layers.") else None
            if number is None or number + 1 < 4:
                name = key if number is None else key.replace(f"layers.{number}", f"layers.{number + 1}")
                model.state_dict()[name].copy_(tensor)
    found = kinds(model, source)
    assert {found[f"layers.{i}.weight"] for i in (1, 2, 3)} == {"holds-another"}
    assert found["layers.0.weight"] == "left-as-built"


def test_a_square_weight_is_not_transposed() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False)
    model.load_state_dict({k: v.T if k.startswith("layers.") and v.dim() == 2 else v for k, v in source.items()})
    assert set(kinds(model, source).values()) == {"rearranged"}


def test_half_precision_on_the_way_leaves_rounded_weights() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False).half()
    model.load_state_dict(source)
    model.float()
    assert of_weights(kinds(model, source)) == {"rounded"}


def test_weights_are_cast_to_the_model_s_dtype_without_a_word() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False).to(torch.bfloat16)
    model.load_state_dict(source)
    assert set(kinds(model, source).values()) == {"cast"}
    report = cs.check_loaded(model, source, dtype="model")
    assert set(report.cast) == {k for k, v in source.items() if v.is_floating_point()}


def test_running_statistics_are_no_parameters() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source[name])
    assert kinds(model, source) == {"norm.running_mean": "left-as-built", "norm.running_var": "left-as-built"}


def test_a_load_that_broke_off_leaves_a_tensor_half_new() -> None:
    source = trained(Net(tied=False)).state_dict()
    model = Net(tied=False)
    model.load_state_dict(source)
    with torch.no_grad():
        model.embed.weight[24:] = 0
    assert kinds(model, source) == {"embed.weight": "partly-loaded"}


def test_what_stays_on_the_meta_device_has_no_data() -> None:
    source = trained(Net(tied=False)).state_dict()
    with torch.device("meta"):
        model = Net(tied=False)
    model.load_state_dict({k: v for k, v in source.items() if "head" not in k}, strict=False, assign=True)
    assert kinds(model, source) == {"head.weight": "no-data"}
