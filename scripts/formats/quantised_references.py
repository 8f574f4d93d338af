"""Compare the ops on quantised weights with the libraries that made the formats: bit for bit, and by time and memory.

Run it in an environment that has the libraries (CPU builds do):

    pip install --no-deps compressed-tensors==0.20.1 bitsandbytes==0.50.2 gguf==0.19.0 loguru psutil
    OMP_NUM_THREADS=1 python scripts/formats/quantised_references.py --rows 4096 --columns 4096
    python scripts/formats/quantised_references.py --write      # the small files that the tests read

GPTQ and AWQ are compared with their published formulas (gptqmodel's `dequantize_weight`, AutoAWQ's `dequantize_gemm`),
written out here, since their packages want a GPU to be built.
"""

from __future__ import annotations

import argparse
import lzma
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ckptsurgery as cs

HERE = Path(__file__).parents[2] / "tests" / "data" / "quantised"


class Case(NamedTuple):
    """Tensors as a checkpoint holds them, the rule that dequantises them, and the library's own way."""

    tensors: dict[str, Tensor]
    rule: str
    reference: Callable[[], Tensor]


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def fp8(rows: int, columns: int, block: list[int] | None, scale: torch.dtype) -> Case:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(1)
    height, width = block or (rows, columns)
    shape = -(-rows // height), -(-columns // width)
    tensors = {
        "w": (weight(rows, columns).float() * 1000).to(torch.float8_e4m3fn),
        "s": (torch.rand(shape, generator=generator) * 1e-3 + 1e-4).to(scale),
    }

    def reference() -> Tensor:
        return Fp8Dequantize(None)._dequantize_one(tensors["w"], tensors["s"], torch.bfloat16)

    return Case(tensors, "w, s -> y | fp8_dequant", reference)


def compressed(rows: int, columns: int, rule: str, **arguments: object) -> Case:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**arguments)
    active = None
    if args.num_bits == 8 and args.group_size is None:
        active = QuantizationArgs(num_bits=8, type=args.type, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=active)
    values = weight(rows, columns)
    groups = values.unflatten(1, (-1, args.group_size or columns))
    whole = torch.tensor([448 * 6 / values.abs().max().item()]) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole)
    state = {"weight": values, "weight_scale": scale.to(torch.bfloat16)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.round().to(torch.int8)
    if whole is not None:
        state["weight_global_scale"] = whole
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    packed = compressor.compress(state, scheme)

    def reference() -> Tensor:
        return compressor.decompress(dict(packed), scheme)["weight"]

    return Case({k: v.contiguous() for k, v in packed.items()}, rule, reference)


def mxfp4_experts(rows: int, columns: int) -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (2, rows // 2, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    rule = "b [e r c], s | mxfp4_dequant -> y [e c r]"
    return Case({"b": blocks, "s": scales}, rule, lambda: convert_moe_packed_tensors(blocks, scales))


def nf4(rows: int, columns: int, nested: bool, kind: str = "nf4") -> Case:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight(rows, columns), quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {"w": packed, **state.as_dict(packed=True)}
    more = ", nested_absmax, nested_quant_map" if nested else ""
    rule = f"w, absmax, quant_map{more}, quant_state.bitsandbytes__{kind} -> y | nf4_dequant"
    return Case(tensors, rule, lambda: bnb.dequantize_4bit(packed, state))


def bnb_int8(rows: int, columns: int) -> Case:
    import bitsandbytes.functional as bnb

    packed, scales, _ = bnb.int8_vectorwise_quant(weight(rows, columns, torch.float16))
    rule = "w, SCB -> y | int8_dequant(absmax=true)"
    return Case({"w": packed, "SCB": scales}, rule, lambda: bnb.int8_vectorwise_dequant(packed, scales).half())


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, columns] packed along the first axis without gaps, lowest bits first, by arithmetic on Python's way."""
    n, columns = codes.shape
    count = n * bits // 32
    result = torch.zeros(count + 1, columns, dtype=torch.int64)
    for i in range(n):
        word, shift = divmod(i * bits, 32)
        shifted = codes[i].long() << shift
        result[word] |= shifted & 0xFFFFFFFF
        result[word + 1] |= shifted >> 32
    return (result[:count] & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def gptq(rows: int, columns: int, bits: int, shuffled: bool) -> Case:
    generator = torch.Generator().manual_seed(3)
    group = min(128, columns)
    groups = columns // group
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 1 << bits, (groups, rows), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, rows, generator=generator) * 1e-2 + 1e-3).half()
    g_idx = torch.arange(columns, dtype=torch.int32) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    tensors = {"qweight": words(codes, bits), "qzeros": words((zeros - 1).t(), bits).t().contiguous()}
    tensors |= {"scales": scales, "g_idx": g_idx}

    def reference() -> Tensor:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        if bits == 3:  # gptqmodel puts such words together in three parts; the codes are those that were packed
            q, z = codes.to(torch.int8), zeros.to(torch.int8)
        else:
            mask = (1 << bits) - 1
            q = ((tensors["qweight"][:, None, :].expand(-1, 32 // bits, -1) >> shifts[:, None]) & mask).to(torch.int16)
            z = ((tensors["qzeros"][:, :, None].expand(-1, -1, 32 // bits) >> shifts) & mask).to(torch.int16) + 1
            q, z = q.reshape(columns, rows), z.reshape(groups, rows)
        return (scales[g_idx.long()] * (q - z[g_idx.long()])).t().contiguous()

    return Case(tensors, "qweight, qzeros, scales, g_idx -> y | gptq_dequant", reference)


def awq(rows: int, columns: int) -> Case:
    generator = torch.Generator().manual_seed(4)
    group = min(128, columns)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    codes = torch.randint(0, 16, (columns, rows), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (columns // group, rows), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(columns // group, rows, generator=generator) * 1e-2 + 1e-3).half()

    def packed(codes: Tensor) -> Tensor:
        ordered = codes.view(codes.shape[0], -1, 8)[:, :, order].reshape(codes.shape)
        return words(ordered.t(), 4).t().contiguous()

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}

    def reference() -> Tensor:
        shifts = torch.arange(0, 32, 4)
        back = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

        def unpacked(part: Tensor) -> Tensor:
            codes = (part[:, :, None] >> shifts).to(torch.int8).view(part.shape[0], -1)
            places = torch.arange(codes.shape[-1]).view(-1, 8)[:, back].view(-1)
            return codes[:, places] & 15

        q, z = unpacked(tensors["qweight"]), unpacked(tensors["qzeros"])
        return ((q - z.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).t().contiguous()

    return Case(tensors, "qweight, qzeros, scales -> y | awq_dequant", reference)


def gguf_blocks(rows: int, columns: int, kind: str) -> Case:
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    rng = numpy.random.default_rng(5)
    blocks = rng.integers(0, 256, (rows, columns // elements, nbytes), dtype=numpy.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()}
    halves |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
    for at in halves.get(kind, (0,)):  # random bytes there would be infinities too
        blocks[..., at : at + 2] = (rng.random(blocks.shape[:2]) * 0.01).astype("f2")[..., None].view("u1")
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(0, 140, blocks.shape[:2])
    raw = blocks.reshape(rows, -1)
    rule = f"w -> y | gguf_dequant({kind})"
    tensors = {"w": torch.from_numpy(raw)}
    return Case(tensors, rule, lambda: torch.from_numpy(gguf.dequantize(raw, number)))


def quantised(rows: int, columns: int, rule: str, reference: Callable[[Tensor], Tensor]) -> Case:
    values = weight(rows, columns)
    values[0] = 0
    return Case({"w": values}, rule, lambda: reference(values))


def by_transformers(values: Tensor, block: int) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    class Quantiser:
        quantization_config = FineGrainedFP8Config(weight_block_size=(block, block))

    made = Fp8Quantize(Quantiser())._quantize_one("m.weight", values)
    return torch.cat(
        [made["m.weight"].view(torch.uint8).reshape(-1), made["m.weight_scale_inv"].view(torch.uint8).view(-1)]
    )


def by_compressed_tensors(values: Tensor, strategy: str, type: str) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type=type, strategy=strategy, symmetric=True)
    if strategy == "channel":
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    else:
        low, high = values.min().view(1), values.max().view(1)
    scale, _ = calculate_qparams(low, high, args)
    q = quantize(values, scale, None, args, dtype=args.pytorch_dtype())
    return torch.cat([q.view(torch.uint8).reshape(-1), scale.view(torch.uint8).view(-1)])


def by_gguf(values: Tensor) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.quantize(values.float().numpy(), gguf.GGMLQuantizationType.Q8_0)).view(-1)


PACKED = "weight_packed, weight_scale"
GGUF = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
)
CASES: dict[str, Callable[[int, int], Case]] = {
    "fp8_block": lambda r, c: fp8(r, c, [128, 128], torch.float32),
    "fp8_channel": lambda r, c: fp8(r, c, [1, c], torch.bfloat16),
    "fp8_tensor": lambda r, c: fp8(r, c, None, torch.float32),
    "fp8_compressed": lambda r, c: compressed(
        r, c, "weight, weight_scale -> y | fp8_dequant", num_bits=8, type="float", strategy="channel"
    ),
    "int8_compressed": lambda r, c: compressed(
        r, c, "weight, weight_scale -> y | int8_dequant", num_bits=8, type="int", strategy="channel"
    ),
    "int8_group_asymmetric": lambda r, c: compressed(
        r, c, f"{PACKED}, weight_zero_point, weight_shape -> y | packed_dequant",
        num_bits=8, type="int", strategy="group", group_size=32, symmetric=False,
    ),
    "packed_4": lambda r, c: compressed(
        r, c, f"{PACKED}, weight_shape -> y | packed_dequant", num_bits=4, type="int", strategy="group", group_size=128
    ),
    "packed_4_asymmetric": lambda r, c: compressed(
        r, c, f"{PACKED}, weight_zero_point, weight_shape -> y | packed_dequant",
        num_bits=4, type="int", strategy="group", group_size=32, symmetric=False,
    ),
    "packed_3_channel": lambda r, c: compressed(
        r, c, f"{PACKED}, weight_shape -> y | packed_dequant", num_bits=3, type="int", strategy="channel"
    ),
    "nvfp4": lambda r, c: compressed(
        r, c, f"{PACKED}, weight_global_scale -> y | nvfp4_dequant",
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn",
    ),
    "mxfp4_compressed": lambda r, c: compressed(
        r, c, f"{PACKED} -> y | mxfp4_dequant",
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8",
    ),
    "mxfp4_experts": mxfp4_experts,
    "nf4": lambda r, c: nf4(r, c, False),
    "nf4_nested": lambda r, c: nf4(r, c, True),
    "fp4_nested": lambda r, c: nf4(r, c, True, "fp4"),
    "bnb_int8": bnb_int8,
    "gptq_4": lambda r, c: gptq(r, c, 4, False),
    "gptq_4_by_activation": lambda r, c: gptq(r, c, 4, True),
    "gptq_8": lambda r, c: gptq(r, c, 8, False),
    "gptq_3": lambda r, c: gptq(r, c, 3, False),
    "awq": awq,
    **{f"gguf_{kind.lower()}": lambda r, c, kind=kind: gguf_blocks(r, c, kind) for kind in (*GGUF, "MXFP4")},
    "to_fp8_block": lambda r, c: quantised(
        r, c, "w -> y, z | fp8_quant(block=128)", lambda w: by_transformers(w, 128)
    ),
    "to_fp8_channel": lambda r, c: quantised(
        r, c, "w -> y, z | fp8_quant(per=channel)", lambda w: by_compressed_tensors(w, "channel", "float")
    ),
    "to_fp8_tensor": lambda r, c: quantised(
        r, c, "w -> y, z | fp8_quant(per=tensor)", lambda w: by_compressed_tensors(w, "tensor", "float")
    ),
    "to_int8_channel": lambda r, c: quantised(
        r, c, "w -> y, z | int8_quant", lambda w: by_compressed_tensors(w, "channel", "int")
    ),
    "to_q8_0": lambda r, c: quantised(r, c, "w -> y | gguf_quant", by_gguf),
}  # fmt: skip


def made(case: Case) -> Tensor:
    """What the op makes: one tensor, or the bytes of two, one after another."""
    results = list(cs.plan(case.tensors, case.rule).state_dict().values())
    if len(results) == 1:
        return results[0] if results[0].dtype != torch.uint8 else results[0].view(-1)
    return torch.cat([result.contiguous().view(torch.uint8).reshape(-1) for result in results])


def peak() -> int:
    """The process's largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(work: Callable[[], Tensor]) -> tuple[float, int]:
    """The best of three times, and how far the peak of memory rose."""
    times, before = [], peak()
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times), peak() - before


def compare(name: str, rows: int, columns: int) -> None:
    """Print one line: whether all bits are equal, and time and memory beside the reference's."""
    torch.set_num_threads(1)
    case = CASES[name](rows, columns)
    small = CASES[name](256, 256)
    made(small), small.reference()  # imports and tables
    ours, our_memory = timed(lambda: made(case))
    theirs, their_memory = timed(case.reference)
    expected, result = case.reference(), made(case)
    equal = expected.dtype == result.dtype and torch.equal(expected.view(torch.uint8), result.view(torch.uint8))
    print(
        f"{name:22} {'equal' if equal else 'DIFFERS'}  {ours * 1e3:8.1f} ms  {theirs * 1e3:8.1f} ms"
        f"  x{theirs / ours:5.1f}  {our_memory >> 20:5} MiB  {their_memory >> 20:5} MiB more",
        flush=True,
    )


def write() -> None:
    """Write the small files of the tests: the tensors, what the library makes of them, and the rule."""
    from safetensors.torch import save

    HERE.mkdir(exist_ok=True)
    for name, build in CASES.items():
        case = build(256 if "block" in name else 32, 256)
        expected = case.reference()
        data = save({**case.tensors, "expected": expected}, {"rule": case.rule})
        (HERE / f"{name}.safetensors.xz").write_bytes(lzma.compress(data, preset=9))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the files of the tests")
    parser.add_argument("--only", action="append", help="cases to compare; all of them where left out")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    given = parser.parse_args()
    if given.write:
        write()
    elif given.only and len(given.only) == 1:
        compare(given.only[0], given.rows, given.columns)
    else:  # a process each, as the peak of memory never falls
        print(f"{'case':30}  ours, the reference's, times faster; memory of ours, of the reference beyond that")
        for name in given.only or CASES:
            size = [f"--rows={given.rows}", f"--columns={given.columns}"]
            subprocess.run([sys.executable, __file__, "--only", name, *size], check=True)
