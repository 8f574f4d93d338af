"""The benchmark's own data: made once in a work folder, of the sizes that people have."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

BLOCK = 1 << 20


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], block: bytes) -> None:
    """One file whose bytes are a block of BLOCK bytes again and again."""
    header, offset = {}, 0
    sizes = {"BF16": 2, "F16": 2, "F32": 4}
    for key, dtype, shape in tensors:
        nbytes = sizes[dtype]
        for n in shape:
            nbytes *= n
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, BLOCK):
            file.write(block[: min(BLOCK, offset - start)])


def values() -> bytes:
    """A block whose 16-bit words have an exponent near zero: finite in bf16, fp16 and fp32."""
    draw, block = random.Random(0), bytearray(BLOCK)
    block[::2] = draw.randbytes(BLOCK // 2)
    block[1::2] = draw.randbytes(BLOCK // 2).translate(bytes(0x3C | (b & 0x83) for b in range(256)))
    return bytes(block)


def llama_like(folder: Path, gigabytes: float, shards: int = 4) -> Path:
    """bf16, decoder-only layers of width 2048 in shards with an index; the last one holds norms and embeddings."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    width, inner, vocabulary = 2048, 5632, 32000
    square = [(p, (width, width)) for p in ("self_attn.q_proj", "self_attn.o_proj")]
    narrow = [(p, (512, width)) for p in ("self_attn.k_proj", "self_attn.v_proj")]
    mlp = [("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)), ("mlp.down_proj", (width, inner))]
    norms = [("input_layernorm", (width,)), ("post_attention_layernorm", (width,))]
    layer = [*square, *narrow, *mlp, *norms]
    size = 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in layer)
    count = max(1, int((gigabytes * 1e9 - 4 * vocabulary * width) / size))
    tensors = [("model.embed_tokens.weight", "BF16", (vocabulary, width))]
    tensors += [(f"model.layers.{i}.{p}.weight", "BF16", shape) for i in range(count) for p, shape in layer]
    tensors += [("model.norm.weight", "BF16", (width,)), ("lm_head.weight", "BF16", (vocabulary, width))]
    config = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": count, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": vocabulary, "tie_word_embeddings": False, "model_type": "llama",
              "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return in_shards(folder, tensors, shards)


def experts_like(folder: Path, count: int = 100_000, shards: int = 20) -> Path:
    """Very many small tensors with the names of a mixture of experts: 16 kB each."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    experts = 512
    layers = round(count / (3 * experts))  # whole layers: every one has all of its experts
    keys = [
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight"
        for i in range(layers) for e in range(experts) for p in ("gate_proj", "up_proj", "down_proj")
    ]  # fmt: skip
    return in_shards(folder, [(k, "BF16", (64, 128)) for k in keys], shards)


def in_shards(folder: Path, tensors: list[tuple[str, str, tuple[int, ...]]], shards: int) -> Path:
    """Tensors dealt out to numbered shards, and their index."""
    weight_map = {}
    per, block = -(-len(tensors) // shards), values()
    for n in range(shards):
        name = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = tensors[n * per : (n + 1) * per]
        write_safetensors(folder / name, part, block)
        weight_map.update({key: name for key, _, _ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def torch_zip(path: Path, gigabytes: float) -> Path:
    """A file of `torch.save`, fp32."""
    if path.exists():
        return path
    import torch

    rows = int(gigabytes * 1e9 / 4 / 2048 / 16)
    torch.save({f"layers.{i}.weight": torch.full((rows, 2048), 0.5 + i / 64) for i in range(16)}, path)
    assert zipfile.is_zipfile(path)
    return path


def single_fp32(path: Path, gigabytes: float) -> Path:
    """One safetensors file, fp32, whose values are near one: exact enough for every format."""
    if path.exists():
        return path
    rows = int(gigabytes * 1e9 / 4 / 2048 / 16)
    tensors = [(f"layers.{i}.weight", "F32", (rows, 2048)) for i in range(16)]
    write_safetensors(path, tensors, b"".join(struct.pack("<f", 0.5 + i / 64) for i in range(16)) * (BLOCK // 64))
    return path


PEERS = ("accelerate", "mergekit", "transformers")


def missing(name: str) -> bool:
    """Whether a peer is not installed."""
    return importlib.util.find_spec(name) is None


@cache
def accelerator() -> bool:
    """Whether torch finds a device to load onto."""
    asked = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", asked], stderr=subprocess.DEVNULL).returncode == 0


def sharing_file(work: Path, source: str) -> tuple[str, str] | None:
    """A copy of a file, and a place for the output, on an XFS in a loop device; None where none can be."""
    image, mount = work / "xfs.img", work / "xfs"
    size = Path(source).stat().st_size
    if os.geteuid() or not shutil.which("mkfs.xfs") or not shutil.which("losetup"):
        return None
    unmount(work)
    mount.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(int(2.5 * size) + (400 << 20))
    commands = (
        ["mkfs.xfs", "-q", "-f", "-m", "reflink=1", str(image)],
        ["mount", "-o", "loop", str(image), str(mount)],
        ["cp", "--reflink=never", source, str(mount / "source.safetensors")],
    )
    if any(subprocess.run(command, capture_output=True).returncode for command in commands):
        unmount(work)
        return None
    return str(mount / "source.safetensors"), str(mount / "out.safetensors")


def unmount(work: Path) -> None:
    """Take the loop device away again."""
    if (work / "xfs").is_mount():
        subprocess.run(["umount", str(work / "xfs")], check=True)
    (work / "xfs.img").unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Free space of a folder's file system."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def make_all(work: Path, small: bool) -> list[str]:
    """All data of the benchmark, in a process of its own: what it takes must not count for those that follow."""
    size = 0.35 if small else 4.0
    paths = [
        llama_like(work / f"llama-{size}", size),
        experts_like(work / f"moe-{small}", 20_000 if small else 100_000),
        torch_zip(work / f"zip-{small}.pt", 0.25 if small else 2.0),
        single_fp32(work / f"plain-{small}.safetensors", 0.25 if small else 2.0),
    ]
    return [str(path) for path in paths]


if __name__ == "__main__":
    print(json.dumps(make_all(Path(sys.argv[1]), sys.argv[2] == "1")))
