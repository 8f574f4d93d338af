"""Tensors in memory, live modules, and several sources under prefixes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage import Checkpoint, open_checkpoint

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(2)


class Config:
    def to_dict(self) -> dict[str, Any]:
        return {"width": 3}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.config = Config()

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 7}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_state_dict_gives_its_own_tensors() -> None:
    ckpt = open_checkpoint({"a": A, "b": B})
    assert ckpt.load("a") is not A
    assert ckpt.load("a").data_ptr() == A.data_ptr()
    assert ckpt.extent("a") is None
    assert bytes(ckpt.read("a", 4, 12)) == A.numpy().tobytes()[4:12]
    assert torch.equal(ckpt["a"][1:], A[1:])
    assert ckpt.files == ()


def test_what_is_no_tensor_goes_to_extras() -> None:
    state = OrderedDict(a=A)
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    ckpt = open_checkpoint({"model": state, "epoch": 3, "optimizer": {"state": {0: {"avg": B}}, "param_groups": []}})
    assert list(ckpt) == ["a"]
    assert ckpt.extras["epoch"] == 3
    assert ckpt.extras["_metadata"] == {"": {"version": 2}}
    assert torch.equal(ckpt.extras["optimizer"]["state"][0]["avg"], B)


def test_two_state_dicts_side_by_side_are_asked_back_and_a_subtree_answers() -> None:
    source = {"model": {"x.a": A}, "ema": {"x.a": A + 1}}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert "subtree" in str(caught.value.diagnostics[0].help)
    assert torch.equal(open_checkpoint(source, subtree="ema").load("x.a"), A + 1)
    assert list(open_checkpoint(source, subtree="")) == ["model.x.a", "ema.x.a"]


def test_ties_are_equal_views_and_nothing_less() -> None:
    flat = torch.arange(12.0)
    state = {
        "left": flat[:6],
        "right": flat[6:],
        "square": flat[:6].view(2, 3),
        "again": flat[:6],
        "bits": flat[:6].view(torch.int32),
        "empty": torch.empty(0),
        "void": torch.empty(0),
        "transposed": A.T,
        "plain": A,
        "same": A,
    }
    ckpt = open_checkpoint(state)
    assert [(tie.names, tie.kind) for tie in ckpt.ties] == [
        (("left", "again"), "storage"),
        (("plain", "same"), "storage"),
    ]
    loaded = ckpt.state_dict()
    assert loaded["left"] is loaded["again"]
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], state[key]) and loaded[key].is_contiguous() for key in state)
    assert ckpt.nbytes == 6 * 4 * 6


def test_a_module_keeps_its_ties_its_config_and_its_extra_state() -> None:
    model = Tied()
    ckpt = open_checkpoint(model)
    assert list(ckpt) == [key for key in model.state_dict() if not key.endswith("_extra_state")]
    assert [tie.names for tie in ckpt.ties] == [("embed.weight", "head.weight")]
    assert ckpt.config == {"width": 3}
    assert ckpt.extras["_extra_state"] == {"steps": 7}
    assert ckpt.extras["_metadata"]["norm"] == {"version": 2}
    assert not ckpt.load("embed.weight").requires_grad
    assert ckpt["norm.num_batches_tracked"].dtype == "I64"


def test_a_meta_model_has_specs_and_ties_but_no_data() -> None:
    with torch.device("meta"):
        model = Tied()
    ckpt = open_checkpoint(model)
    assert ckpt["embed.weight"].shape == (4, 3)
    assert [tie.names for tie in ckpt.ties] == [("embed.weight", "head.weight")]
    for read in (ckpt.load, ckpt.read):
        with pytest.raises(CheckpointError, match="meta-tensor"):
            read("embed.weight")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_no_file_can_hold_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="quint8"):
        open_checkpoint({"q": torch.quantize_per_tensor(A, 1.0, 0, torch.quint8)})


def test_views_that_torch_resolves_lazily_give_their_values() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    ckpt = open_checkpoint({"conj": z.conj(), "neg": z.conj().imag, "strided": A[:, 1]})
    assert bytes(ckpt.read("conj")) == z.conj().resolve_conj().numpy().tobytes()
    assert bytes(ckpt.read("neg")) == z.conj().imag.resolve_neg().contiguous().numpy().tobytes()
    assert bytes(ckpt.read("strided")) == A[:, 1].contiguous().numpy().tobytes()


def test_a_mapping_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"a": A}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        open_checkpoint(state)


def test_an_empty_state_dict_is_an_empty_checkpoint() -> None:
    assert len(open_checkpoint({})) == 0


def test_a_checkpoint_passes_through_unchanged() -> None:
    ckpt = open_checkpoint({"a": A})
    assert open_checkpoint(ckpt) is ckpt


def test_mounts_put_prefixes_before_everything(tmp_path: Path) -> None:
    for name, width in (("v", 3), ("l", 4)):
        (tmp_path / name).mkdir()
        save_file({"w": A, "b": B}, tmp_path / name / "model.safetensors", metadata={"tied": "w", "made": "by hand"})
        (tmp_path / name / "config.json").write_text(f'{{"width": {width}}}')
    with open_checkpoint({"vision.": tmp_path / "v", "llm.": str(tmp_path / "l"), "": nn.Linear(2, 1)}) as ckpt:
        assert list(ckpt) == ["vision.b", "vision.w", "vision.tied", "llm.b", "llm.w", "llm.tied", "weight", "bias"]
        assert [tie.names for tie in ckpt.ties] == [("vision.w", "vision.tied"), ("llm.w", "llm.tied")]
        assert ckpt.config == {"vision": {"width": 3}, "llm": {"width": 4}}
        assert ckpt.metadata["llm.made"] == "by hand"
        assert torch.equal(ckpt.load("llm.w"), A)
        assert len(ckpt.files) == 2


def test_a_config_that_all_mounts_share_stays_as_it_is(tmp_path: Path) -> None:
    save_file({"w": A}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"width": 3}')
    path = tmp_path / "x.safetensors"
    assert open_checkpoint({"a.": path, "b.": path}).config == {"width": 3}
    assert open_checkpoint({"a.": path, "b.": nn.Linear(1, 1)}).config == {"width": 3}


def test_mounts_may_hold_checkpoints_and_state_dicts() -> None:
    inner = open_checkpoint({"w": A})
    assert isinstance(open_checkpoint({"a.": inner, "b/": {"w": B}}), Checkpoint)
    assert list(open_checkpoint({"a.": inner, "b/": {"w": B}})) == ["a.w", "b/w"]
    assert list(open_checkpoint({"a.": inner, "b/": {"w": B}}, subtree="a")) == ["w"]


def test_mounts_that_meet_are_refused_and_all_failures_told() -> None:
    with pytest.raises(CheckpointError, match="duplicate-key"):
        open_checkpoint({"a.": open_checkpoint({"b.w": A}), "a.b.": open_checkpoint({"w": B})})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint({"a.": "missing-one.pt", "b.": "missing-two.pt"})
    assert [d.code for d in caught.value.diagnostics] == ["missing-file"] * 2
