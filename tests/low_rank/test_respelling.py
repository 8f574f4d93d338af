"""An adapter in another spelling merges to the same weights, and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptsurgery as cs

DATA = Path(__file__).parent.parent / "data" / "adapters"


def close(made: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, rtol=0, atol=1e-6)


PLAIN = [(name, to) for name in ("linear", "conv", "patterns", "rslora") for to in ("peft", "kohya", "diffusers")]
TO_PEFT = [(name, "peft") for name in ("turned", "dora", "embedding", "whole")]


@pytest.mark.parametrize(("name", "to"), [*PLAIN, *TO_PEFT])
def test_the_merge_stays_what_peft_makes(name: str, to: str, tmp_path: Path) -> None:
    base, out = DATA / name / "base.safetensors", tmp_path / ("peft" if to == "peft" else "x.safetensors")
    wanted = load_file(DATA / name / "merged.safetensors")
    made = cs.adapters.convert(DATA / name / "adapter", base, out, to)
    close(cs.adapters.merge(base, made).state_dict(), wanted)
    back = cs.adapters.convert(made, base, tmp_path / "back", "peft")
    close(cs.adapters.merge(base, back).state_dict(), wanted)


def test_alpha_of_each_module_is_kept(tmp_path: Path) -> None:
    shapes = {"q": (6, 4), "k": (2, 4)}
    base = {f"unet.mid.{m}.weight": torch.zeros(shape) for m, shape in shapes.items()}
    kohya: dict[str, torch.Tensor] = {}
    for (m, (out, inside)), alpha, rank in zip(shapes.items(), (8.0, 3.0), (2, 1)):
        kohya[f"lora_unet_mid_{m}.lora_down.weight"] = torch.randn(rank, inside)
        kohya[f"lora_unet_mid_{m}.lora_up.weight"] = torch.randn(out, rank)
        kohya[f"lora_unet_mid_{m}.alpha"] = torch.tensor(alpha)
    wanted = cs.adapters.merge(base, kohya).state_dict()
    folder = cs.adapters.convert(kohya, base, tmp_path / "peft", "peft")
    config = cs.open(folder).config or {}
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert config["rank_pattern"] == {"unet.mid.k": 1} and config["alpha_pattern"] == {"unet.mid.k": 3}
    close(cs.adapters.merge(base, folder).state_dict(), wanted)
    again = load_file(cs.adapters.convert(folder, base, tmp_path / "again.safetensors", "kohya"))
    close(again, kohya)


def test_what_a_spelling_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for name in ("dora", "experts", "embedding"):
        folder = DATA / name
        with pytest.raises(cs.CheckpointError, match="has no place for"):
            cs.adapters.convert(folder / "adapter", folder / "base.safetensors", tmp_path / "x.safetensors", "kohya")
    same = {"a.b_c.weight": torch.zeros(2, 2), "a.b.c.weight": torch.zeros(2, 2)}
    lora = {f"{m}.lora_{p}.weight": torch.ones(2, 2) for m in ("a.b_c", "a.b.c") for p in "AB"}
    with pytest.raises(cs.CheckpointError, match="two modules of one name"):
        cs.adapters.convert(lora, same, tmp_path / "x.safetensors", "kohya")
    save_file(lora, tmp_path / "x.safetensors")
    with pytest.raises(cs.CheckpointError, match="exists already"):
        cs.adapters.convert(lora, same, tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(cs.CheckpointError, match="is not one of"):
        cs.adapters.convert(lora, same, tmp_path / "y.safetensors", "other")
