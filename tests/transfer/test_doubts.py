"""What fits in name and shape and must not be loaded as it is; and that the remedy, pasted, gives the right values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


class Crossed(nn.Module):
    """A layer that keeps its weight as [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Straight(Crossed):
    """A layer of our own that keeps its weight as [out, in], as `nn.Linear` does."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def blocks(layer: Any, widths: tuple[int, ...] = (4, 12)) -> nn.Module:
    def block() -> nn.Module:
        return nn.ModuleDict({f"to{w}": layer(4, w) for w in widths} | {"norm": nn.LayerNorm(4)})

    torch.manual_seed(0)
    return nn.ModuleDict({"h": nn.ModuleList([block() for _ in range(3)])})


def pasted(help: str | None) -> dict[str, Any]:
    """The arguments that a help names."""
    assert help is not None
    found = re.match(r"(\w+)=(cs\.Recipe\(.*?, rest=\"keep\"\))", help)
    assert found, help
    return {found[1]: eval(found[2], {"cs": cs})}


def problem(model: nn.Module, source: Any, code: str, **options: Any) -> cs.Diagnostic:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, source, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (found,) = [d for d in error.value.diagnostics if d.code == code]
    return found


def turned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.T if v.ndim == 2 else v for k, v in state.items()}


def equal(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_squares_whose_neighbours_are_transposed(live: bool, prefix: str) -> None:
    source, model = blocks(Crossed), blocks(nn.Linear)
    offered = {prefix + k: v for k, v in source.state_dict().items()} if not live else source
    if live and prefix:
        offered = nn.DataParallel(source)
    found = problem(model, offered, "transposed-square")
    report = cs.load_into(model, offered, partial=True)
    squares = tuple(f"h.{i}.to4.weight" for i in range(3))
    assert set(squares) <= {*report.missing_keys} and all(
        "transposed" in e.by for e in report.ledger if e.key in squares
    )
    cs.load_into(model, offered, **pasted(found.help))
    assert equal(model, turned(source.state_dict()))


@pytest.mark.parametrize("way", ["init", "keep"])
def test_whatever_settles_the_mismatch_settles_no_square(way: str) -> None:
    problem(blocks(nn.Linear), blocks(Crossed).state_dict(), "transposed-square", mismatch=way)
    model = blocks(nn.Linear)
    report = cs.load_into(
        model, blocks(Crossed).state_dict(), mismatch=way, keep=[f"h.{i}.to4.weight" for i in range(3)]
    )
    assert "h.0.to4.bias" in report.loaded


def test_squares_alone_are_shown_by_a_live_module_only() -> None:
    source, model = blocks(Crossed, (4,)), blocks(nn.Linear, (4,))
    found = problem(model, source, "transposed-square")
    assert "Crossed computes x @ W, and Linear x @ W.T" in str(found)
    state = torch.get_rng_state()
    cs.load_into(model, source, **pasted(found.help))
    assert equal(model, turned(source.state_dict())) and torch.equal(state, torch.get_rng_state())
    cs.load_into(model, source.state_dict())
    assert equal(model, source.state_dict())


def test_the_other_direction_is_seen_too() -> None:
    source, model = blocks(nn.Linear, (4,)), blocks(Crossed, (4,))
    cs.load_into(model, source.state_dict())
    with pytest.raises(cs.LoadError, match="Linear computes"):
        cs.load_into(model, source)


@pytest.mark.parametrize("layer", [Straight, nn.Linear, Crossed])
def test_what_is_laid_out_alike_loads_as_it_is(layer: Any) -> None:
    source = blocks(layer)
    model = blocks(nn.Linear if layer is Straight else layer)
    if layer is Straight:
        source = blocks(layer, (4,))
        model = blocks(nn.Linear, (4,))
    cs.load_into(model, source)
    assert equal(model, source.state_dict())


def test_neighbours_that_fit_as_they_are_are_evidence_against_it() -> None:
    class Two(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.square, self.wide, self.head = nn.Linear(4, 4), nn.Linear(4, 8), head

    source, model = Two(nn.Linear(3, 4)), Two(nn.Linear(4, 3))
    report = cs.load_into(model, source.state_dict(), mismatch="init")
    assert "square.weight" in report.loaded


SCALES = {
    "weight_scale_inv": lambda w: torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) + 0.5,
    "weight_scale": lambda w: torch.rand(w.shape[0], 1) + 0.5,
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("suffix", list(SCALES))
def test_scaled_fp8_is_loaded_by_the_rule_that_the_error_offers(suffix: str, prefix: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(130, 256, bias=False) for _ in range(2)])})
    model["head"] = nn.Linear(4, 4)  # is not quantised
    source = {prefix + k: v for k, v in nn.ModuleDict({"head": nn.Linear(4, 4)}).state_dict().items()}
    wanted = {k.removeprefix(prefix): v for k, v in source.items()}
    for i in range(2):
        codes = torch.randn(256, 130).to(torch.float8_e4m3fn)
        scale = SCALES[suffix](codes)
        source[f"{prefix}layers.{i}.weight"] = codes
        source[f"{prefix}layers.{i}.{suffix}"] = scale
        rows, columns = (-(-n // s) for n, s in zip(codes.shape, scale.shape))
        rows, columns = (128, 128) if suffix == "weight_scale_inv" else (rows, columns)
        whole = scale.repeat_interleave(rows, 0)[:256].repeat_interleave(columns, 1)[:, :130]
        wanted[f"layers.{i}.weight"] = (codes.float() * whole).bfloat16().float()
    found = problem(model, source, "unscaled-codes")
    report = cs.load_into(model, source, partial=True)
    assert report.missing_keys == ("layers.0.weight", "layers.1.weight") and "unscaled" in str(report)
    problem(model, source, "unscaled-codes", dtype="model")  # a cast would lose the scale
    cs.load_into(model, source, **pasted(found.help))
    assert equal(model, wanted)


INT8 = ["weight.SCB", "SCB", "weight_scale", "weight.absmax", "scales"]


@pytest.mark.parametrize("scale", INT8)
@pytest.mark.parametrize("dtype", ["lossless", "error", "model"])
def test_scaled_integers_are_no_weights(scale: str, dtype: str) -> None:
    source = {
        "fc.weight": torch.ones(4, 4, dtype=torch.int8), f"fc.{scale}": torch.ones(4),
        "fc.bias": torch.ones(4),
    }  # fmt: skip
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    found = problem(model, source, "unscaled-codes", dtype=dtype)
    assert f"'fc.{scale}'" in str(found) and found.help is not None and 'keep=["fc.weight"]' in found.help
    report = cs.load_into(model, source, dtype=dtype, partial=True)
    assert report.loaded == ("fc.bias",) and report.missing_keys == ("fc.weight",)
    cs.load_into(model, source, dtype=dtype, keep=["fc.weight"], drop=[f"fc.{scale}"])


def test_fp8_without_scales_is_loaded_when_a_cast_is_asked_for_aloud() -> None:
    model, source = nn.Linear(4, 4, bias=False), {"weight": torch.ones(4, 4).to(torch.float8_e5m2)}
    found = problem(model, source, "unscaled-codes")
    assert "nothing beside it" in str(found)
    problem(model, source, "unscaled-codes", partial=True)  # nothing else is there to be loaded
    assert cs.load_into(model, source, dtype="model").cast == ("weight",) and (model.weight == 1).all()


def test_a_model_of_fp8_takes_codes_and_scales() -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(4, 4).to(torch.float8_e4m3fn))
    model.register_buffer("weight_scale", torch.ones(1))
    source = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale": torch.full((1,), 2.0)}
    assert cs.load_into(model, source).coverage == 1


def test_a_hooked_module_that_scales_its_codes_itself_is_let() -> None:
    class Scaling(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            scale = state.pop(prefix + "weight_scale", None)
            if scale is not None:
                state[prefix + "weight"] = state[prefix + "weight"].float() * scale
            super()._load_from_state_dict(state, prefix, *rest)

    model = nn.ModuleDict({"fc": Scaling(4, 4, bias=False)})
    source = {"fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "fc.weight_scale": torch.full((1,), 2.0)}
    cs.load_into(model, source)
    assert (model["fc"].weight == 2).all()
