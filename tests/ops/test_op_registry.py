from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.language.calls import parse_call
from ckptsurgery.ops import Op, OpError, make_op, op, op_names, op_signature, op_summary


def written(text, dims=None):
    call = parse_call(text)
    return make_op(call.name, call.args, dict(call.keywords), dims)


WRITTEN = {
    "cast(bf16)": "cast(dtype=BF16)",
    "cast(dtype=float16, floats=true)": "cast(dtype=F16, floats=true)",
    "add(1)": "add(value=1)",
    "mul(0.125)": "mul(value=0.125)",
    "same": "same",
    "same(r)": "same(axis=r)",
    "slice_rows(2, 5)": "slice_rows(start=2, stop=5)",
    "slice_rows(stop=5)": "slice_rows(stop=5)",
    "resize_pos_embed(grid=[16, 16], prefix=1)": "resize_pos_embed(grid=[16, 16], prefix=1)",
    "resize_rows(5, rows={0=7, 3=2})": 'resize_rows(n=5, rows=[["0", 7], ["3", 2]])',
    "resize_rows(5, rows=[7, 2], fill=zeros)": "resize_rows(n=5, fill=zeros, rows=[7, 2])",
    "unfold_weight_norm(none)": "unfold_weight_norm(dim=none)",
    "fp8_dequant(block=[1, 32], dtype=f32)": "fp8_dequant(block=[1, 32], dtype=F32)",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_written_op_prints_with_its_names_and_reads_back_equal(text):
    made = written(text)
    assert str(made) == WRITTEN[text]
    assert written(str(made)) == made


REFUSED = {
    "csat(bf16)": "no op is called 'csat'",
    "cast": "cast needs dtype; it is written cast(dtype, floats=false, saturate=false)",
    "cast(bf16, dtyp=1)": "cast has no argument 'dtyp'; it is written cast(dtype,",
    "cast(bf16, dtype=f16)": "cast is given 'dtype' twice",
    "cast(bf16, true, true, true)": "cast takes 3 arguments, not 4",
    "cast(bf17)": "cast: no dtype is called 'bf17'; did you mean 'BF16'? one of BOOL",
    "cast(8)": "cast: dtype wants str, not 8",
    "cast(bf16, floats=1)": "cast: floats wants bool, not 1",
    "add(true)": "add: value wants int | float, not true",
    "add(one)": "add: value wants int | float, not one, and dims do not name 'one'",
    "pad_to_multiple(6.5)": "pad_to_multiple: n wants int, not 6.5",
    "pad_to_multiple(0)": "pad_to_multiple wants a multiple of 1 or more, not 0",
    "resize_pos_embed([1, 2, 3])": "resize_pos_embed: grid wants int | tuple[int, int], not [1, 2, 3]",
    "resize_pos_embed([0, 2])": "resize_pos_embed: grid wants 1 or more each way, not 0 x 2",
    "resize_pos_embed(2, mode=tim)": "resize_pos_embed: mode wants one of timm, plain, dinov2, torchvision,",
    "resize_rows(4, rows={a=1})": "resize_rows: 'a' is no row number",
    "resize_rows(4, rows={4=1})": "resize_rows: each new row is named once at most, and lies in 0 to 3",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_wrong_call_is_told_what_would_be_right(text):
    with pytest.raises(OpError) as caught:
        written(text)
    assert REFUSED[text] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "near"), [("csat(bf16)", {"csat": ["cast"]}), ("cast(bf16, dtyp=1)", {"dtyp": ["dtype"]})]
)
def test_a_misspelt_word_is_told_once_with_the_ones_that_are_like_it(text, near):
    with pytest.raises(OpError) as caught:
        written(text)
    assert caught.value.instead == near and "did you mean" not in str(caught.value)
    with pytest.raises(cs.PlanError) as refused:
        cs.plan({"a": torch.ones(2)}, f"a -> b | {text}")
    assert str(refused.value).count("did you mean") == 1


def test_a_word_stands_for_a_number_of_dims_only_where_no_text_is_wanted():
    dims = {"vocab": 64, "r": 2, "bf16": 3, "grid": (4, 6)}
    assert written("pad_to_multiple(vocab)", dims).n == 64
    assert written("mul(vocab)", dims).value == 64
    assert written("resize_pos_embed(grid)", dims).grid == (4, 6)
    assert written("resize_pos_embed([vocab, r])", dims).grid == (64, 2)
    assert written("same(r)", dims).axis == "r"
    assert written("cast(bf16)", dims).dtype == "BF16"


