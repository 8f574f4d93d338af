"""Checkpoints as wrappers and trainers write them, by the real wrappers where torch has them."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import ckptsurgery as cs


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.fc = nn.Linear(4, classes)


def filled(model: nn.Module, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def codes(error: pytest.ExceptionInfo[cs.CkptSurgeryError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture
def source() -> Net:
    return filled(Net())


@pytest.mark.parametrize("saved", ["memory", "x.pt", "x.safetensors"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda m: compiled(nn.DataParallel(m))])
def test_wrappers_of_torch_on_either_side(wrap: Any, saved: str, source: Net, tmp_path: Path) -> None:
    def stored(model: nn.Module) -> Any:
        if saved == "memory":
            return model.state_dict()
        cs.save(model, tmp_path / saved)
        return tmp_path / saved

    model = Net()
    report = cs.load_into(model, stored(wrap(source)))
    assert same(model.state_dict(), source.state_dict()) and report.coverage == 1
    assert sum("prefix" in note for note in report.notes) == 1
    bare = Net()
    (tmp_path / saved).unlink(missing_ok=True)
    cs.load_into(wrap(bare), stored(source))
    assert same(bare.state_dict(), source.state_dict())
    other = Net()
    (tmp_path / saved).unlink(missing_ok=True)
    cs.load_into(compiled(other), stored(nn.DataParallel(source)))
    assert same(other.state_dict(), source.state_dict())


def test_a_lightning_file_whose_classes_are_gone(source: Net, tmp_path: Path) -> None:
    gone = types.ModuleType("gone_for_good")
    sys.modules["gone_for_good"] = gone
    for name in ("Hyper", "Callback"):
        setattr(gone, name, type(name, (), {"__module__": "gone_for_good"}))
    hyper, callback = gone.Hyper(), gone.Callback()
    hyper.lr, hyper.net = 0.1, callback
    file = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{k}": v for k, v in source.state_dict().items()} | {"criterion.weight": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {gone.Callback: callback, "ModelCheckpoint{'mode': 'min'}": {"best": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "cfg",
        "hyper_parameters": hyper,
    }
    torch.save(file, tmp_path / "last.ckpt")
    del sys.modules["gone_for_good"], hyper, callback, file
    model = Net()
    with pytest.raises(cs.LoadError, match=r'drop=\["criterion'):
        cs.load_into(model, tmp_path / "last.ckpt")
    report = cs.load_into(model, tmp_path / "last.ckpt", drop="criterion")
    assert same(model.state_dict(), source.state_dict()) and report.dropped == ("criterion.weight",)
    assert cs.open(tmp_path / "last.ckpt").extras["epoch"] == 3
    assert "gone_for_good" not in sys.modules


def test_a_file_of_a_distributed_trainer(source: Net, tmp_path: Path) -> None:
    shapes = [{k: v.shape for k, v in source.named_parameters()}]
    file = {
        "module": source.state_dict(),
        "buffer_names": ["norm.running_mean"],
        "optimizer": None,
        "param_shapes": shapes,
        "lr_scheduler": {"last_epoch": 4},
        "sparse_tensor_module_names": set(),
        "global_steps": 3,
        "ds_config": {"train_batch_size": 2},
        "ds_version": "0.14",
    }
    torch.save(file, tmp_path / "mp_rank_00_model_states.pt")
    model = Net()
    cs.load_into(model, tmp_path / "mp_rank_00_model_states.pt")
    assert same(model.state_dict(), source.state_dict())


def test_weights_and_their_average_side_by_side_are_asked_about(source: Net, tmp_path: Path) -> None:
    average = filled(Net(), 2)
    file = {"epoch": 9, "arch": "net", "state_dict": source.state_dict(), "state_dict_ema": average.state_dict(),
            "optimizer": {"state": {}, "param_groups": []}, "metric": 81.3, "version": 2}  # fmt: skip
    torch.save(file, tmp_path / "best.pth.tar")
    with pytest.raises(cs.CheckpointError) as error:
        cs.load_into(Net(), tmp_path / "best.pth.tar")
    assert 'subtree="state_dict"' in str(error.value) and 'subtree="state_dict_ema"' in str(error.value)
    for subtree, meant in (("state_dict", source), ("state_dict_ema", average)):
        model = Net()
        cs.load_into(model, tmp_path / "best.pth.tar", subtree=subtree)
        assert same(model.state_dict(), meant.state_dict())


def contrastive(source: Net, projector: bool) -> dict[str, Tensor]:
    """Query and key encoder, and a queue, as momentum contrast saves them."""
    state: dict[str, Tensor] = {}
    for side, net in (("q", source), ("k", filled(Net(), 5))):
        state |= {
            f"module.encoder_{side}.{k}": v for k, v in net.state_dict().items() if not (projector and "fc." in k)
        }
        if projector:
            state |= {f"module.encoder_{side}.fc.{n}.weight": torch.ones(4, 4) for n in (0, 2)}
    return state | {"module.queue": torch.zeros(8, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}


@pytest.mark.parametrize("nested", [False, True])
def test_query_and_key_encoder_are_asked_about_and_three_ways_lead_out(
    nested: bool, source: Net, tmp_path: Path
) -> None:
    state = contrastive(source, projector=False)
    where: Any = state
    if nested:
        where = tmp_path / "moco.pth.tar"
        torch.save(
            {"epoch": 200, "arch": "net", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, where
        )
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(Net(), where)
    assert codes(error) == {"ambiguous-prefix"} and 'subtree="module.encoder_q"' in str(error.value)
    for way in (
        {"subtree": "module.encoder_q"},
        {"drop": ["module.encoder_k", "module.queue", "module.queue_ptr"]},
        {"recipe": cs.Recipe(["module.encoder_q.{r...} -> {r...}"], rest="drop")},
    ):
        model = Net()
        cs.load_into(model, where, **way)
        assert same(model.state_dict(), source.state_dict())


def test_a_projector_in_the_place_of_the_classifier_is_set_aside_by_name(source: Net) -> None:
    state = contrastive(source, projector=True)
    model = Net(classes=7)
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, state, subtree="module.encoder_q")
    assert codes(error) == {"missing-keys", "unexpected-keys"}
    assert 'init=["fc"]' in str(error.value) and 'drop=["fc"]' in str(error.value)
    report = cs.load_into(model, state, subtree="module.encoder_q", init="fc", drop="fc")
    assert report.initialised == ("fc.weight", "fc.bias") and len(report.dropped) == 2
    assert torch.equal(model.stem.weight, source.stem.weight)


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
@pytest.mark.parametrize("assign", [False, True])
def test_parametrised_layers_compute_what_the_source_computed(make: Any, assign: bool) -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(make(nn.Linear(4, 4)), nn.Linear(4, 2)).eval() for _ in range(2))
    report = cs.load_into(b, a.state_dict(), assign=assign)
    x = torch.ones(1, 4)
    assert torch.equal(a(x), b(x)) and same(a.state_dict(), b.state_dict()) and report.coverage == 1


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
def test_hooked_norms_of_old_torch_load_their_own_files() -> None:
    for wrap in (nn.utils.spectral_norm, nn.utils.weight_norm):
        torch.manual_seed(0)
        a, b = (nn.Sequential(wrap(nn.Linear(4, 4))).eval() for _ in range(2))
        report = cs.load_into(b, a.state_dict())
        x = torch.ones(1, 4)
        assert torch.equal(a(x), b(x)) and report.coverage == 1


@pytest.mark.parametrize("assign", [False, True])
def test_packed_attention_projections_and_recurrent_weights(assign: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    for kind in (
        lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        lambda: nn.LSTM(8, 4, 2, bidirectional=True),
    ):
        a = kind()
        for parameter in a.parameters():
            nn.init.normal_(parameter)
        b = kind() if not assign else kind().to("meta")
        cs.load_into(b, nn.DataParallel(a).state_dict(), assign=assign)
        x = torch.ones(1, 3, 8)
        found, expected = b(x), a(x)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        assert torch.equal(found, expected)


def test_apart_projections_go_into_packed_ones_by_a_rule() -> None:
    mha = nn.MultiheadAttention(8, 2)
    source = {
        f"{p}_proj.{l}": torch.randn(8, 8) if l == "weight" else torch.randn(8)
        for p in "qkv"
        for l in ("weight", "bias")
    }
    source |= {f"out_proj.{l}": v for l, v in mha.out_proj.state_dict().items()}
    rules = ["{p:q,k,v}_proj.{l} [o ...] -> in_proj_{l} [(p o) ...]", "out_proj.{l} -> out_proj.{l}"]
    assert cs.load_into(mha, source, rules).coverage == 1
    assert torch.equal(mha.in_proj_weight, torch.cat([source[f"{p}_proj.weight"] for p in "qkv"]))


@pytest.mark.parametrize("file", [False, True])
def test_an_averaged_model_goes_into_a_plain_one_and_back(file: bool, source: Net, tmp_path: Path) -> None:
    averaged = AveragedModel(source)
    averaged.n_averaged.fill_(4)
    where: Any = averaged.state_dict()
    if file:
        where = tmp_path / "swa.pt"
        torch.save({"ema": averaged.state_dict(), "epoch": 3}, where)
    model = Net()
    with pytest.raises(cs.LoadError, match=r'drop=\["n_averaged"\]'):
        cs.load_into(model, where)
    cs.load_into(model, where, drop="n_averaged")
    assert same(model.state_dict(), source.state_dict())
    other = AveragedModel(filled(Net(), 3))
    with pytest.raises(cs.LoadError, match=r'keep=\["n_averaged"\]'):
        cs.load_into(other, source.state_dict())
    cs.load_into(other, source.state_dict(), keep="n_averaged")
    assert same(other.module.state_dict(), source.state_dict()) and other.n_averaged == 0
    cs.load_into(other, where)
    assert other.n_averaged == 4


def test_norms_with_statistics_of_every_age(source: Net, tmp_path: Path) -> None:
    source.norm.num_batches_tracked.fill_(11)
    for name in ("x.pt", "x.safetensors"):
        cs.save(source, tmp_path / name)
        model = Net()
        cs.load_into(model, tmp_path / name)
        assert same(model.state_dict(), source.state_dict())
    bare = Net()
    bare.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(cs.LoadError, match="running_mean"):
        cs.load_into(bare, source.state_dict())
    drop = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert cs.load_into(bare, source.state_dict(), drop=drop).coverage == 1


def test_a_sequential_that_gained_a_layer_is_not_shifted_by_one() -> None:
    a = filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    b = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(b, a.state_dict())
    assert codes(error) == {"shape-mismatch", "missing-keys"} and same(b.state_dict(), before)
    cs.load_into(b, a.state_dict(), cs.Recipe(["2.{l} -> 3.{l}"], rest="keep"), init="2")
    assert torch.equal(b[3].weight, a[2].weight) and torch.equal(b[1].weight, a[1].weight)
