"""What is rearranged is gathered in the memory where it stays, and is what plain torch makes of it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs
from ckptsurgery.planning.costing import workers
from ckptsurgery.running.executor.computing import _on_host
from ckptsurgery.running.sinks.new_tensors import TensorSink, fill
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.contents import Entry
from ckptsurgery.storage.sources.files import OpenFiles

Sources = dict[str, Tensor]

WAYS: dict[str, tuple[str, Callable[[Sources], Sources]]] = {
    "transposed": ("{p:q,k,v} [o d] -> m.{p} [d o]", lambda s: {f"m.{p}": s[p].t() for p in "qkv"}),
    "fused": ("{p:q,k,v} [rows:p d] -> m [(p rows:p) d]", lambda s: {"m": torch.cat([s["q"], s["k"], s["v"]])}),
    "fused and transposed": (
        "{p:q,k,v} [rows:p d] -> m [d (p rows:p)]",
        lambda s: {"m": torch.cat([s["q"], s["k"], s["v"]]).t()},
    ),
    "stacked": ("e.{e}.{p} [o d] -> m.{p} [e o d]", lambda s: {f"m.{p}": stacked(s, p) for p in ("gate", "up")}),
    "stacked and transposed": (
        "e.{e}.{p} [o d] -> m.{p} [e d o]",
        lambda s: {f"m.{p}": stacked(s, p).transpose(1, 2) for p in ("gate", "up")},
    ),
    "stacked by turns": (
        "e.{e}.{p:gate,up} [o d] -> m [e (o p) d]",
        lambda s: {"m": torch.stack([stacked(s, "gate"), stacked(s, "up")], 2).flatten(1, 2)},
    ),
    "split": ("fused [a b c] -> m.{a} [c b]", lambda s: {f"m.{a}": part.t() for a, part in enumerate(s["fused"])}),
    "split by turns": (
        "fused [a b c] -> m.{c} [b a]",
        lambda s: {f"m.{c}": s["fused"][..., c].t() for c in range(s["fused"].shape[2])},
    ),
    "turned, and copied": (
        "fused [a b c] -> m [c b a], n [a b c]",
        lambda s: {"m": s["fused"].permute(2, 1, 0), "n": s["fused"]},
    ),
    "cast": ("{p:q,k,v} -> m.{p} | cast(f16)", lambda s: {f"m.{p}": s[p].half() for p in "qkv"}),
    "turned and cast": (
        "{p:q,k,v} [a b] -> m.{p} [b a] | cast(f64)",
        lambda s: {f"m.{p}": s[p].t().double() for p in "qkv"},
    ),
    "empty and turned": ("none [a b] -> m [b a]", lambda s: {"m": s["none"].t()}),
    "empty and cast": ("none -> m | cast(f16)", lambda s: {"m": s["none"].half()}),
}


def stacked(sources: Sources, part: str) -> Tensor:
    return torch.stack([sources[f"e.{e}.{part}"] for e in range(3)])


def tensors() -> Sources:
    torch.manual_seed(0)
    made = {p: torch.randn(rows, 300) for p, rows in (("q", 280), ("k", 70), ("v", 70))}
    made |= {f"e.{e}.{p}": torch.randn(50, 70).bfloat16() for e in range(3) for p in ("gate", "up")}
    made["fused"] = torch.randn(3, 90, 5)
    made["none"] = torch.zeros(0, 4)
    made["q"][0, :2] = torch.tensor([float("nan"), -0.0])
    return made


@pytest.fixture(params=["safetensors", "zip", "strided zip", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """The tensors in a file, as runs of bytes or as views of larger storages, or in memory."""
    match request.param:
        case "safetensors":
            cs.save(tensors(), tmp_path / "source.safetensors")
            return tmp_path / "source.safetensors"
        case "zip":
            torch.save(tensors(), tmp_path / "source.pt")
        case "strided zip":
            torch.save({key: torch.stack([t, t], -1)[..., 0] for key, t in tensors().items()}, tmp_path / "source.pt")
        case "memory":
            return tensors()
    return tmp_path / "source.pt"


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def assert_same(made: Mapping[str, Tensor], expected: Sources) -> None:
    assert set(made) == set(expected)
    for key, tensor in expected.items():
        assert (made[key].shape, made[key].dtype) == (tensor.shape, tensor.dtype), key
        assert made[key].is_contiguous()
        assert bits(made[key]) == bits(tensor), key


def model_of(expected: Sources, device: str = "cpu") -> nn.Module:
    """A module with a parameter for each key, of zeros."""
    model = nn.Module()
    for key, tensor in expected.items():
        *path, leaf = key.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor, device=device).contiguous()))
    return model


@pytest.mark.parametrize("way", list(WAYS))
def test_a_state_dict_is_what_torch_makes(source: object, way: str) -> None:
    rule, by_torch = WAYS[way]
    plan = cs.plan(source, cs.Recipe([rule], rest="drop"))
    with torch.device("meta"):  # a default for new tensors has no say in it
        made = plan.state_dict()
    assert_same(made, by_torch(tensors()))
    assert len({t.untyped_storage().data_ptr() for t in made.values() if t.numel()}) in (0, len(made))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_model_holds_what_torch_makes(source: object, way: str, assign: bool) -> None:
    rule, by_torch = WAYS[way]
    expected = by_torch(tensors())
    model = model_of(expected, "meta" if assign else "cpu")
    before = {key: t.data_ptr() for key, t in model.state_dict().items()}
    report = cs.load_into(model, source, cs.Recipe([rule], rest="drop"), assign=assign)
    assert_same(model.state_dict(), expected)
    assert len(report.loaded) == len(expected)
    if not assign:
        assert {key: t.data_ptr() for key, t in model.state_dict().items()} == before


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cs.save(tensors(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def recipe(way: str) -> cs.Recipe:
    return cs.Recipe([WAYS[way][0]], rest="drop")


@pytest.mark.parametrize("way", list(WAYS))
def test_no_source_becomes_a_tensor_and_each_byte_is_read_once(
    file: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, read_into = [0], OpenFiles.read_into

    def counted(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        count[0] += len(buffer)
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", counted)
    model = model_of(WAYS[way][1](tensors()))
    plan = cs.plan(file, recipe(way), model)
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: pytest.fail(f"{key} became a tensor of its own"))
    plan.load_into(model)
    assert count[0] == sum(plan.source[key].nbytes for key in {key for step in plan.steps for key in step.sources})


def test_autograd_sees_that_gathered_values_changed(file: Path) -> None:
    model = model_of(WAYS["transposed"][1](tensors()))
    before = {key: parameter._version for key, parameter in model.named_parameters()}
    cs.load_into(model, file, recipe("transposed"))
    assert all(parameter._version > before[key] for key, parameter in model.named_parameters())


def test_a_model_may_be_the_source_of_its_own_tensors() -> None:
    model = model_of({"a": torch.zeros(300, 300), "b": torch.zeros(600, 50)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rules = cs.Recipe(["a [x y] -> a [y x]", "b [(p x) y] -> b [(x p) y]"], dims={"p": 2})
    cs.load_into(model, model.state_dict(), rules)
    turned = before["b"].reshape(2, 300, 50).transpose(0, 1).reshape(600, 50)
    assert_same(model.state_dict(), {"a": before["a"].t(), "b": turned})


def test_a_parameter_whose_memory_is_not_the_elements_is_copied_into(file: Path) -> None:
    expected = WAYS["transposed"][1](tensors())
    model = model_of(expected)
    turned = nn.Parameter(torch.zeros_like(tensors()["q"]).t())
    model.get_submodule("m").register_parameter("q", turned)
    report = cs.load_into(model, file, recipe("transposed"))
    assert model.get_parameter("m.q") is turned
    assert turned.stride() == (1, 300)
    assert {key: bits(t) for key, t in model.state_dict().items()} == {key: bits(t) for key, t in expected.items()}
    assert len(report.loaded) == 3


@pytest.fixture
def breaking(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The key whose data cannot be read to its end."""
    with cs.open(file) as checkpoint:
        broken = checkpoint.extent("k")
    assert broken is not None
    read_into = OpenFiles.read_into

    def failing(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        if broken.offset <= offset < broken.offset + broken.nbytes:
            raise cs.CheckpointError(cs.Diagnostic("read-failed", "the disk gave up"))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", failing)
    yield "k"


def test_a_failure_tells_new_old_and_mixed_tensors(file: Path, breaking: str) -> None:
    expected = WAYS["transposed"][1](tensors())
    model = model_of(expected)
    with pytest.raises(cs.LoadError, match="the disk gave up") as told:
        cs.load_into(model, file, recipe("transposed"))
    written, untouched = set(told.value.written), set(told.value.untouched)
    assert not written & untouched
    assert {*written, *untouched, f"m.{breaking}"} == set(expected)
    assert f"a mix of both (m.{breaking})" in str(told.value)
    for key, tensor in model.state_dict().items():
        if key in written:
            assert bits(tensor) == bits(expected[key])
        if key in untouched:
            assert not tensor.any()


def test_what_is_assigned_is_whole_or_not_there(file: Path, breaking: str) -> None:
    expected = WAYS["transposed"][1](tensors())
    model = model_of(expected)
    before = dict(model.named_parameters())
    with pytest.raises(cs.LoadError, match="the disk gave up") as told:
        cs.load_into(model, file, recipe("transposed"), assign=True)
    assert {*told.value.written, *told.value.untouched} == set(expected)
    assert f"m.{breaking}" in told.value.untouched
    for key in told.value.untouched:
        assert model.get_parameter(key) is before[key]
    for key in told.value.written:
        assert bits(model.get_parameter(key)) == bits(expected[key])


def test_no_more_tensors_are_begun_than_tasks_run(tmp_path: Path) -> None:
    cs.save({f"w.{i}": torch.randn(600, 1000) for i in range(12)}, tmp_path / "source.safetensors")
    now, most = set[str](), [0]

    class Counting(TensorSink):
        def _tensor(self, key: str) -> Tensor:
            now.add(key)
            most[0] = max(most[0], len(now))
            return super()._tensor(key)

        def _whole(self, key: str, tensor: Tensor) -> None:
            now.remove(key)

    plan = cs.plan(tmp_path / "source.safetensors", "w.{i} [a b] -> w.{i} [b a]")
    fill(Counting(plan.steps, ()), plan.steps, plan.checkpoint, lambda nbytes: None)
    assert not now
    assert 0 < most[0] <= workers()


def test_a_value_that_does_not_fit_is_told_of_its_tensor(tmp_path: Path) -> None:
    cs.save({"a": torch.ones(3), "b": torch.tensor([1.0, 1e6, 1e7])}, tmp_path / "source.safetensors")
    with pytest.raises(cs.CheckpointError, match="2 of 3 values") as told:
        cs.plan(tmp_path / "source.safetensors", "{k} -> {k} | cast(f16)").state_dict()
    assert told.value.diagnostics[0].place == "b"


def test_what_lies_on_another_device_is_not_gathered_on_the_host() -> None:
    spec = cs.TensorSpec([3], "F32")
    assert _on_host(Entry(spec, tensor=torch.ones(3)))
    assert _on_host(Entry(spec, tensor=lambda: torch.ones(3)))
    assert _on_host(Entry(spec, "file"))
    assert not _on_host(Entry(spec, tensor=torch.ones(3, device="meta")))


def test_two_parameters_may_change_places_within_one_model() -> None:
    model = model_of({"a": torch.zeros(300, 300), "b": torch.zeros(300, 300), "c": torch.zeros(2), "d": torch.zeros(2)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cs.load_into(model, model.state_dict(), ["a -> b", "b -> a", "c -> d", "d -> c"])
    assert_same(model.state_dict(), {"a": before["b"], "b": before["a"], "c": before["d"], "d": before["c"]})


@pytest.mark.parametrize("assign", [False, True])
def test_one_source_for_two_parameters_makes_two_tensors(tmp_path: Path, assign: bool) -> None:
    for value in (torch.randn(600, 600), torch.randn(3)):
        cs.save({"w": value}, tmp_path / "one.safetensors", overwrite=True)
        for source in (tmp_path / "one.safetensors", {"w": value}):
            model = model_of({"a": torch.zeros_like(value), "b": torch.zeros_like(value)}, "meta" if assign else "cpu")
            cs.load_into(model, source, ["w -> a, b"], assign=assign)
            assert_same(model.state_dict(), {"a": value, "b": value})
            memories = {p.untyped_storage().data_ptr() for p in model.parameters()}
            assert len(memories | {value.untyped_storage().data_ptr()}) == 3
