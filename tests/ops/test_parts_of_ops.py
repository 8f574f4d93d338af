"""Ops that work on runs of rows: the parts make what the whole makes, and a plan is run in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.ops import make_op
from ckptsurgery.ops.quantised.gguf_blocks import GgufDequant
from ckptsurgery.planning.row_parts import row_parts_of
from ckptsurgery.specs import DTYPES, TensorSpec

FILES = sorted(path.name[: -len(".xz")] for path in (Path(__file__).parents[1] / "data" / "quantised").glob("*.xz"))
WHOLE = {"awq", "gptq_3", "gptq_4", "gptq_4_by_activation", "gptq_8", "mxfp4_experts", "to_fp8_tensor"}
"""Cases whose results are columns of their sources, or whose op needs the whole tensor."""


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def sliced(tensor, run):
    flat = tensor.contiguous().reshape(-1)[run.start : run.start + run.spec.numel]
    return flat.view(run.spec.shape)


@pytest.mark.parametrize("limit", [1, 1000, 1 << 30])
@pytest.mark.parametrize("file", FILES)
def test_parts_make_every_bit_of_the_whole(file, limit, quantised):
    with cs.open(quantised / file) as checkpoint:
        plan = cs.plan(checkpoint, cs.Recipe([checkpoint.metadata["rule"]], drop=["expected"]))
        (step,) = plan.steps
        tensors = [checkpoint[key].load() for key in step.sources]
        expected = raw(checkpoint["expected"].load())
    rows = row_parts_of(step.program)
    assert (rows is None) == (file.partition(".")[0] in WHOLE)
    if rows is None:
        return
    made = [torch.zeros(spec.nbytes, dtype=torch.uint8) for spec in step.program.outputs]
    for part in rows.parts(limit):
        found = part.op.run(tuple(sliced(tensors[n], run) for n, run in zip(rows.order, part.sources)))
        assert part.op.infer(tuple(run.spec for run in part.sources)) == tuple(run.spec for run in part.results)
        for target, result, run in zip(made, found, part.results):
            start = run.start * DTYPES[run.spec.dtype].itemsize
            assert not target[start : start + run.spec.nbytes].any()
            target[start : start + run.spec.nbytes] = raw(result)
    assert torch.equal(torch.cat(made), expected)


def test_a_file_is_dequantised_in_bounded_memory_and_checked(tmp_path):
    blocks = torch.randint(0, 255, (512, 34 * 64), dtype=torch.uint8)
    blocks.view(512, 64, 34)[..., 1] = 0x2C  # scales that are not large
    cs.save({"w": blocks}, tmp_path / "x.safetensors")
    plan = cs.plan(tmp_path / "x.safetensors", "w -> v | gguf_dequant(Q8_0, dtype=bf16) | cast(f32)")
    assert plan.cost.least_memory < 8 << 20 < plan.specs["v"].nbytes * 3
    plan.save(tmp_path / "y.safetensors", check=True)
    (expected,) = make_op("gguf_dequant", ("Q8_0", "bf16")).run((blocks,))
    with cs.open(tmp_path / "y.safetensors") as made:
        assert torch.equal(made["v"].load(), expected.float())


def test_rows_of_several_matrices_have_their_own_scales(tmp_path):
    weight = torch.randn(3, 4, 6).to(torch.float8_e4m3fn)
    for shape in [(3, 1, 1), (3, 4, 1), (3, 2, 3), (3, 4, 2)]:
        scale = torch.rand(shape) + 0.1
        op = make_op("fp8_dequant", (), {"dtype": "f32"})
        specs = TensorSpec((3, 4, 6), "F8_E4M3"), TensorSpec(shape, "F32")
        made = [
            part.op.run(tuple(sliced(t, run) for t, run in zip((weight, scale), part.sources)))[0].reshape(-1)
            for part in op.parts(specs, 1)
        ]
        assert torch.equal(torch.cat(made), op.run((weight, scale))[0].reshape(-1))


def test_a_value_past_the_range_is_an_error_of_the_whole_tensor(tmp_path):
    weight = torch.full((4, 4), 448.0).to(torch.float8_e4m3fn)
    cs.save({"w": weight, "s": torch.full((4, 1), 1e3)}, tmp_path / "x.safetensors")
    with pytest.raises(cs.CheckpointError, match=r"op-failed.*16 of 16 values lie outside the range of F16"):
        cs.plan(tmp_path / "x.safetensors", "w, s -> y | fp8_dequant(dtype=f16)").save(tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tensors_in_memory_are_left_as_they_are(dtype, monkeypatch):
    blocks = torch.randint(0, 255, (4096, 34 * 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks.view(4096, 16, 34)[..., 1] = 0x2C
    op = make_op("gguf_dequant", ("Q8_0", dtype))
    (expected,) = op.run((blocks,))
    before, rows, run_into = blocks.clone(), list[int](), GgufDequant.run_into

    def counted(self, tensors, rooms):
        rows.append(tensors[0].shape[0])
        return run_into(self, tensors, rooms)

    monkeypatch.setattr(GgufDequant, "run_into", counted)
    for source in (blocks, blocks.t().contiguous().t()):  # the second is not one run of memory
        rows.clear()
        made = cs.plan({"w": source}, f"w -> v | {op}").state_dict()["v"]
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
        assert torch.equal(source, before)
        assert rows == [4096]  # whole: parts of what is in memory took twice the time
    model = torch.nn.Linear(512, 4096, bias=False, dtype=expected.dtype)
    where = model.weight.data_ptr()
    cs.load_into(model, {"w": blocks}, cs.Recipe([f"w -> weight | {op}"]))
    assert model.weight.data_ptr() == where
    assert torch.equal(model.weight, expected)
