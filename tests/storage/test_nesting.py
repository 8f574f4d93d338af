"""Where the model lies in a training checkpoint: decided by nesting, refused when it is anybody's guess."""

from __future__ import annotations

import pytest
import torch

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.unpickling.inert import Opaque, Ordered, Storage, Tensor
from ckptsurgery.storage.unpickling.nesting import flatten, locate, settle


def tensor(*shape, dtype="F32"):
    return Tensor(Storage("0", dtype, 100), 0, shape, (1,) * len(shape), dtype)


W = tensor(2, 2)
STEP = tensor(dtype="I64")
SCORE = tensor()
RANDOM = tensor(5056, dtype="U8")
SD = {"a.weight": W, "a.bias": W, "a.num_batches_tracked": STEP}
OTHER = {"b.weight": W, "b.bias": W}
OPTIMIZER = {"state": {0: {"exp_avg": W, "step": SCORE}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    ("tree", "keys", "extras"),
    [
        (SD, list(SD), []),
        ({**SD, "train_state": {"step": STEP, "seen": 5}}, list(SD), ["train_state"]),
        ({**SD, "trainer": {"step": STEP, "loss": SCORE}, "optimizer": OPTIMIZER}, list(SD), ["trainer", "optimizer"]),
        ({"a": {"w": W, "norm": {"num_batches_tracked": STEP}}}, ["w", "norm.num_batches_tracked"], []),
        ({"state_dict": SD}, list(SD), []),
        ({"model": SD, "epoch": 3}, list(SD), ["epoch"]),
        ({"net": SD, "acc": 0.9, "epoch": 1}, list(SD), ["acc", "epoch"]),
        ({"anything": SD, "optimizer": OPTIMIZER}, list(SD), ["optimizer"]),
        ({"model": SD, "whatever": OPTIMIZER}, list(SD), ["whatever"]),
        ({"model": SD, "optimizers": [OPTIMIZER, OPTIMIZER]}, list(SD), ["optimizers"]),
        ({"model": SD, "optim_state": {"exp_avg": {"a": W}}}, list(SD), ["optim_state"]),
        ({"checkpoint": {"model": SD, "args": 1}, "v": 2}, list(SD), ["checkpoint.args", "v"]),
        ({"model": SD, "rng": RANDOM, "loss": SCORE}, list(SD), ["rng", "loss"]),
        ({"model": SD, "rng": {"torch": RANDOM, "cuda": [RANDOM]}}, list(SD), ["rng"]),
        ({"model": SD, "mean": tensor(3), "std": tensor(3)}, list(SD), ["mean", "std"]),
        ({"model": SD, "best": {"score": SCORE, "runs/1.ckpt": SCORE}}, list(SD), ["best"]),
        ({"model": {"state_dict": SD, "epoch": 3}}, list(SD), ["model.epoch"]),
        ([SD, 3], list(SD), ["1"]),
        ({**SD, "epoch": 3, "a._extra_state": b"x"}, list(SD), ["epoch", "a._extra_state"]),
        ({**SD, "a._extra_state": {"scale": W}}, list(SD), ["a._extra_state"]),
        ({"model": {"encoder": {"w": W}, "decoder": {"w": W, "b": W}}}, ["encoder.w", "decoder.w", "decoder.b"], []),
        ({"params": {"l0": {"w": W, "b": W}, "l1": {"w": W, "b": W}}}, ["l0.w", "l0.b", "l1.w", "l1.b"], []),
        ({"model": {"lm": {"emb": {"w": W}, "trunk": OTHER}}}, ["lm.emb.w", *(f"lm.trunk.{k}" for k in OTHER)], []),
        ({"model": SD, "ema": {"shadow_params": [W, W], "decay": 0.9}}, list(SD), ["ema"]),
        ({"count": STEP}, ["count"], []),
        ([W, W], ["0", "1"], []),
        (W, ["tensor"], []),
    ],
    ids=str,
)  # fmt: skip
def test_one_candidate_is_taken_and_the_rest_kept_apart(tree, keys, extras):
    found, rest = locate(tree, None, "x.pt")
    assert list(found) == keys
    assert sorted(rest) == sorted(extras)


def test_lightning_names_its_model():
    tree = {"pytorch-lightning_version": "2.1", "state_dict": SD, "callbacks": {"EMA": {"weights": OTHER}}}
    found, rest = locate(tree, None, "x.ckpt")
    assert list(found) == list(SD) and sorted(rest) == ["callbacks", "pytorch-lightning_version"]


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"model": SD, "ema": SD}, ["model", "ema"]),
        ({"student": SD, "teacher": SD, "epoch": 3}, ["student", "teacher"]),
        ({"encoder": {"w": W}, "decoder": {"w": W}}, ["encoder", "decoder"]),
        ({"encoder": SD, "head": {"weight": W, "bias": W}}, ["encoder", "head"]),
        ({"ckpt": {"model": SD, "model_ema": SD}}, ["ckpt.model", "ckpt.model_ema"]),
        ({"model": {"student": SD, "teacher": SD}}, ["model.student", "model.teacher"]),
        ({**SD, "ema": dict(SD)}, ["", "ema"]),
    ],
    ids=str,
)
def test_several_candidates_are_listed_with_the_line_to_paste(tree, paths):
    with pytest.raises(CheckpointError) as caught:
        locate(tree, None, "x.pt")
    (problem,) = caught.value.diagnostics
    assert problem.code == "ambiguous-subtree"
    for path in paths:
        assert any(note.startswith(f'subtree="{path}"  ') and " tensor" in note for note in problem.notes)
        locate(tree, path, "x.pt")


