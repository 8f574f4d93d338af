from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.comparing import numbers, ranking
from ckptsurgery.language.folding import fold_groups

ONE = torch.tensor([1.0, -2.0, 3.0, 0.5])


def only(a: torch.Tensor, b: torch.Tensor) -> numbers.Difference | None:
    return cs.diff({"w": a}, {"w": b}).values.get("w")


def test_a_checkpoint_is_identical_to_itself_in_every_format(tmp_path: Path) -> None:
    source = {"a.w": ONE, "a.tied": ONE, "n": torch.tensor(3), "e": torch.zeros(0, 2)}
    for name in ("x.safetensors", "x.pt", "folder"):
        cs.save(source, tmp_path / name)
        found = cs.diff(source, tmp_path / name)
        assert found.identical, str(found)
        assert "identical: " in str(found)


def test_what_one_side_alone_has_is_named() -> None:
    found = cs.diff({"a": ONE, "b": ONE.clone()}, {"b": ONE.clone(), "c": ONE.clone()})
    assert (list(found.only_a), list(found.only_b), found.common, found.identical) == (["a"], ["c"], 1, False)


def test_shapes_are_compared_before_values() -> None:
    found = cs.diff({"w": ONE}, {"w": ONE.reshape(2, 2)})
    assert {k: (a.shape, b.shape) for k, (a, b) in found.shapes.items()} == {"w": ((4,), (2, 2))}
    assert not found.values


def test_a_dtype_that_lost_nothing_is_a_difference_in_dtype_alone() -> None:
    found = cs.diff({"w": ONE}, {"w": ONE.bfloat16()})
    assert found.dtypes.keys() == {"w"}
    assert not found.values
    assert not found.identical


def test_a_dtype_that_lost_bits_is_a_difference_in_values_too() -> None:
    found = cs.diff({"w": ONE / 3}, {"w": (ONE / 3).bfloat16()})
    assert 0 < found.values["w"].max_rel < 2**-8


def test_ties_of_common_keys_are_compared() -> None:
    found = cs.diff({"a": ONE, "b": ONE}, {"a": ONE, "b": ONE.clone()})
    assert (found.ties_a, found.ties_b, found.identical) == ((("a", "b"),), (), False)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=30), st.integers(1, 7))
@example([(1.0, 2.5e-160)], 1)
@example([(1e-300, 2.0), (3e-290, -1.0), (5.0, 1e-200)], 1)
def test_the_numbers_are_what_torch_says_whatever_the_block(pairs: list[tuple[float, float]], block: int) -> None:
    a, b = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_BLOCK", block)
        found = only(a, b)
    if found is None:
        assert torch.equal(a, b)
        return
    assert found.differing == int((a != b).sum())
    assert found.max_abs == float((a - b).abs().max())
    if found.cosine is not None:
        # torch squares what it is given: what is tiny would be lost
        a, b = a / a.abs().max(), b / b.abs().max()
        expected = torch.cosine_similarity(a, b, dim=0, eps=0.0)
        assert found.cosine == pytest.approx(float(expected), abs=1e-9)


def test_two_nans_are_equal_and_one_is_counted_apart() -> None:
    nan, inf = float("nan"), float("inf")
    found = only(torch.tensor([nan, nan, 1.0, inf]), torch.tensor([nan, 1.0, 1.0, -inf]))
    assert found is not None
    assert (found.differing, found.nonfinite, found.max_abs) == (2, 2, 0.0)


def test_the_sign_of_a_zero_is_a_difference_in_bits_only() -> None:
    found = only(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert found is not None
    assert found.differing == 0


def test_integers_too_large_for_a_double_are_compared_exactly() -> None:
    found = only(torch.tensor([2**53]), torch.tensor([2**53 + 1]))
    assert found is not None
    assert found.differing == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
@pytest.mark.parametrize(
    ("one", "other", "apart"), [(2**62, 2**62 + 1, 1), (2**62, 2**62 - 40, 40), (0, 2**63 - 1, 2**63)]
)
def test_how_far_large_integers_are_apart_is_not_rounded_away(
    dtype: torch.dtype, one: int, other: int, apart: int
) -> None:
    a, b = ({"a": torch.tensor([n, 7], dtype=dtype)} for n in (one, other))
    assert cs.diff(a, b).values["a"].max_abs == cs.diff(b, a).values["a"].max_abs == apart


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.uint64, torch.bool, torch.complex64]
)
def test_unusual_dtypes_are_compared(dtype: torch.dtype) -> None:
    found = only(torch.tensor([1.0, 1.0]).to(dtype), torch.tensor([1.0, 2.0 if dtype != torch.bool else 0.0]).to(dtype))
    assert found is not None
    assert (found.differing, found.max_abs) == (1, 1.0)


