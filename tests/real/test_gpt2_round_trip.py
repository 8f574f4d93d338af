"""GPT-2 of transformers: saved, sharded, converted, loaded into a meta model; the head stays tied on every road."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import ckptsurgery as cs

CONFIG = GPT2Config(
    vocab_size=96,
    n_positions=24,
    n_embd=16,
    n_layer=3,
    n_head=4,
    bos_token_id=0,
    eos_token_id=0,
    activation_function="gelu",
)
IDS = torch.arange(20).view(2, 10) * 7 % 96

LINEAR = cs.Recipe(
    [
        "transformer.wte.weight -> tokens.weight",
        "transformer.wpe.weight -> positions.weight",
        "transformer.ln_f.{l} -> norm.{l}",
        "transformer.h.{i}.{n:ln_1,ln_2}.{l} -> blocks.{i}.{n:norm1,norm2}.{l}",
        "transformer.h.{i}.attn.{m:c_attn,c_proj}.{l} [x y?] -> blocks.{i}.{m:qkv,out}.{l} [y? x]",
        "transformer.h.{i}.mlp.{m:c_fc,c_proj}.{l} [x y?] -> blocks.{i}.{m:up,down}.{l} [y? x]",
    ],
    tie={"head.weight": "tokens.weight"},
)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """The same network with linear layers in place of Conv1D, its names its own, its head tied."""

    def __init__(self, config: GPT2Config = CONFIG) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def source() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(CONFIG).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def folder(source: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    source.save_pretrained(path, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def agree(model: nn.Module, source: GPT2LMHeadModel) -> bool:
    with torch.no_grad():
        found = model.eval()(IDS)
        return torch.allclose(getattr(found, "logits", found), source(IDS).logits, atol=1e-5)


def on_meta() -> Decoder:
    with torch.device("meta"):
        return Decoder()


def whole(model: nn.Module) -> bool:
    return not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


WRITTEN = ["linear", "linear.safetensors", "linear.pt", "linear.bin"]


@pytest.mark.parametrize("name", WRITTEN)
def test_converted_and_loaded_into_a_meta_model_it_is_still_tied(
    name: str, folder: Path, source: GPT2LMHeadModel, tmp_path: Path
) -> None:
    report = cs.plan(folder, LINEAR).save(
        tmp_path / name, max_shard_size="6KB" if name == "linear" else None, check=True
    )
    assert report.tied == ("head.weight",) and (len(report.files) > 3) is (name == "linear")
    with cs.open(tmp_path / name) as converted:
        assert [set(t.names) for t in converted.ties] == [{"head.weight", "tokens.weight"}]
        # the tied tensor lies in the file once
        stored = sum(p.numel() * 4 for p in source.parameters())
        assert stored <= sum(Path(f).stat().st_size for f in report.files) < stored + 4 * 96 * 16 + 16_000
        state = converted.state_dict()
        assert state["head.weight"] is state["tokens.weight"]
    model = on_meta()
    loaded = cs.load_into(model, tmp_path / name, assign=True)
    assert model.head.weight is model.tokens.weight and whole(model) and agree(model, source)
    assert loaded.coverage == 1 and loaded.tied == ("head.weight",) and not loaded.dropped


@pytest.mark.parametrize("assign", [False, True])
def test_the_folder_of_transformers_loads_by_the_recipe_in_one_step(
    assign: bool, folder: Path, source: GPT2LMHeadModel
) -> None:
    model = on_meta() if assign else Decoder()
    cs.load_into(model, folder, LINEAR, assign=assign)
    assert model.head.weight is model.tokens.weight and agree(model, source)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("assign", [False, True])
def test_a_torch_file_that_holds_both_names_loads_tied(
    zipped: bool, assign: bool, source: GPT2LMHeadModel, tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with torch.device("meta" if assign else "cpu"):
        model = GPT2LMHeadModel(CONFIG)
    report = cs.load_into(model, path, assign=assign)
    assert model.lm_head.weight is model.transformer.wte.weight and whole(model) and agree(model, source)
    assert report.coverage == 1 and not report.missing_keys
    with pytest.raises(cs.PlanError) as error:
        cs.plan(path, LINEAR)
    assert "lm_head.weight" in str(error.value)
    both = LINEAR + cs.Recipe(drop=["lm_head.weight"])
    tied = Decoder()
    cs.load_into(tied, path, both)
    assert tied.head.weight is tied.tokens.weight and agree(tied, source)


def test_there_and_back_is_bit_for_bit(folder: Path, source: GPT2LMHeadModel, tmp_path: Path) -> None:
    plan = cs.plan(folder, LINEAR)
    plan.save(tmp_path / "linear", max_shard_size="6KB")
    back = plan.inverse(tmp_path / "linear").state_dict()
    state = source.state_dict()
    assert set(back) == set(state) - {"lm_head.weight"} and all(torch.equal(back[k], state[k]) for k in back)
    symbolic = cs.plan(tmp_path / "linear", LINEAR.inverse()).state_dict()
    assert symbolic.keys() == back.keys() and all(torch.equal(back[k], symbolic[k]) for k in back)


def test_transformers_reads_what_comes_back(folder: Path, source: GPT2LMHeadModel, tmp_path: Path) -> None:
    forward = cs.plan(folder, LINEAR)
    forward.save(tmp_path / "linear.safetensors")
    forward.inverse(tmp_path / "linear.safetensors").save(tmp_path / "back", max_shard_size="6KB")
    (tmp_path / "back" / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert model.lm_head.weight is model.transformer.wte.weight and agree(model, source)


@pytest.mark.parametrize("assign", [False, True])
def test_to_empty_loses_the_tie_and_the_load_brings_it_back(
    assign: bool, folder: Path, source: GPT2LMHeadModel
) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(CONFIG)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.transformer.wte.weight
    cs.load_into(model, folder, assign=assign)
    assert model.lm_head.weight is model.transformer.wte.weight and agree(model, source)


def test_a_tie_that_a_model_of_ones_own_lost_is_given_back_by_the_file_that_has_it(
    folder: Path, source: GPT2LMHeadModel, tmp_path: Path
) -> None:
    cs.plan(folder, LINEAR).save(tmp_path / "linear", max_shard_size="6KB")
    model = on_meta().to_empty(device="cpu")
    assert model.head.weight is not model.tokens.weight
    report = cs.load_into(model, tmp_path / "linear")
    # nothing in this model says that its head is tied: both are filled, and the user is free to tie
    assert torch.equal(model.head.weight, model.tokens.weight) and agree(model, source) and report.coverage == 1


def test_saved_as_a_model_it_comes_back_tied(source: GPT2LMHeadModel, tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.pt", "three"):
        for what in (source, source.state_dict()):
            cs.save(what, tmp_path / name, max_shard_size="8KB" if name == "three" else None, overwrite=True)
            with torch.device("meta"):
                model = GPT2LMHeadModel(CONFIG)
            cs.load_into(model, tmp_path / name, assign=True)
            assert model.lm_head.weight is model.transformer.wte.weight and agree(model, source)
        if name == "two.pt":
            state = torch.load(tmp_path / name, weights_only=True)
            assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


def test_an_untied_head_of_the_same_class_stays_apart(tmp_path: Path) -> None:
    config = GPT2Config(**{**CONFIG.to_dict(), "tie_word_embeddings": False})
    source = GPT2LMHeadModel(config)
    nn.init.normal_(source.lm_head.weight)
    assert source.lm_head.weight is not source.transformer.wte.weight
    source.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    report = cs.load_into(model, tmp_path, assign=True)
    assert model.lm_head.weight is not model.transformer.wte.weight and not report.tied
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    # and a tied model refuses what differs
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(GPT2LMHeadModel(CONFIG), tmp_path)
    assert {d.code for d in error.value.diagnostics} == {"tied-values-differ"}