def test_a_subtree_is_taken_as_it_is():
    tree = {"model": SD, "ema": {"module": OTHER, "decay": 0.9}, "optimizer": OPTIMIZER}
    found, rest = locate(tree, "ema.module", "x.pt")
    assert list(found) == list(OTHER)
    assert sorted(rest) == ["ema.decay", "model", "optimizer"]
    assert list(locate(tree, "ema", "x.pt")[0]) == ["module.b.weight", "module.b.bias"]
    assert len(locate(tree, "", "x.pt")[0]) == 7
    assert "optimizer.state.0.exp_avg" in locate(tree, "", "x.pt")[0]


def test_a_subtree_may_have_dots_in_its_names_or_be_a_prefix_of_keys():
    assert list(locate({"a.b": {"c": {"w": W}}, "a": {"x": W}}, "a.b.c", "x.pt")[0]) == ["w"]
    assert list(locate({"enc.a.w": W, "dec.w": W}, "enc", "x.pt")[0]) == ["a.w"]
    nested = {"state_dict": {"student.a.w": W, "teacher.a.w": W}, "epoch": 1}
    assert list(locate(nested, "state_dict.student", "x.pt")[0]) == ["a.w"]
    assert list(locate(nested, "teacher", "x.pt")[0]) == ["a.w"]
    assert list(locate([{"m": SD}, {"m": OTHER}], "1.m", "x.pt")[0]) == list(OTHER)


def test_a_subtree_that_is_not_there_is_an_error_that_lists_what_is():
    with pytest.raises(CheckpointError, match=r"no subtree 'modle'(.|\n)*there are: model, ema"):
        locate({"model": SD, "ema": SD}, "modle", "x.pt")
    with pytest.raises(CheckpointError, match="is one tensor"):
        locate({"w": W}, "w", "x.pt")
    with pytest.raises(CheckpointError, match="no tensors: it holds epoch"):
        locate({"epoch": 3}, None, "x.pt")


def test_metadata_comes_with_the_state_dict_that_has_it():
    sd = Ordered()
    sd.update(SD)
    sd.attributes["_metadata"] = {"": {"version": 1}}
    assert locate({"model": sd}, None, "x.pt")[1] == {"_metadata": {"": {"version": 1}}}


def test_a_prefix_cuts_the_metadata_with_the_keys():
    sd = Ordered()
    sd.update({"enc.bn.w": W, "dec.w": W})
    sd.attributes["_metadata"] = {"": {}, "enc": {"v": 1}, "enc.bn": {"v": 2}, "encoder": {}, "dec": {}}
    assert locate(sd, "enc", "x.pt")[1] == {"_metadata": {"": {"v": 1}, "bn": {"v": 2}}}


def test_slices_and_dict_subclasses_are_harmless():
    kind = Opaque("omegaconf", "DictConfig", ())
    kind.pairs = {"lr": 0.1, "layers": (1, 2)}
    _, rest = locate({"a.w": W, "s": Opaque("builtins", "slice", (1, 2)), "c": kind}, None, "x.pt")
    extras = settle(rest, lambda leaf: leaf)
    assert extras["c"] == {"lr": 0.1, "layers": (1, 2)} and repr(extras["s"]) == "<builtins.slice>"


