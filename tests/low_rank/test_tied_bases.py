"""Adapters of embeddings and heads for a base that ties them: the output computes what the adapter computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ckptsurgery as cs

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FRONT = "base_model.model."
IDS = torch.arange(6)[None]


@pytest.fixture
def base(tmp_path: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=11, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in cs.open(tmp_path / "base")
    return model


def stored(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


def update(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A pair as PEFT stores it for an embedding or a head, with the weight beside it, and the updated weight."""
    a, b = torch.randn(2, 11), torch.randn(8, 2)
    if module == HEAD:
        pair = {"lora_A.weight": b.T, "lora_B.weight": a.T}
    else:
        pair = {"lora_embedding_A": a, "lora_embedding_B": b}
    parts = {**pair, "base_layer.weight": weight}
    return {f"{FRONT}{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}, weight + 2 * (b @ a).T


def computes(folder: Path, model: LlamaForCausalLM, embedding: Tensor, head: Tensor) -> bool:
    """Whether the model of a folder computes what one with this embedding and this head does."""
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(folder).eval()(IDS).logits
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight = torch.nn.Parameter(head)
        return torch.allclose(found, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("modules", [(HEAD,), (EMBEDDING, HEAD)])
def test_a_head_of_its_own_unties_the_output(modules: tuple[str, ...], base: LlamaForCausalLM, tmp_path: Path) -> None:
    weight = base.model.embed_tokens.weight.detach().clone()
    found = {module: update(module, weight) for module in modules}
    lora = stored(tmp_path / "lora", {k: t for tensors, _ in found.values() for k, t in tensors.items()})
    report = cs.adapters.merge(tmp_path / "base", lora).save(tmp_path / "out", companions=True)
    assert "config.json: tie_word_embeddings = False" in report.notes
    assert computes(tmp_path / "out", base, found[EMBEDDING][1] if EMBEDDING in found else weight, found[HEAD][1])


def test_a_head_that_was_trained_whole_unties_the_output(base: LlamaForCausalLM, tmp_path: Path) -> None:
    weight, head = base.model.embed_tokens.weight.detach().clone(), torch.randn(11, 8)
    lora = stored(tmp_path / "lora", {f"{FRONT}{HEAD}.weight": head}, modules_to_save=["lm_head"])
    cs.adapters.merge(tmp_path / "base", lora).save(tmp_path / "out", companions=True)
    assert computes(tmp_path / "out", base, weight, head)
    both = {f"{FRONT}{module}.weight": head for module in (HEAD, EMBEDDING)}
    tied = stored(tmp_path / "tied", both, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    cs.adapters.merge(tmp_path / "base", tied).save(tmp_path / "both", companions=True)
    assert computes(tmp_path / "both", base, head, head)


def test_an_embedding_alone_is_merged_with_a_warning(base: LlamaForCausalLM, tmp_path: Path) -> None:
    weight = base.model.embed_tokens.weight.detach().clone()
    tensors, wanted = update(EMBEDDING, weight)
    lora = stored(tmp_path / "lora", tensors)
    plan = cs.adapters.merge(tmp_path / "base", lora)
    assert [warning.code for warning in plan.warnings] == ["adapter-tied"]
    assert plan.save(tmp_path / "out", companions=True).warnings
    assert computes(tmp_path / "out", base, wanted, wanted)  # as PEFT's own merge of a tied model


def test_the_remedy_gives_what_the_adapter_computed(base: LlamaForCausalLM, tmp_path: Path) -> None:
    weight = base.model.embed_tokens.weight.detach().clone()
    tensors, wanted = update(EMBEDDING, weight)
    rule = f"+ {EMBEDDING}.weight -> {HEAD}.weight"
    edits = {"set": {"tie_word_embeddings": False}}
    cs.plan(tmp_path / "base", cs.Recipe([rule], rest="keep", config=edits)).save(tmp_path / "untied", companions=True)
    plan = cs.adapters.merge(tmp_path / "untied", stored(tmp_path / "lora", tensors))
    assert not plan.warnings
    plan.save(tmp_path / "out", companions=True)
    assert computes(tmp_path / "out", base, wanted, weight)


def test_two_adapters_that_store_the_weight_must_store_the_base(base: LlamaForCausalLM, tmp_path: Path) -> None:
    weight = base.model.embed_tokens.weight.detach().clone()
    both = [update(EMBEDDING, weight) for _ in range(2)]
    loras = [stored(tmp_path / f"lora{n}", tensors) for n, (tensors, _) in enumerate(both)]
    made = cs.adapters.merge(tmp_path / "base", *loras).state_dict()
    wanted = both[0][1] + both[1][1] - weight
    torch.testing.assert_close(made[f"{EMBEDDING}.weight"], wanted)
    key = f"{FRONT}{EMBEDDING}.base_layer.weight"
    other = stored(tmp_path / "other", {**both[0][0], key: weight + 1})
    with pytest.raises(cs.CkptSurgeryError, match="must be equal"):
        cs.adapters.merge(tmp_path / "base", loras[0], other).state_dict()
