"""An extracted adapter merges to the tuned model, as far as its rank reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

Tensors = dict[str, torch.Tensor]


def models(rank: int = 2) -> tuple[Tensors, Tensors]:
    torch.manual_seed(0)
    base = {f"model.{i}.{m}.weight": torch.randn(6, 8) for i in range(2) for m in ("q", "k")} | {
        "norm.weight": torch.ones(8)
    }
    tuned = {key: value.clone() for key, value in base.items()}
    for i in range(2):
        tuned[f"model.{i}.q.weight"] += torch.randn(6, rank) @ torch.randn(rank, 8)
    return base, tuned


def close(made: Tensors, wanted: Tensors) -> None:
    assert made.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(made[key], wanted[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [{"rank": 2}, {"rank": 5}, {"energy": 1.0}])
def test_a_difference_of_low_rank_comes_back(how: dict[str, float], tmp_path: Path) -> None:
    base, tuned = models()
    made = cs.adapters.extract(base, tuned, tmp_path / "lora", **how)
    assert made.ranks == {"model.0.q": 2, "model.1.q": 2} or (how == {"energy": 1.0} and max(made.ranks.values()) <= 6)
    assert max(made.errors.values()) < 1e-6
    close(cs.adapters.merge(base, tmp_path / "lora").state_dict(), tuned)


def test_a_rank_is_the_best_of_its_size(tmp_path: Path) -> None:
    base, tuned = models(rank=6)
    made = cs.adapters.extract(base, tuned, tmp_path / "lora", rank=3)
    merged = cs.adapters.merge(base, tmp_path / "lora").state_dict()
    for module, error in made.errors.items():
        delta = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        values = torch.linalg.svdvals(delta)
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)
        left = (merged[f"{module}.weight"] - tuned[f"{module}.weight"]).norm() / delta.norm()
        assert float(left) == pytest.approx(error, rel=1e-4)


def test_an_energy_takes_the_least_rank_that_keeps_it(tmp_path: Path) -> None:
    base = {"q.weight": torch.zeros(4, 4), "k.weight": torch.zeros(4, 4)}
    tuned = {"q.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), "k.weight": torch.eye(4)}
    made = cs.adapters.extract(base, tuned, tmp_path / "lora", energy=0.9)
    assert made.ranks == {"q": 2, "k": 4}  # 9 + 4 of 14 is 0.93, 3 of 4 is 0.75
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == config["alpha_pattern"] == {"q": 2}


def test_what_has_no_update_is_stored_whole_or_left_out_on_request(tmp_path: Path) -> None:
    base, tuned = models()
    tuned["norm.weight"] = torch.full((8,), 2.0)
    with pytest.raises(cs.CheckpointError) as caught:
        cs.adapters.extract(base, tuned, tmp_path / "a", rank=2)
    assert caught.value.diagnostics[0].code == "extract-others" and not (tmp_path / "a").exists()
    cs.adapters.extract(base, tuned, tmp_path / "b", rank=2, others="whole")
    close(cs.adapters.merge(base, tmp_path / "b").state_dict(), tuned)
    cs.adapters.extract(base, tuned, tmp_path / "c", rank=2, others="drop")
    close(cs.adapters.merge(base, tmp_path / "c").state_dict(), {**tuned, "norm.weight": base["norm.weight"]})


@pytest.mark.parametrize("key", ["cls", "model.0.q.bias", "model.0.scale"])
def test_what_peft_cannot_store_whole_is_refused(key: str, tmp_path: Path) -> None:
    base, tuned = models()
    base[key], tuned[key] = torch.zeros(6), torch.ones(6)
    with pytest.raises(cs.CheckpointError, match=key) as caught:
        cs.adapters.extract(base, tuned, tmp_path / "a", rank=2, others="whole")
    assert caught.value.diagnostics[0].code == "extract-whole" and not (tmp_path / "a").exists()
    cs.adapters.extract(base, tuned, tmp_path / "a", rank=2, others="drop")
    close(cs.adapters.merge(base, tmp_path / "a").state_dict(), {**tuned, key: base[key]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("how", [{"rank": 1}, {"energy": 0.9}])
def test_a_value_that_is_not_finite_is_refused_by_name(
    bad: float, side: int, how: dict[str, float], tmp_path: Path
) -> None:
    pair = models()
    pair[side]["model.1.k.weight"][2, 3] = bad
    with pytest.raises(cs.CheckpointError, match=r"'model\.1\.k\.weight' has 1 value of NaN or infinity") as caught:
        cs.adapters.extract(*pair, tmp_path / "lora", **how)  # type: ignore[arg-type]
    assert caught.value.diagnostics[0].code == "extract-not-finite" and not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "how", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"rank": 1, "others": "x"}]
)
def test_bad_arguments_are_refused(how: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError):
        cs.adapters.extract(*models(), tmp_path / "lora", **how)  # type: ignore[arg-type]


def test_models_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    base, tuned = models()
    with pytest.raises(cs.CheckpointError, match="differ in name or shape"):
        cs.adapters.extract(base, {**tuned, "norm.weight": torch.ones(9)}, tmp_path / "lora", rank=1)
    (tmp_path / "lora").mkdir()
    with pytest.raises(cs.CheckpointError, match="exists already"):
        cs.adapters.extract(base, tuned, tmp_path / "lora", rank=1)


@pytest.mark.parametrize(
    ("module", "named", "as_embedding"),
    [
        ("model.embed_tokens", None, True),
        ("transformer.wte", None, True),
        ("encoder.embeddings.word_embeddings", None, True),
        ("lm_head", None, False),
        ("members.q", None, False),
        ("tok", ["tok"], True),
        ("model.embed_tokens", [], False),
    ],
)
def test_the_update_of_an_embedding_is_written_as_peft_writes_it(
    module: str, named: list[str] | None, as_embedding: bool, tmp_path: Path
) -> None:
    """PEFT adds (B·A)ᵀ of `lora_embedding_A` [r, rows] and `lora_embedding_B` [width, r] to an embedding."""
    torch.manual_seed(0)
    base = {f"{module}.weight": torch.randn(12, 5)}
    tuned = {f"{module}.weight": base[f"{module}.weight"] + torch.randn(12, 2) @ torch.randn(2, 5)}
    made = cs.adapters.extract(base, tuned, tmp_path / "lora", rank=2, embeddings=named)
    assert made.embeddings == ((module,) if as_embedding else ())
    state = cs.open(tmp_path / "lora").state_dict()
    if as_embedding:
        a, b = (state[f"base_model.model.{module}.lora_embedding_{x}"] for x in "AB")
        assert a.shape == (2, 12) and b.shape == (5, 2)
        delta = (b @ a).T
    else:
        delta = state[f"base_model.model.{module}.lora_B.weight"] @ state[f"base_model.model.{module}.lora_A.weight"]
    torch.testing.assert_close(base[f"{module}.weight"] + delta, tuned[f"{module}.weight"], rtol=0, atol=1e-5)
    close(cs.adapters.merge(base, tmp_path / "lora").state_dict(), tuned)