def test_an_op_of_ten_lines_works_from_its_text_to_its_inverse(own_ops):
    @op
    class ScaleRows(Op):
        """Multiply rows by a factor."""

        name = "scale_rows"
        factor: float

        def infer(self, specs):
            return specs

        def run(self, tensors):
            return tuple(t * self.factor for t in tensors)

        def inverse(self, inputs=None):
            return ScaleRows(1 / self.factor) if inputs is None else None

    made = written("scale_rows(4)")
    assert made == ScaleRows(4.0) and hash(made) == hash(ScaleRows(4.0))
    assert torch.equal(made.inverse().run(made.run((torch.ones(2),)))[0], torch.ones(2))
    assert "scale_rows" in op_names()
    assert op_signature("scale_rows") == "scale_rows(factor)"
    assert op_summary("scale_rows") == "Multiply rows by a factor."


def test_a_name_that_is_taken_is_refused_but_the_same_class_may_come_again(own_ops):
    with pytest.raises(OpError, match=r"an op is called 'cast' already: ckptsurgery\.ops\.arithmetic\.Cast"):
        op(type("Mine", (Op,), {"name": "cast"}))
    for _ in range(2):
        op(type("Again", (Op,), {"name": "again"}))
    with pytest.raises(OpError, match="already"):
        op(type("Other", (Op,), {"name": "again"}))


def test_a_class_that_no_rule_could_write_is_refused(own_ops):
    with pytest.raises(OpError, match="needs a name"):
        op(type("Nameless", (Op,), {}))
    with pytest.raises(OpError, match="no subclass of Op"):
        op(int)
    with pytest.raises(OpError, match="name must stand without annotation"):

        @op
        @dataclass(frozen=True)
        class Annotated(Op):
            name: str = "annotated"


@pytest.fixture
def package(tmp_path: Path, monkeypatch, own_ops):
    """An installed distribution that brings ops through entry points, one of them broken."""
    info = tmp_path / "brings_ops-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brings-ops\nVersion: 1.0\n")
    entries = ["halve = brings_ops:Halve", "more = brings_ops_more", "broken = brings_nothing"]
    (info / "entry_points.txt").write_text("[ckptsurgery.ops]\n" + "\n".join(entries) + "\n")
    halve = "from ckptsurgery.ops import Op\nclass Halve(Op):\n    'Halve.'\n    name = 'halve'\n"
    more = "from ckptsurgery.ops import Op, op\n@op\nclass Third(Op):\n    'A third.'\n    name = 'third'\n"
    (tmp_path / "brings_ops.py").write_text(halve)
    (tmp_path / "brings_ops_more.py").write_text(more)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("brings_ops", "brings_ops_more"):
        sys.modules.pop(name, None)


def test_an_entry_point_is_loaded_when_its_op_is_asked_for_and_not_before(package):
    assert make_op("cast", ("bf16",)) is not None
    assert "brings_ops" not in sys.modules
    assert str(make_op("halve")) == "halve"
    assert "brings_ops_more" not in sys.modules
    assert str(make_op("third")) == "third"
    assert {"halve", "third"} <= set(op_names())


def test_a_broken_entry_point_is_named_only_when_an_op_is_not_found(package):
    with pytest.raises(OpError, match=r"no op is called 'fourth'.*the entry point broken = 'brings_nothing' failed"):
        make_op("fourth")


WITHOUT_OPS = """
import sys
import numpy as np
import ckptsurgery as cs
from ckptsurgery.ops import Op, OpError, op

cs.plan({"a": np.ones(2, np.float32)}, ["a -> b"])
assert "ckptsurgery.ops.blending" not in sys.modules

class Cast(Op):
    name = "cast"

try:
    op(Cast)
except OpError as error:
    print(error)
"""


def test_a_plan_without_ops_imports_none_and_an_op_of_ones_own_still_meets_the_built_in_ones() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPS], capture_output=True, text=True, check=True)
    assert "an op is called 'cast' already" in done.stdout