def test_packed_dtypes_are_compared_by_their_bytes() -> None:
    a, b = (torch.tensor([1, x], dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for x in (2, 3))
    assert only(a, a.clone()) is None
    found = only(a, b)
    assert found is not None
    assert found.differing is None


def test_a_recipe_is_applied_to_the_first_side(tmp_path: Path) -> None:
    source = {f"h.{i}.qkv": torch.randn(6, 2) for i in range(2)} | {"x": ONE, "y": ONE}
    recipe = cs.Recipe(["h.{i}.qkv [(p o) d] -> l.{i}.{p:q,k,v} [d o]"], rest="keep", tie={"z": "x"})
    cs.plan(source, recipe).save(tmp_path / "made.safetensors")
    assert cs.diff(source, tmp_path / "made.safetensors", recipe).identical
    source["h.1.qkv"][0, 0] += 1
    found = cs.diff(source, tmp_path / "made.safetensors", recipe)
    assert {k: d.differing for k, d in found.values.items()} == {"l.1.q": 1}


def test_headers_alone_say_nothing_of_values() -> None:
    found = cs.diff({"w": ONE}, {"w": ONE + 1}, values=False)
    assert found.identical
    assert "bytes" not in str(found)
    assert found.to_json()["values"] is None


def test_layers_are_folded_and_the_worst_is_shown() -> None:
    a = {f"l.{i}.w": torch.ones(2) for i in range(12)}
    found = cs.diff(a, {k: t + 0.25 * n for n, (k, t) in enumerate(a.items())})
    assert "  l.{1..11}.w\n    22 of 22 elements, max |a - b| 2.75, " in str(found)


def test_the_one_layer_that_is_broken_is_not_folded_with_those_that_were_rounded() -> None:
    torch.manual_seed(0)
    a = {f"layers.{i}.{m}.weight": torch.randn(8, 8) for i in range(4) for m in ("q", "k")} | {"same": ONE}
    b = {key: tensor if key == "same" else tensor.bfloat16().float() for key, tensor in a.items()}
    b["layers.2.q.weight"] = b["layers.2.q.weight"].clone()
    b["layers.2.q.weight"][3, 4] += 0.185
    lines = str(cs.diff(a, b)).split("\n")
    keys = [line.strip() for line in lines if line.startswith("  layers")]
    assert keys == ["layers.2.q.weight", "layers.{0,1,3}.q.weight", "layers.{0..3}.k.weight"] or keys == [
        "layers.2.q.weight",
        "layers.{0..3}.k.weight",
        "layers.{0,1,3}.q.weight",
    ]
    assert "of 64 elements, max |a - b| 0.18" in lines[lines.index("  layers.2.q.weight") + 1]


def test_each_line_of_differences_has_the_numbers_of_its_own_keys_and_the_largest_comes_first() -> None:
    apart = {"l.0.w": 1.0, "l.1.w": 1.5, "l.2.w": 100.0, "l.3.w": 1.0, "l.7.w": 1.0, "m": 9.0, "n": float("nan")}
    a = {key: torch.zeros(2) for key in (*apart, "l.4.w")}
    b = {key: torch.tensor([apart.get(key, 0.0), 0.0]) for key in a}
    lines = [line.strip() for line in str(cs.diff(a, b)).split("\n")]
    assert lines[lines.index("values: 7 of 8 tensors differ") + 1 :] == [
        "n",
        "1 of 2 elements, max |a - b| 0, relative 0, 1 with NaN or Inf",
        "l.2.w",
        "1 of 2 elements, max |a - b| 100, relative 1",
        "m",
        "1 of 2 elements, max |a - b| 9, relative 1",
        "l.{0,1,3,7}.w",
        "4 of 8 elements, max |a - b| 1.5, in l.1.w, 1 at least, relative 1",
    ]


@given(st.dictionaries(st.tuples(st.integers(0, 9), st.sampled_from("qk")), st.floats(0, 1e6), min_size=1))
def test_lines_name_each_differing_key_once_and_no_other(sizes: dict[tuple[int, str], float]) -> None:
    found = {f"l.{i}.{m}": numbers.Difference(4, 4, max_abs=size) for (i, m), size in sizes.items()}
    rows = ranking.ranked(found)
    assert sum(row.count for row in rows) == len(found)
    assert {key for line in fold_groups(list(found)) for key in line.keys} == set(found)
    assert max(sizes.values()) == pytest.approx(float(rows[0].said.split("|a - b| ")[1].split(",")[0]), rel=5e-3)


def test_one_tensor_is_not_all_tensors() -> None:
    one, two = {"w": torch.ones(2)}, {"w": torch.ones(2), "v": torch.ones(3)}
    assert "ties and bytes of 1 tensor" in str(cs.diff(one, one))
    assert "ties and bytes of all 2 tensors" in str(cs.diff(two, two))
    assert "values: equal in 1 tensor of equal shape" in str(cs.diff(one, two))
    assert "values: 1 of 1 tensor differ" in str(cs.diff(one, {"w": torch.zeros(2)}))


def test_the_difference_is_plain_data() -> None:
    found = cs.diff({"w": ONE, "a": ONE, "s": ONE}, {"w": ONE + 1, "b": ONE, "s": ONE.half()})
    assert json.loads(json.dumps(found.to_json()))["only_a"] == {"a": {"dtype": "F32", "shape": [4]}}


def test_equal_files_are_compared_without_torch(tmp_path: Path) -> None:
    cs.save({"w": ONE}, tmp_path / "a.safetensors")
    code = "import sys, ckptsurgery as cs; print(cs.diff(*sys.argv[1:] * 2).identical, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], capture_output=True, text=True)
    assert done.stdout == "True False\n"


OURS = {f"h.{i}.{k}": torch.randn(*s) for i in range(3) for k, s in (("ln.gamma", (8,)), ("fc.kernel", (8, 16)))}


def theirs() -> dict[str, torch.Tensor]:
    moved = {k.replace("h.", "layers.").replace("ln.gamma", "norm.weight"): v for k, v in OURS.items()}
    moved = {k.replace("fc.kernel", "up.weight"): v for k, v in moved.items()}
    return {k: v.t().contiguous() if v.dim() == 2 else v.clone() for k, v in moved.items()}


@pytest.mark.parametrize("by", ["names", "values"])
def test_two_layouts_are_aligned_by_inference_where_that_is_asked(by: str) -> None:
    found = cs.diff(OURS, theirs(), align=by)
    assert found.identical, str(found)
    assert found.alignment is not None and found.alignment.evidence == by
    assert "100.0% of b's keys" in str(found)
    assert json.loads(json.dumps(found.to_json()))["alignment"]["coverage"] == 1.0


def test_what_alignment_leaves_over_is_in_one_side_alone_under_its_own_name() -> None:
    found = cs.diff({**OURS, "head.weight": torch.ones(3, 8)}, {**theirs(), "mask": torch.ones(7)}, align="names")
    assert (list(found.only_a), list(found.only_b)) == (["head.weight"], ["mask"])
    changed = theirs()
    changed["layers.1.up.weight"][0, 0] += 1
    assert cs.diff(OURS, changed, align="names").values["layers.1.up.weight"].differing == 1


def test_a_recipe_is_given_or_inferred_and_from_what_is_said() -> None:
    with pytest.raises(cs.RecipeError, match="bad-argument"):
        cs.diff(OURS, OURS, "{k...} -> {k...}", align="names")
    with pytest.raises(cs.RecipeError, match="bad-argument"):
        cs.diff(OURS, OURS, align="hope")
