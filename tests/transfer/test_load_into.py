"""`load_into` on the cases that people report: each test is one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs


class Net(nn.Module):
    """A backbone with a head, a norm with counters, and a name that contains another one."""

    def __init__(self, classes: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, classes)


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def codes(error: pytest.ExceptionInfo[cs.CkptSurgeryError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


PREFIXES = ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "backbone.", "encoder_q.", "module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_on_the_source_is_taken_off(prefix: str) -> None:
    source = filled(Net()).state_dict()
    model = Net()
    report = cs.load_into(model, {prefix + k: v for k, v in source.items()})
    assert same(model.state_dict(), source)
    assert any(prefix in note for note in report.notes) and report.coverage == 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_on_the_model_is_put_on(prefix: str) -> None:
    model: nn.Module = Net()
    for name in reversed(prefix.rstrip(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    source = filled(Net()).state_dict()
    cs.load_into(model, source)
    assert same({k.removeprefix(prefix): v for k, v in model.state_dict().items()}, source)


def test_one_prefix_is_replaced_by_another() -> None:
    source = filled(Net()).state_dict()
    model = nn.ModuleDict({"encoder": Net()})
    report = cs.load_into(model, {f"module.backbone.{k}": v for k, v in source.items()})
    assert same({k.removeprefix("encoder."): v for k, v in model.state_dict().items()}, source)
    assert report.notes[0] == "prefix 'module.backbone.' read as 'encoder.'"


def test_no_key_is_edited_in_its_middle() -> None:
    inner = nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
    model = nn.ModuleDict({"a": inner})
    source = {k: torch.full_like(v, n + 1) for n, (k, v) in enumerate(model.state_dict().items())}
    cs.load_into(model, {"module." + k: v for k, v in source.items()})
    assert same(model.state_dict(), source)


def test_a_compiled_submodule_is_read_where_the_model_shows_it() -> None:
    source = filled(Net()).state_dict()
    renamed = {k.replace("body.", "body._orig_mod."): v for k, v in source.items()}
    model = Net()
    cs.load_into(model, renamed)
    assert same(model.state_dict(), source)


def test_a_head_outside_of_the_prefix_stays_where_it_is() -> None:
    source = filled(Net()).state_dict()
    renamed = {(k if k.startswith("head") else "module." + k): v for k, v in source.items()}
    model = Net()
    cs.load_into(model, renamed)
    assert same(model.state_dict(), source)


def test_nothing_fits_is_an_error_with_samples_of_both_sides_whatever_the_flags() -> None:
    source = {"gru.weight_ih": torch.ones(7, 5), "gru.bias_hh": torch.ones(7)}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(Net(), source, partial=True)
    assert codes(error) == {"nothing-fits"}
    assert "gru.weight_ih" in str(error.value) and "stem.weight" in str(error.value)
    with pytest.raises(cs.LoadError):
        cs.load_into(Net(), source, partial=True, mismatch="keep", init="head")


def test_another_number_of_classes_names_all_heads_and_changes_nothing() -> None:
    class TwoHeads(Net):
        def __init__(self, classes: int) -> None:
            super().__init__(classes)
            self.aux = nn.Linear(4, classes)

    model, before = TwoHeads(5), {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, filled(TwoHeads(3)).state_dict())
    text = str(error.value)
    assert codes(error) == {"shape-mismatch"} and '"head"' in text and '"aux"' in text and "init=[" in text
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("way", ["init", "keep"])
def test_mismatch_settles_every_head(way: str) -> None:
    source = filled(Net(5)).state_dict()
    model = Net(3)
    head = model.head.weight.clone()
    report = cs.load_into(model, source, mismatch=way)
    assert torch.equal(model.body[0].weight, source["body.0.weight"])
    assert set(report.initialised if way == "init" else report.kept) == {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, head) is (way == "keep")
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert f"mismatch='{way}': [5] against [3]" in str(report)


def test_init_is_seeded_by_key_and_leaves_the_global_generator() -> None:
    source = filled(Net()).state_dict()
    a, b = Net(), Net()
    state = torch.get_rng_state()
    cs.load_into(a, source, init="head", seed=3)
    cs.load_into(b, source, init={"head.weight": "default", "head.bias": "default"}, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, source["head.weight"])


def test_another_number_of_input_channels_suggests_the_op() -> None:
    with pytest.raises(cs.LoadError, match=r"adapt_input_conv\(1\)"):
        cs.load_into(Net(channels=1), filled(Net()).state_dict())


def test_a_positional_embedding_of_another_size_suggests_the_op() -> None:
    class Positions(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, n, 8))
            self.fc = nn.Linear(8, 2)

    with pytest.raises(cs.LoadError, match="resize_pos_embed"):
        cs.load_into(Positions(17), Positions(10).state_dict())
    model = Positions(16)
    source = filled(Positions(4)).state_dict()
    recipe = cs.Recipe(["pos_embed -> pos_embed | resize_pos_embed(grid=[4, 4])"], rest="keep")
    assert cs.load_into(model, source, recipe).coverage == 1


def test_student_and_teacher_side_by_side_are_an_error_that_lists_them() -> None:
    parts = {"student": filled(Net()), "teacher": filled(Net(), 2)}
    flat = {f"{name}.{k}": v for name, net in parts.items() for k, v in net.state_dict().items()}
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(Net(), flat)
    assert "student" in str(error.value) and "teacher" in str(error.value) and "subtree=" in str(error.value)
    model = Net()
    cs.load_into(model, flat, subtree="teacher")
    assert same(model.state_dict(), parts["teacher"].state_dict())


def test_ema_beside_the_model_is_an_error_that_lists_them(tmp_path: object) -> None:
    path = f"{tmp_path}/ckpt.pt"
    torch.save({"model": filled(Net()).state_dict(), "ema": filled(Net(), 2).state_dict(), "epoch": 3}, path)
    with pytest.raises(cs.CheckpointError) as error:
        cs.load_into(Net(), path)
    assert 'subtree="ema"' in str(error.value) and 'subtree="model"' in str(error.value)
    model = Net()
    cs.load_into(model, path, subtree="ema")
    assert same(model.state_dict(), filled(Net(), 2).state_dict())


class Gated(nn.Module):
    def __init__(self, modern: bool) -> None:
        super().__init__()
        wrap = nn.utils.parametrizations.weight_norm if modern else nn.utils.weight_norm
        self.conv = wrap(nn.Conv1d(2, 3, 3))
        self.weight_gate = nn.Parameter(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("modern", [True, False])
def test_weight_norm_is_read_in_either_spelling_without_touching_a_gate(modern: bool) -> None:
    source, model = filled(Gated(not modern)), Gated(modern)
    report = cs.load_into(model, source.state_dict())
    x = torch.randn(1, 2, 5)
    assert torch.allclose(model.conv(x), source.conv(x), atol=1e-6)
    assert torch.equal(model.weight_gate, source.weight_gate) and report.coverage == 1


def test_gamma_and_beta_are_read_where_the_model_has_weight_and_bias() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    source = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    renamed = dict(source)
    renamed["0.gamma"], renamed["0.beta"] = renamed.pop("0.weight"), renamed.pop("0.bias")
    cs.load_into(model, renamed)
    assert same(model.state_dict(), source)


def test_nothing_is_copied_into_a_meta_model() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(cs.LoadError, match="assign=True"):
        cs.load_into(model, filled(Net()).state_dict(), assign=False)


def test_non_persistent_buffers_of_a_meta_model_are_computed_or_refused_by_name() -> None:
    class Rotary(nn.Module):
        def __init__(self, known: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("freqs", torch.arange(4.0), persistent=False)
            if known:
                self.init_non_persistent_buffers = lambda: setattr(self, "freqs", torch.arange(4.0))

    source = filled(nn.ModuleDict({"fc": nn.Linear(2, 2)})).state_dict()
    with torch.device("meta"):
        good, bad = Rotary(True), Rotary(False)
    cs.load_into(good, source, assign=True)
    assert torch.equal(good.freqs, torch.arange(4.0))
    with pytest.raises(cs.LoadError, match="freqs"):
        cs.load_into(bad, source, assign=True)
    assert all(tensor.is_meta for tensor in (*bad.parameters(), *bad.buffers()))  # before anything is loaded
    real = cs.skeleton(lambda: Rotary(False))
    cs.load_into(real, source, assign=True)
    assert torch.equal(real.freqs, torch.arange(4.0))


def test_batch_norm_statistics_are_loaded_and_an_old_file_may_lack_the_counter() -> None:
    source = filled(Net())
    source.norm.num_batches_tracked.fill_(7)
    model = Net()
    cs.load_into(model, source.state_dict())
    assert model.norm.num_batches_tracked == 7 and torch.equal(model.norm.running_var, source.norm.running_var)
    old = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    report = cs.load_into(Net(), old)
    assert report.kept == ("norm.num_batches_tracked",)


def test_a_missing_counter_is_an_error_where_the_file_is_of_a_version_that_has_it(tmp_path: object) -> None:
    state = filled(Net()).state_dict()
    del state["norm.num_batches_tracked"]
    torch.save(state, f"{tmp_path}/new.pt")
    with pytest.raises(cs.LoadError, match="num_batches_tracked"):
        cs.load_into(Net(), f"{tmp_path}/new.pt")


def test_nan_is_found_when_asked_for() -> None:
    source = filled(Net()).state_dict()
    source["head.bias"][1] = float("nan")
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.LoadError, match=r"head\.bias"):
        cs.load_into(model, source, check_values=True)
    assert same(model.state_dict(), before)
    assert cs.load_into(model, source).coverage == 1


@pytest.mark.parametrize(
    ("dtype", "fits"), [(torch.bfloat16, True), (torch.float16, True), (torch.float64, False), (torch.int64, False)]
)
def test_only_lossless_dtypes_meet_a_float_parameter_unasked(dtype: torch.dtype, fits: bool) -> None:
    source = {"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.zeros(2)}
    model = nn.Linear(2, 2)
    if not fits:
        with pytest.raises(cs.CkptSurgeryError) as error:
            cs.load_into(model, source)
        assert codes(error) == {"dtype-mismatch"} and 'dtype="model"' in str(error.value)
    report = cs.load_into(model, source, dtype="lossless" if fits else "model")
    assert report.cast == ("weight",) and torch.equal(model.weight, torch.ones(2, 2))
    with pytest.raises(cs.CkptSurgeryError):
        cs.load_into(model, source, dtype="error")


def test_dtype_source_keeps_the_dtype_of_the_source_by_assignment() -> None:
    model = nn.Linear(2, 2)
    cs.load_into(model, {k: v.bfloat16() for k, v in nn.Linear(2, 2).state_dict().items()}, dtype="source", assign=True)
    assert model.weight.dtype == torch.bfloat16


def test_two_partial_sources_one_after_the_other() -> None:
    whole = filled(Net()).state_dict()
    body = {k: v for k, v in whole.items() if not k.startswith("head")}
    head = {k: v for k, v in whole.items() if k.startswith("head")}
    model = Net()
    assert cs.load_into(model, body, keep="head").kept == ("head.weight", "head.bias")
    cs.load_into(model, head, keep=["stem", "norm", "body"])
    assert same(model.state_dict(), whole)


def test_keep_and_init_set_aside_what_the_source_holds_and_say_so() -> None:
    source = filled(Net()).state_dict()
    model = Net()
    stem = model.stem.weight.clone()
    report = cs.load_into(model, source, keep="stem", init="head")
    assert torch.equal(model.stem.weight, stem)
    assert set(report.dropped) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    assert set(report.kept) == {"stem.weight", "stem.bias"} and set(report.initialised) == {"head.weight", "head.bias"}


def test_drop_names_a_subtree_of_the_source() -> None:
    source = filled(Net()).state_dict() | {"decoder.w": torch.ones(2), "decoder.b": torch.ones(1)}
    with pytest.raises(cs.LoadError, match=r'drop=\["decoder"\]'):
        cs.load_into(Net(), source)
    report = cs.load_into(Net(), {"module." + k: v for k, v in source.items()}, drop="decoder")
    assert report.dropped == ("module.decoder.w", "module.decoder.b")
    cs.load_into(Net(), {"module." + k: v for k, v in source.items()}, drop="module.decoder")


def test_partial_loads_what_fits_and_says_what_did_not() -> None:
    source = filled(Net()).state_dict()
    del source["head.bias"]
    source["extra"] = torch.ones(1)
    report = cs.load_into(Net(), source, partial=True)
    assert report.missing_keys == ("head.bias",) and report.unexpected_keys == ("extra",)


def test_partial_leaves_what_has_another_shape_and_says_so() -> None:
    source = filled(Net(5)).state_dict()
    model = Net(3)
    head = model.head.weight.clone()
    report = cs.load_into(model, source, partial=True)
    assert report.missing_keys == report.unexpected_keys == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, head) and torch.equal(model.body[0].weight, source["body.0.weight"])
    assert "[5, 4] here, [3, 4] in the model" in str(report)


@pytest.mark.parametrize("argument", ["init", "keep", "drop"])
def test_a_misspelt_module_is_an_error_with_a_suggestion(argument: str) -> None:
    with pytest.raises(cs.LoadError, match="did you mean 'head'"):
        cs.load_into(Net(), filled(Net()).state_dict(), **{argument: "haed"})


def test_a_parameter_of_one_element_is_no_scalar() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(cs.LoadError, match=r"source \[1\], model \[\]"):
        cs.load_into(Scale(), {"scale": torch.ones(1)})


def test_hooks_of_a_module_are_honoured() -> None:
    class Renaming(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").T
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model = nn.ModuleDict({"fc": Renaming(2, 3), "out": nn.Linear(3, 1)})
    kernel = torch.randn(2, 3)
    source = {"fc.kernel": kernel, "fc.bias": torch.zeros(3), "out.weight": torch.ones(1, 3), "out.bias": torch.ones(1)}
    report = cs.load_into(model, source)
    assert torch.equal(model["fc"].weight, kernel.T) and report.coverage == 1
    del source["fc.bias"]
    before = model["fc"].weight.clone()
    with pytest.raises(cs.LoadError, match=r"fc\.bias"):
        cs.load_into(model, {**source, "fc.kernel": kernel + 1})
    assert torch.equal(model["fc"].weight, before)


def test_extra_state_is_set() -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> object:
            return {"count": self.count}

        def set_extra_state(self, state: object) -> None:
            self.count = state["count"]  # type: ignore[index]

    source, model = Counting(2, 2), Counting(2, 2)
    source.count = 5
    cs.load_into(model, source.state_dict())
    assert model.count == 5


def test_sources_are_not_changed_and_share_nothing_with_the_model() -> None:
    source = filled(Net()).state_dict()
    before = {k: v.clone() for k, v in source.items()}
    model = Net()
    cs.load_into(model, source, assign=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(source, before)


def test_a_truncated_read_tells_what_was_written_and_what_not(tmp_path: object) -> None:
    path = f"{tmp_path}/a.safetensors"
    cs.plan(filled(Net()).state_dict(), cs.Recipe(rest="keep")).save(path)
    with cs.open(path) as checkpoint:
        with Path(path).open("r+b") as file:
            file.truncate(200)
        with pytest.raises(cs.CkptSurgeryError) as error:
            cs.load_into(Net(), checkpoint)
    assert isinstance(error.value, cs.LoadError) and set(error.value.untouched) | set(error.value.written)
