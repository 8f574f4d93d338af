"""`load_into` of models in other wrappers of torch: DDP, compiled, FSDP1, on the CPU beside the mesh, in stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group
from safetensors.torch import save_file
from test_sharded_loading import RECIPE, Block, Net, fsdp, source, whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import ckptsurgery as cs


def compiled_blocks(model: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return fsdp(model)


def compiled_in_place(model: Any) -> nn.Module:
    for block in model.blocks:
        block.compile()
    return fsdp(model)


def offload(model: Any) -> nn.Module:
    policy = CPUOffloadPolicy(pin_memory=False)
    for block in model.blocks:
        fully_shard(block, offload_policy=policy)
    return fully_shard(model, offload_policy=policy)


def flat(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def flat_blocks(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


WAYS: dict[str, Callable[[Any], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(fsdp(model)),
    "compiled blocks": compiled_blocks,
    "compiled in place": compiled_in_place,
    "offload": offload,
    "flat": flat,
    "flat blocks": flat_blocks,
}


def bare(name: str) -> str:
    for part in ("module.", "_orig_mod.", "_fsdp_wrapped_module."):
        name = name.replace(part, "")
    return name


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole tensors, by the names of the bare model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {bare(name): tensor.clone() for name, tensor in whole(model).items()}
    return {bare(name): tensor for name, tensor in whole(model).items()}


def load(way: str, path: str, arguments: dict[str, Any]) -> Any:
    """Values and ledger of a plain model, and of one in a wrapper whose ranks were built otherwise."""
    torch.manual_seed(0)
    plain = Net()
    expected = cs.load_into(plain, path, RECIPE, **arguments)
    torch.manual_seed(0)
    model = WAYS[way](Net())
    report = cs.load_into(model, path, RECIPE, **arguments)
    wanted, found = whole(plain), values(model)
    wrong = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    told = [[(bare(e.key), e.action, str(e.spec)) for e in one.ledger] for one in (report, expected)]
    return wrong, {*found} ^ {*wanted}, told[0] == told[1], report.bytes_written == expected.bytes_written


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(source(), path)
    return str(path)


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_model_is_filled_as_a_plain_one_is(way: str, two: Group, path: str) -> None:
    assert two(load, way, path, {}) == [([], set(), True, True)] * 2


@pytest.mark.parametrize("way", ["offload", "flat blocks"])
def test_first_values_and_what_is_kept_are_those_of_a_plain_model(way: str, two: Group, path: str) -> None:
    arguments = {"init": {"norm.weight": "normal(std=0.5)"}, "keep": "blocks.1.out", "seed": 3}
    assert two(load, way, path, arguments) == [([], set(), True, True)] * 2


def load_gathered(path: str) -> list[str]:
    """The caller has gathered the parameters of FSDP1 already."""
    plain, model = Net(), flat(Net())
    cs.load_into(plain, path, RECIPE)
    with FullyShardedDataParallel.summon_full_params(model):
        cs.load_into(model, path, RECIPE)
    found = values(model)
    return [name for name, tensor in whole(plain).items() if not torch.equal(found[name], tensor)]


def test_parameters_that_the_caller_gathered_are_filled(two: Group, path: str) -> None:
    assert two(load_gathered, path) == [[], []]


def empty(way: str, path: str) -> Any:
    with torch.device("meta"):
        model = WAYS[way](Net()) if way in WAYS else fsdp(Net())
    try:
        cs.load_into(model, path, RECIPE)
    except cs.LoadError as error:
        left = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
        return [d.code for d in error.diagnostics], left
    return None


class Rotary(nn.Module):
    """A buffer that no file holds, and that its module can compute again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.proj = nn.Linear(4, 5)

    def reset_buffers(self) -> None:
        self.angles = torch.arange(4.0, device=self.angles.device)


