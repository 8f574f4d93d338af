"""A merge is PEFT's own, in every spelling; what a loader would drop is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptsurgery as cs

DATA = Path(__file__).parent.parent / "data" / "adapters"
CASES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
Tensors = dict[str, torch.Tensor]


def close(made: Tensors, wanted: Tensors) -> None:
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, rtol=0, atol=1e-6)


def adapter(name: str) -> tuple[Tensors, dict[str, Any]]:
    folder = DATA / name / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_what_peft_makes(name: str) -> None:
    plan = cs.adapters.merge(DATA / name / "base.safetensors", DATA / name / "adapter")
    close(plan.state_dict(), load_file(DATA / name / "merged.safetensors"))
    assert plan.recipe is not None
    assert len(plan.recipe.rules) <= 8 and cs.Recipe(plan.recipe.rules).rules == plan.recipe.rules


def test_what_the_adapter_does_not_change_is_copied(tmp_path: Path) -> None:
    plan = cs.adapters.merge(DATA / "linear" / "base.safetensors", DATA / "linear" / "adapter")
    assert {step.targets[0] for step in plan.steps if step.kind == "compute"} == {
        f"layers.{i}.{m}.weight" for i in range(2) for m in ("q", "k")
    }
    plan.save(tmp_path / "x.safetensors", check=True)
    close(load_file(tmp_path / "x.safetensors"), load_file(DATA / "linear" / "merged.safetensors"))


def spelled(style: str, name: str) -> Tensors:
    """An adapter of PEFT in another spelling, with alpha where the spelling stores it."""
    tensors, config = adapter(name)
    made: Tensors = {}
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        down = part == "A"
        if style == "kohya":
            flat = "lora_unet_" + module.replace(".", "_")
            made[f"{flat}.lora_{'down' if down else 'up'}.weight"] = tensor
            made[f"{flat}.alpha"] = torch.tensor(float(config["lora_alpha"]))
        elif style == "kohya without a component":
            made[f"{module.replace('.', '_')}.lora_{'down' if down else 'up'}.weight"] = tensor
            made[f"{module.replace('.', '_')}.alpha"] = torch.tensor(float(config["lora_alpha"]))
        else:
            scale = config["lora_alpha"] / config["r"]
            tensor = tensor if down else tensor * scale
            spellings = {
                "diffusers": f"unet.{module}.lora_{part}.weight",
                "diffusers, old": f"{module}.lora.{'down' if down else 'up'}.weight",
                "diffusers, processors": f"{module.replace('.q', '.processor.q').replace('.k', '.processor.k')}_lora."
                f"{'down' if down else 'up'}.weight",
                "named": f"base_model.model.{module}.lora_{part}.mine.weight",
            }
            made[spellings[style]] = tensor
    return made


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize(
    "style",
    ["kohya", "kohya without a component", "diffusers", "diffusers, old", "diffusers, processors", "named"],
)
def test_every_spelling_gives_the_same_weights(style: str, name: str) -> None:
    if "." not in next(iter(adapter(name)[0])).removeprefix("base_model.model.").rpartition(".lora_")[0]:
        style = style.replace("without a component", "").strip()
    plan = cs.adapters.merge(DATA / name / "base.safetensors", spelled(style, name))
    close(plan.state_dict(), load_file(DATA / name / "merged.safetensors"))


@pytest.mark.parametrize("front", ["model.", ""])
def test_the_base_may_have_another_prefix(front: str) -> None:
    base = {f"{front}{key}": value for key, value in load_file(DATA / "linear" / "base.safetensors").items()}
    made = cs.adapters.merge(base, DATA / "linear" / "adapter").state_dict()
    wanted = load_file(DATA / "linear" / "merged.safetensors")
    close(made, {f"{front}{key}": value for key, value in wanted.items()})


def test_several_adapters_are_added_with_their_weights() -> None:
    base = load_file(DATA / "linear" / "base.safetensors")
    merged = load_file(DATA / "linear" / "merged.safetensors")
    twice = cs.adapters.merge(base, DATA / "linear" / "adapter", spelled("kohya", "linear"), weights=[0.5, 0.25])
    close(twice.state_dict(), {key: base[key] + 0.75 * (merged[key] - base[key]) for key in base})
    half = cs.adapters.merge(base, DATA / "linear" / "adapter", weights=[0.5])
    close(half.state_dict(), {key: (base[key] + merged[key]) / 2 for key in base})


def test_several_adapters_are_rounded_once() -> None:
    base = {"q.weight": torch.full((2, 2), 1.0, dtype=torch.bfloat16)}
    small = {"q.lora_A.weight": torch.full((1, 2), 2.0**-9), "q.lora_B.weight": torch.ones(2, 1)}
    assert cs.adapters.merge(base, small).state_dict()["q.weight"][0, 0] == 1.0
    four = cs.adapters.merge(base, small, small, small, small).state_dict()["q.weight"][0, 0]
    assert four == torch.tensor(1 + 4 * 2.0**-9).bfloat16() > 1


def test_layers_with_other_alphas_have_rules_of_their_own() -> None:
    base = {f"h.{i}.w.weight": torch.zeros(2, 2) for i in range(3)}
    pair = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1)}
    lora = {f"h.{i}.w.{part}": value for i in range(3) for part, value in pair.items()}
    lora |= {f"h.{i}.w.alpha": torch.tensor(float(i + 1)) for i in range(3)}
    plan = cs.adapters.merge(base, lora)
    assert plan.recipe is not None and len(plan.recipe.rules) == 1
    assert [float(t[0, 0]) for t in plan.state_dict().values()] == [1.0, 2.0, 3.0]
    weighted = cs.adapters.merge(base, lora, weights=[2])
    assert weighted.recipe is not None and len(weighted.recipe.rules) == 3
    assert [float(t[0, 0]) for t in weighted.state_dict().values()] == [2.0, 4.0, 6.0]


BASE = {"q.weight": torch.zeros(4, 6), "k.weight": torch.zeros(4, 6)}
PAIR = {"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("lora", "code"),
    [
        ({"q.lora_A.weight": PAIR["q.lora_A.weight"]}, "adapter-incomplete"),
        ({**PAIR, "v.lora_A.weight": torch.ones(2, 6), "v.lora_B.weight": torch.ones(4, 2)}, "adapter-unmatched"),
        ({**PAIR, "score.weight": torch.ones(2, 6)}, "adapter-unmatched"),
        ({**PAIR, "k.weight": torch.ones(2, 2)}, "adapter-unmatched"),
        ({**PAIR, "q.lora_B.bias": torch.ones(4)}, "adapter-unmatched"),
        ({"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(4, 2)}, "bad-op"),
    ],
)
def test_tensors_that_would_be_dropped_are_an_error(lora: Tensors, code: str) -> None:
    with pytest.raises(cs.CkptSurgeryError) as caught:
        cs.adapters.merge(BASE, lora)
    assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"peft_type": "LOHA"}, "adapter-unsupported"),
        ({"layer_replication": [[0, 2]]}, "adapter-unsupported"),
        ({"use_dora": True}, "adapter-incomplete"),
    ],
)
def test_what_has_another_formula_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(cs.CheckpointError) as caught:
        cs.adapters.merge(BASE, tmp_path)
    assert caught.value.diagnostics[0].code == code


def test_square_experts_fit_in_two_ways(tmp_path: Path) -> None:
    save_file({"e.lora_A.weight": torch.ones(6, 4), "e.lora_B.weight": torch.ones(4, 6)}, tmp_path / "a.safetensors")
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["e.w"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(cs.CheckpointError) as caught:
        cs.adapters.merge({"e.w": torch.zeros(3, 4, 4)}, tmp_path / "a.safetensors")
    assert caught.value.diagnostics[0].code == "adapter-ambiguous"


def test_adapters_that_exclude_each_other_are_refused() -> None:
    dora = DATA / "dora" / "adapter"
    with pytest.raises(cs.CheckpointError, match="only one adapter"):
        cs.adapters.merge(DATA / "dora" / "base.safetensors", dora, dora)
    with pytest.raises(cs.CheckpointError, match="has no weight"):
        cs.adapters.merge(DATA / "dora" / "base.safetensors", dora, weights=[0.5])
    with pytest.raises(cs.CheckpointError, match="1 weights for 2 adapters"):
        cs.adapters.merge(BASE, PAIR, PAIR, weights=[1.0])
