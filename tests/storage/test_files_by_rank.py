"""Folders in which every rank has a file: joined, or mounted with the rank as one more index."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.boxes import covers_once
from ckptsurgery.storage.formats.zero import boxes_of_run

State = dict[str, torch.Tensor]


def model(seed: int) -> State:
    draw = random.Random(seed)
    shapes = [tuple(draw.randrange(1, 6) for _ in range(draw.randrange(4))) for _ in range(9)]
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{n}.w": torch.randn(shape, generator=generator) for n, shape in enumerate(shapes)}


def module_file(state: State, groups: list[State], frozen: State, count: int) -> dict[str, Any]:
    """The model's file as DeepSpeed writes it."""
    return {
        "module": OrderedDict((name, tensor.bfloat16()) for name, tensor in state.items()),
        "buffer_names": ["table"],
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()} or None,
        "frozen_param_fragments": frozen or None,
        "shared_params": {"head.w": "layers.0.w"},
        "ds_version": "0.19.8",
        "global_steps": 7,
        "dp_world_size": count,
    }


def save_two(folder: Path, groups: list[State], state: State, count: int, paddings: list[list[int]] | None) -> None:
    """Stage 1 or 2: the group as one vector, whose partitions are aligned."""
    folder.mkdir()
    frozen = {"frozen.w": state["frozen.w"]}
    torch.save(module_file(state, groups, frozen, count), folder / "mp_rank_00_model_states.pt")
    partitions: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for number, group in enumerate(groups):
        parts = []
        for place, tensor in enumerate(group.values()):
            parts += [tensor.flatten(), torch.full((paddings[number][place] if paddings else 0,), math.nan)]
        flat = torch.cat(parts)
        size = -(-len(flat) // (2 * count)) * 2 * count
        flat = torch.cat([flat, torch.full((size - len(flat),), math.nan)])
        for rank, part in enumerate(flat.chunk(count)):
            partitions[rank].append(part.clone())
    for rank, vectors in enumerate(partitions):
        optimizer = {"zero_stage": 2, "partition_count": count, "single_partition_of_fp32_groups": vectors}
        optimizer |= {"param_alignment_paddings": paddings, "loss_scaler": None}
        name = f"{'bf16_' if paddings else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, folder / name)


def save_three(folder: Path, groups: list[State], state: State, count: int) -> None:
    """Stage 3: each parameter in equal runs, in two flat vectors a rank."""
    folder.mkdir()

    def runs(tensor: torch.Tensor) -> list[torch.Tensor]:
        flat = tensor.flatten()
        part = -(-len(flat) // count)
        return list(torch.cat([flat, torch.full((part * count - len(flat),), math.nan)]).chunk(count))

    trained = {name: tensor for group in groups for name, tensor in group.items()}
    for rank in range(count):
        frozen = {"frozen.w": runs(state["frozen.w"])[rank].clone()}
        head = module_file({"table": state["table"]}, groups, frozen, count)
        head["frozen_param_shapes"] = {"frozen.w": state["frozen.w"].shape}
        torch.save(head, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [runs(tensor)[rank] for tensor in trained.values()]
        vectors = [torch.cat(flat[:3]), torch.cat(flat[3:])]
        optimizer = {"zero_stage": 3, "partition_count": count, "fp32_flat_groups": vectors}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def saved(folder: Path, stage: int, count: int, padded: bool, seed: int) -> State:
    trained = model(seed)
    names = list(trained)
    groups = [{name: trained[name] for name in names[:4]}, {name: trained[name] for name in names[4:]}]
    state = {**trained, "frozen.w": torch.randn(5, 3), "table": torch.arange(6.0)}
    if stage == 3:
        save_three(folder, groups, state, count)
    else:
        save_two(folder, groups, state, count, [[1, 0, 3, 2], [2] * 5] if padded else None)
    return {**state, "table": state["table"].bfloat16()}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("stage", "padded"), [(2, False), (2, True), (3, False)])
def test_partitions_of_deepspeed_are_the_model(stage: int, padded: bool, count: int, tmp_path: Path) -> None:
    for seed in range(4):
        folder = tmp_path / str(seed)
        expected = saved(folder, stage, count, padded, seed)
        with cs.open(folder) as ckpt:
            assert {*ckpt} == {*expected, "head.w"}
            assert all(torch.equal(ckpt[key].load(), tensor) for key, tensor in expected.items())
            assert next(tie.names for tie in ckpt.ties if "head.w" in tie.names) == ("layers.0.w", "head.w")
            assert ckpt.extras["global_steps"] == 7
        fused = cs.plan(folder, cs.Recipe(rest="keep")).state_dict()
        assert all(torch.equal(fused[key], tensor) for key, tensor in expected.items())


def test_what_deepspeed_parts_otherwise_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2, 2, False, 0)
    whole = tmp_path / "a" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    parallel = tmp_path / "a" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    parallel.write_bytes(whole.read_bytes())
    assert codes(tmp_path / "a") == ["sharded-otherwise"]
    parallel.unlink()
    whole.unlink()
    assert codes(tmp_path / "a") == ["bad-chunks"]
    whole.write_bytes(b"")
    assert codes(tmp_path / "a")
    saved(tmp_path / "b", 3, 2, False, 0)
    (tmp_path / "b" / "layer_3_expert_0_mp_rank_00_model_states.pt").write_bytes(b"")
    assert codes(tmp_path / "b") == ["sharded-otherwise"]


def codes(folder: Path) -> list[str]:
    with pytest.raises(cs.CheckpointError) as raised:
        cs.open(folder)
    return [problem.code for problem in raised.value.diagnostics]


def test_runs_are_boxes_that_cover_once() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shape = tuple(draw.randrange(1, 5) for _ in range(draw.randrange(4)))
        cuts = sorted(draw.randrange(math.prod(shape) + 1) for _ in range(3))
        whole = torch.arange(math.prod(shape)).view(shape)
        boxes = []
        for start, stop in zip([0, *cuts], [*cuts, math.prod(shape)]):
            found = list(boxes_of_run(shape, start, stop))
            parts = [whole[tuple(slice(a, a + n) for a, n in zip(box.low, box.extent))].flatten() for box in found]
            assert torch.equal(torch.cat([*parts, torch.empty(0, dtype=torch.int64)]), torch.arange(start, stop))
            boxes += found
        assert covers_once(shape, boxes)


def test_ranks_of_tensor_parallel_files_are_mounts(tmp_path: Path) -> None:
    wq, wo = torch.randn(6, 4), torch.randn(4, 6)
    for rank in range(3):
        state = {
            "wq.weight": wq.chunk(3)[rank].clone(),
            "wo.weight": wo.chunk(3, 1)[rank].clone(),
            "norm": torch.ones(4),
        }
        torch.save(state, tmp_path / f"consolidated.{rank:02}.pth")
    (tmp_path / "params.json").write_text("{}")
    rules = ["rank{r}/wq.weight [o d] -> q [(r o) d]", "rank{r}/wo.weight [o d] -> o [o (r d)]"]
    recipe = cs.Recipe(rules=[*rules, "rank{r}/norm [d] -> norm [r d]"])
    made = cs.plan(tmp_path, recipe).state_dict()
    assert torch.equal(made["q"], wq) and torch.equal(made["o"], wo)
    (tmp_path / "consolidated.01.pth").unlink()
    assert codes(tmp_path) == ["missing-shard"]


def test_stages_and_ranks_of_megatron_are_mounts(tmp_path: Path) -> None:
    weight = torch.randn(2, 2, 6, 4)  # stage, layer, rows
    for stage in range(2):
        for rank in range(2):
            layers = {f"layers.{n}.w": weight[stage, n].chunk(2)[rank].clone() for n in range(2)}
            folder = tmp_path / f"mp_rank_{rank:02}_{stage:03}"
            folder.mkdir()
            torch.save({"model": layers, "iteration": 3, "rng_state": [1]}, folder / "model_optim_rng.pt")
    rule = "stage{s}/rank{r}/layers.{l}.w [o d] -> h.{(s l)}.w [(r o) d]"
    made = cs.plan(tmp_path, cs.Recipe(rules=[rule], dims={"l": 2})).state_dict()
    assert {*made} == {f"h.{n}.w" for n in range(4)}
    assert all(torch.equal(made[f"h.{n}.w"], weight[n // 2, n % 2]) for n in range(4))
    (tmp_path / "mp_rank_00_000_001").mkdir()
    assert codes(tmp_path) == ["sharded-otherwise"]