def empty_rotary() -> Any:
    """Load into a model on the meta device, train one step, and return what it has computed."""
    with torch.device("meta"):
        model: Any = fully_shard(nn.Sequential(Rotary()), offload_policy=CPUOffloadPolicy(pin_memory=False))
    cs.load_into(model, {"0.proj.weight": torch.ones(5, 4), "0.proj.bias": torch.ones(5)})
    angles = model[0].angles.tolist()
    model[0].forward = lambda x: model[0].proj(x)
    model(torch.ones(2, 4)).sum().backward()
    return angles, model[0].proj.weight.grad.full_tensor().sum().item()


def test_buffers_of_no_file_are_computed_or_named_before_anything_is_loaded(two: Group, path: str) -> None:
    assert two(empty, "fsdp", path) == [(["meta-buffers"], [])] * 2
    assert two(empty_rotary) == [([0.0, 1.0, 2.0, 3.0], 40.0)] * 2


STAGES = RECIPE.replace(rules=["tok.weight -> embed.weight, head.weight", *map(str, RECIPE.rules[1:])])


def stage_of(model: Any, number: int) -> Any:
    """A stage: the ends hold the embedding, or the norm and the head; each holds one block, under its own number."""
    model.blocks[1 - number] = nn.Identity()
    if number:
        model.embed = None
    else:
        model.norm = model.head = None
    return model