def test_two_paths_of_one_name_are_an_error():
    with pytest.raises(CheckpointError, match=r"two tensors that flatten to 'a.b'"):
        locate({"a": {"b": W}, "a.b": W}, "", "x.pt")


def module(state, *parameters, **modules):
    made = Opaque("gone", "Net", ())
    made.state = {"_parameters": dict.fromkeys(parameters, W), "_buffers": {}, "_modules": modules, **state}
    return made


def test_modules_are_walked_without_their_classes():
    net = module({}, "scale", conv=module({}, "weight", "bias"), act=module({}))
    assert list(locate(net, None, "x.pt")[0]) == ["scale", "conv.weight", "conv.bias"]
    assert list(locate({"model": net, "epoch": 3}, None, "x.pt")[0]) == ["scale", "conv.weight", "conv.bias"]
    with pytest.raises(CheckpointError, match="several places: 'model', 'ema'"):
        locate({"model": net, "ema": net}, None, "x.pt")


def test_shared_and_circular_trees_end():
    shared: list = [W]
    for _ in range(100):
        shared = [shared, shared]
    circular: dict = {"w": W}
    circular["self"] = circular
    for tree in (shared, circular, {"model": SD, "junk": circular}, {"model": SD, "junk": shared}):
        try:
            _, extras = locate(tree, None, "x.pt")
            settle(extras, lambda leaf: leaf)
        except CheckpointError:
            pass
    with pytest.raises(CheckpointError, match="without end"):
        flatten(circular, "x.pt")


def test_many_candidates_are_folded():
    tree = {f"part{i}": {"a.w": W, f"b{i}.w": W} for i in range(50)}
    with pytest.raises(CheckpointError) as caught:
        locate(tree, None, "x.pt")
    notes = caught.value.diagnostics[0].notes
    assert len(notes) < 16 and notes[-2] == "… and 38 more" and notes[-1].startswith('subtree=""  100 tensors')


STATE = {"blocks.0.weight": torch.ones(3, 2), "blocks.0.bias": torch.ones(3)}
MOMENTS = {"mean": torch.ones(3), "std": torch.ones(3)}


@pytest.mark.parametrize(
    ("tree", "key", "beside"),
    [
        ({"model_state_dict": STATE, "config": {"anchors": torch.ones(9, 2), **MOMENTS}}, "blocks.0.weight", "config"),
        ({"model_state_dict": STATE, "config": {"data": MOMENTS, "b": torch.ones(2)}}, "blocks.0.weight", "config"),
        ({"generator": STATE, "hyper_parameters": MOMENTS}, "blocks.0.weight", "hyper_parameters"),
        ({"net": {"weight": torch.ones(2, 2)}, "train_cfg": MOMENTS}, "weight", "train_cfg"),
        ({"model": STATE, "normalizer": MOMENTS}, "blocks.0.weight", "normalizer"),
    ],
)
def test_settings_and_statistics_beside_a_model_are_extras(tree, key, beside, tmp_path):
    torch.save(tree, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as ckpt:
        assert key in ckpt
        assert len(ckpt) == len(next(iter(tree.values())))
        assert beside in ckpt.extras


@pytest.mark.parametrize(
    "tree",
    [
        {"model": STATE, "ema": dict(STATE)},
        {"model": STATE, "head": {"weight": torch.ones(3), "bias": torch.ones(3)}},
        {"model": STATE, "projection": {"matrix": torch.ones(2, 2)}},
        {"encoder": STATE, "decoder": MOMENTS},
    ],
)
def test_what_may_be_weights_beside_a_model_is_asked_back(tree, tmp_path):
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert [d.code for d in caught.value.diagnostics] == ["ambiguous-subtree"]


def test_a_part_of_a_model_may_be_called_config(tmp_path):
    torch.save({"model": {"config": MOMENTS, "layer": {"weight": torch.ones(2)}}}, tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt")) == {"config.mean", "config.std", "layer.weight"}


@pytest.mark.parametrize("depth", [1, 40, 60])
def test_records_beside_a_model_come_back_as_deep_as_they_are(depth, tmp_path):
    record = ["bottom", *range(20)]
    for level in range(depth):
        record = {"inner": record, "level": level, **dict.fromkeys("abcdefgh")}
    torch.save({"model": STATE, "record": record}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.extras["record"] == record
