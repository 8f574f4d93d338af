"""GGUF files: read as the gguf package reads them, and written byte for byte as it writes them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptsurgery as cs

DATA = Path(__file__).parents[1] / "data" / "formats"
REAL = DATA / "all.gguf"


def test_tensors_are_what_the_package_reads() -> None:
    theirs = load_file(DATA / "all.gguf.safetensors")
    with cs.open(REAL) as checkpoint:
        assert set(checkpoint) == set(theirs)
        for key, tensor in theirs.items():
            found = checkpoint[key].load()
            if key == "packed.BF16":  # numpy has no bfloat16, so the package gives bytes
                assert found.dtype == torch.bfloat16
                tensor = tensor.view(torch.bfloat16).reshape(found.shape)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), key


def test_pairs_are_the_config_and_packed_types_are_named() -> None:
    with cs.open(REAL) as checkpoint:
        config = checkpoint.config
        assert config is not None
        assert config["general"] == {"architecture": "tiny", "name": "größe"}
        assert config["tiny"]["uint64"] == config["tiny"]["int8"] == 7
        assert config["tiny"]["float64"] == 0.1
        assert config["tiny"]["flag"] is True
        about = checkpoint.extras["gguf"]
        assert about["metadata"]["tokenizer.ggml.tokens"] == ["<s>", "a", "\n"]
        assert about["tensor_types"] == {
            f"packed.{name}": name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
        }
        assert checkpoint["packed.Q8_0"].shape == (2, 512 // 32 * 34)


def test_what_is_written_again_is_the_same_file(tmp_path: Path) -> None:
    with cs.open(REAL) as checkpoint:
        cs.save(checkpoint, tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == REAL.read_bytes()


def test_names_and_dtypes_change_and_the_pairs_stay(tmp_path: Path) -> None:
    with cs.open(REAL) as checkpoint:
        plan = cs.plan(checkpoint, ["vector -> v | cast(bf16)", "plain.{k} -> p.{k}", "packed.{k} -> packed.{k}"])
        plan.save(tmp_path / "new.gguf", beside="keep")
        with cs.open(tmp_path / "new.gguf") as made:
            assert made.extras["gguf"] == checkpoint.extras["gguf"]
            assert torch.equal(made["v"].load(), checkpoint["vector"].load().bfloat16())
            assert torch.equal(made["p.I64"].load(), checkpoint["plain.I64"].load())
            assert bytes(made.read("packed.Q5_1")) == bytes(checkpoint.read("packed.Q5_1"))


TEMPLATE = DATA / "llama.gguf"


def tiny_llama() -> dict[str, torch.Tensor]:
    """A state dict of the sizes that the template has."""
    rows = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    made = {"model.embed_tokens.weight": torch.randn(96, 64), "model.norm.weight": torch.randn(64)}
    for i in range(2):
        layer = f"model.layers.{i}."
        made |= {f"{layer}self_attn.{name}.weight": torch.randn(count, 64) for name, count in rows.items()}
        made[f"{layer}self_attn.o_proj.weight"] = torch.randn(64, 64)
        made |= {f"{layer}mlp.{name}_proj.weight": torch.randn(128, 64) for name in ("gate", "up")}
        made[f"{layer}mlp.down_proj.weight"] = torch.randn(64, 128)
        made |= {f"{layer}{name}_layernorm.weight": torch.randn(64) for name in ("input", "post_attention")}
    return made | {"lm_head.weight": torch.randn(96, 64)}


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_template_gives_architecture_sizes_and_tokenizer(tmp_path: Path) -> None:
    """`scripts/formats/gguf_logits.py` opens such files with transformers: the logits of F32 are equal."""
    recipe = cs.load_recipe("llama/hf_to_gguf").then(cs.load_recipe("quantised/float_to_q80"))
    state = tiny_llama()
    plan = cs.plan(state, recipe, config=CONFIG)
    plan.save(tmp_path / "new.gguf", template=TEMPLATE, check=True)
    with cs.open(tmp_path / "new.gguf") as made, cs.open(TEMPLATE) as template:
        about, given = made.extras["gguf"], template.extras["gguf"]
        assert given["metadata"]["general.file_type"] == 0
        assert about["metadata"] == given["metadata"] | {"general.file_type": 7}
        assert about["kinds"] == given["kinds"]
        matrices = {key for key, spec in made.specs.items() if len(spec.shape) == 2}
        assert about["tensor_types"] == dict.fromkeys(matrices, "Q8_0")
        assert {spec.dtype for key, spec in made.specs.items() if key not in matrices} == {"F32"}
        back = cs.plan(made, cs.load_recipe("quantised/gguf_to_float")).state_dict()
    apart = (back["token_embd.weight"] - state["model.embed_tokens.weight"]).abs().max()
    assert 0 < apart < state["model.embed_tokens.weight"].abs().max() / 127


def test_packed_types_follow_the_names_and_whole_rows(tmp_path: Path) -> None:
    rules = ["packed.{k} -> moved.{k}.weight", "plain.{k} -> plain.{k}", "vector -> vector"]
    with cs.open(REAL) as checkpoint:
        cs.plan(checkpoint, rules).save(tmp_path / "new.gguf", beside="keep")
        rows = cs.plan(checkpoint, cs.Recipe(["packed.Q8_0 [(a b) ...] -> w [(b a) ...]"], dims={"a": 2}, rest="drop"))
        rows.save(tmp_path / "rows.gguf", beside="keep")
    with cs.open(tmp_path / "new.gguf") as made:
        assert made.extras["gguf"]["tensor_types"]["moved.Q5_1.weight"] == "Q5_1"
    with cs.open(tmp_path / "rows.gguf") as made:
        assert made.extras["gguf"]["tensor_types"] == {"w": "Q8_0"}
    with cs.open(REAL) as checkpoint, pytest.raises(cs.CheckpointError, match="dtype-not-in-format"):
        cut = cs.Recipe(["packed.Q8_0 [r c] -> w [c r]"], rest="drop")
        cs.plan(checkpoint, cut).save(tmp_path / "cut.gguf", beside="keep")


def test_pairs_are_given(tmp_path: Path) -> None:
    pairs = {
        "general.architecture": "tiny",
        "tiny.count": 3,
        "tiny.large": 1 << 40,
        "tiny.below": -7,
        "tiny.eps": 0.5,
        "tiny.flag": True,
        "tiny.names": ["a", "b"],
        "tiny.one": ["a"],
        "tiny.mixed": [1, -2, 3],
        "tiny.nested": [[1, 2], [3]],
    }
    cs.plan({"w": torch.ones(2)}, "w -> w").save(tmp_path / "x.gguf", template=pairs)
    with cs.open(tmp_path / "x.gguf") as made:
        assert made.extras["gguf"]["metadata"] == pairs
    for bad in ({"k": {"a": 1}}, {"k": [1, "a"]}, {"k": 1 << 64}, {"k": [-1, 1 << 63]}, {"k": []}):
        with pytest.raises(cs.CheckpointError, match=r"unsupported-format.*GGUF does not hold"):
            cs.plan({"w": torch.ones(2)}, "w -> w").save(tmp_path / "y.gguf", template=bad)


def test_a_template_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    cs.save({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(cs.CheckpointError, match=r"unsupported-format.*not a GGUF file"):
        cs.plan({"w": torch.ones(2)}, "w -> w").save(tmp_path / "y.gguf", template=tmp_path / "x.safetensors")
    assert not (tmp_path / "y.gguf").exists()


def test_an_output_without_an_architecture_is_a_warning_that_names_the_template(tmp_path: Path) -> None:
    plan = cs.plan(tiny_llama(), "llama/hf_to_gguf", config=CONFIG)
    for report in (plan.save(tmp_path / "bare.gguf", dry_run=True), plan.save(tmp_path / "bare.gguf")):
        assert [told.code for told in report.warnings] == ["no-architecture"]
        assert "template=… takes the key-value pairs" in str(report)
    half = plan.save(tmp_path / "half.gguf", template={"general.name": "x"})
    assert [told.code for told in half.warnings] == ["no-architecture"]
    assert not plan.save(tmp_path / "whole.gguf", template=TEMPLATE).warnings
    assert not plan.save(tmp_path / "x.safetensors").warnings


def test_a_template_without_pairs_is_refused(tmp_path: Path) -> None:
    plan = cs.plan({"w": torch.ones(2)}, "w -> w")
    plan.save(tmp_path / "bare.gguf")
    for template in (tmp_path / "bare.gguf", str(tmp_path / "bare.gguf"), {}):
        with pytest.raises(cs.CheckpointError, match=r"empty-template.*has no key-value pairs"):
            plan.save(tmp_path / "y.gguf", template=template)
    assert not (tmp_path / "y.gguf").exists()


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match=r"dtype-not-in-format.*flag BOOL"):
        cs.save({"flag": torch.tensor([True])}, tmp_path / "x.gguf")
    with pytest.raises(cs.CheckpointError, match="dtype-not-in-format"):
        cs.save({"deep": torch.ones(1, 1, 1, 1, 1)}, tmp_path / "x.gguf")
    shared = torch.ones(2)
    with pytest.raises(cs.CheckpointError, match="tie-not-in-format"):
        cs.save({"a": shared, "b": shared}, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_cut_and_changed_files_are_refused_or_read_within_bounds(tmp_path: Path) -> None:
    data, rng = REAL.read_bytes(), random.Random(0)
    header = data.index(b"packed.MXFP4") + 60
    for number in range(1500):
        changed = bytearray(data[: rng.randrange(4, len(data))] if number % 3 == 0 else data)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(4, min(header, len(changed)))
            changed[at] = rng.choice([0, 1, 255, rng.randrange(256)])
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            with cs.open(tmp_path / "x.gguf") as checkpoint:
                for key, tensor in checkpoint.items():
                    assert len(checkpoint.read(key)) == tensor.nbytes
        except cs.CkptSurgeryError as error:
            assert all(d.code != "unforeseen" and d.place and d.help for d in error.diagnostics), error