def in_stages(path: str, sharded: bool, arguments: dict[str, Any]) -> Any:
    """What is wrong on this rank, what it holds, and the ledger of all."""
    torch.manual_seed(0)
    plain = Net()
    plain.head.weight = nn.Parameter(plain.head.weight.detach().clone())
    expected = cs.load_into(plain, path, STAGES, **arguments)
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = stage_of(Net(), rank // (size // 2))
    if sharded:
        meshes = [dist.device_mesh.DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
        fully_shard(model, mesh=meshes[rank // 2])
    report = cs.load_into(model, path, STAGES, partial="stages", **arguments)
    wanted, found = whole(plain), whole(model)
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]
    ledger = sorted((e.key, e.action, str(e.spec)) for e in report.ledger)
    same = ledger == sorted((e.key, e.action, str(e.spec)) for e in expected.ledger)
    return wrong, same, len(found), report.to_json()


@pytest.mark.parametrize("arguments", [{}, {"init": ["blocks.1.out", "embed"], "seed": 7, "keep": "norm"}])
def test_stages_of_a_pipeline_load_their_parts(two: Group, path: str, arguments: dict[str, Any]) -> None:
    (first, *_, told), (second, *_, other) = answers = two(in_stages, path, False, arguments)
    assert first == second == []
    assert all(same for _, same, *_ in answers)
    assert told == other


def test_stages_that_are_sharded_load_their_parts(four: Group, path: str) -> None:
    answers = four(in_stages, path, True, {})
    assert all(wrong == [] and same for wrong, same, *_ in answers)
    assert [count for _, _, count, _ in answers] == [6, 6, 8, 8]
    assert len({str(told) for *_, told in answers}) == 1


def refuse_stages(path: str, recipe: cs.Recipe, mistake: str) -> list[str]:
    model = stage_of(Net(), dist.get_rank())
    if mistake == "gap":
        model.blocks[dist.get_rank()] = nn.Identity()
    if mistake == "shapes":
        model.blocks.extra = nn.Linear(2 + dist.get_rank(), 3)
    before = {name: tensor.clone() for name, tensor in whole(model).items()}
    try:
        cs.load_into(model, path, recipe, partial="stages")
    except cs.CkptSurgeryError as error:
        assert all(torch.equal(before[name], tensor) for name, tensor in whole(model).items())
        return [d.code for d in error.diagnostics]
    return []


def test_what_no_stage_holds_is_an_error_on_all_ranks(two: Group, path: str) -> None:
    """Keys that no rank claims, keys that the source lacks, stages of two models."""
    assert two(refuse_stages, path, STAGES, "gap") == [["unexpected-targets"]] * 2
    assert two(refuse_stages, path, RECIPE, "none") == [["missing-keys"]] * 2
    assert two(refuse_stages, path, STAGES, "shapes") == [["stages-differ"]] * 2


def test_stages_want_a_process_group(path: str) -> None:
    with pytest.raises(cs.LoadError, match="no-process-group"):
        cs.load_into(Net(), path, RECIPE, partial="stages")
    with pytest.raises(cs.LoadError, match="bad-argument"):
        cs.load_into(Net(), path, RECIPE, partial="stage")


def save_stages(path: str, out: str, sharded: bool, arguments: dict[str, Any]) -> Any:
    """Load stages, save them together, and return the values of the whole model."""
    torch.manual_seed(0)
    plain = Net()
    plain.head.weight = nn.Parameter(plain.head.weight.detach().clone())
    cs.load_into(plain, path, STAGES)
    size, rank = dist.get_world_size(), dist.get_rank()
    model = stage_of(Net(), rank // (size // 2))
    if sharded:
        meshes = [dist.device_mesh.DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
        fully_shard(model, mesh=meshes[rank // 2])
    cs.load_into(model, path, STAGES, partial="stages")
    report = cs.save(model, out, together=True, **arguments)
    return {name: tensor for name, tensor in whole(plain).items() if name in plain.state_dict()}, report.to_json()


@pytest.mark.parametrize("format", [None, "dcp"])
@pytest.mark.parametrize("sharded", [False, True])
def test_stages_are_saved_as_one_checkpoint(
    sharded: bool, format: str | None, two: Group, four: Group, path: str, tmp_path: Any
) -> None:
    group, out = four if sharded else two, tmp_path / ("out" if format else "out.safetensors")
    answers = group(save_stages, path, str(out), sharded, {"format": format} if format else {})
    assert len({str(told) for _, told in answers}) == 1
    wanted, saved = answers[0][0], cs.open(out).state_dict()
    assert {*saved} == {*wanted}
    assert all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())


def save_alike(out: str, mistake: str) -> list[str]:
    """Stages that number their layers each from 0, or that have another shape."""
    rank = dist.get_rank()
    model = nn.Linear(3, 2 + rank) if mistake == "shapes" else nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(rank if mistake == "values" else 1)
        model.bias.zero_()
    try:
        cs.save(model, out, together=True)
    except cs.CheckpointError as error:
        return [str(error.diagnostics[0])]
    return []


def test_one_key_with_two_meanings_is_refused(two: Group, tmp_path: Any) -> None:
    for mistake in ("values", "shapes"):
        first, second = two(save_alike, str(tmp_path / "out.safetensors"), mistake)
        assert first == second
        assert "stages-differ" in first[0]
    assert two(save_alike, str(tmp_path / "out.safetensors"), "none") == [[], []]
    assert {*cs.open(tmp_path / "out.safetensors")} == {"weight", "bias"}


class OwnNorm(nn.LayerNorm):
    """A module that loads in its own way."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "scale")
        super()._load_from_state_dict(state, prefix, *rest)


def load_own_stage(hooked: bool) -> list[str]:
    stage = nn.Module()
    stage.add_module("a", nn.Linear(2, 2)) if dist.get_rank() == 0 else stage.add_module("b", OwnNorm(3))
    if hooked and dist.get_rank():
        stage.b = nn.LayerNorm(3)
        stage.b._register_load_state_dict_pre_hook(lambda state, *rest: None)
    source = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.scale": torch.ones(3), "b.bias": torch.ones(3)}
    try:
        cs.load_into(stage, source, partial="stages")
    except cs.LoadError as error:
        return [d.code for d in error.diagnostics]
    return []


@pytest.mark.parametrize("hooked", [False, True])
def test_stages_with_loading_of_their_own_are_refused_by_name(hooked: bool, two: Group) -> None:
    assert two(load_own_stage, hooked) == [["stages-load-alone"]] * 2
