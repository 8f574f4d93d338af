"""Time sharded loading, conversion and exchange beside torch's own ways, in the same run.

Run: python scripts/bench/sharded.py             a model of 67 MB, a minute or two
     python scripts/bench/sharded.py --full      one of 537 MB, for the table in the documentation
     python scripts/bench/sharded.py reshard     one case alone

Each case starts fresh processes of one gloo group for each contender. The call is made twice: the seconds of the first
hold the import of what it needs, and those of the second do not. Reported are the slowest rank's seconds, the largest
rank's anonymous memory above what it had before, and the bytes that all ranks read by system calls, of the second call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

FUSE = [
    "layers.{i}.{p:q,k,v}.weight [o d] -> layers.{i}.qkv.weight [(p o) d]",
    "layers.{i}.{p:gate,up}.weight [o d] -> layers.{i}.gate_up.weight [(p o) d]",
    "layers.{i}.{m:o,down}.weight -> layers.{i}.{m}.weight",
]


def separate(hidden: int, layers: int) -> Any:
    """A model with its projections apart, under the names of the checkpoint."""
    from torch import nn

    wide = 4 * hidden
    sizes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden)}
    sizes |= {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
    return _stacked(nn, sizes, layers)


def fused(hidden: int, layers: int) -> Any:
    """The same model with fused projections."""
    from torch import nn

    wide = 4 * hidden
    sizes = {"qkv": (hidden, 3 * hidden), "o": (hidden, hidden), "gate_up": (hidden, 2 * wide), "down": (wide, hidden)}
    return _stacked(nn, sizes, layers)


def _stacked(nn: Any, sizes: dict[str, tuple[int, int]], layers: int) -> Any:
    class Part(nn.Module):  # type: ignore[misc]
        """What FSDP2 takes: a module with a forward pass."""

        def forward(self, x: Any) -> Any:
            return x

    model = Part()
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = Part()
        for name, size in sizes.items():
            layer.add_module(name, nn.Linear(*size, bias=False))
        model.layers.append(layer)
    return model


def fsdp(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def parallel(model: Any) -> Any:
    """Tensor parallel: rows of what comes first in a block, columns of what comes last."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        ways = {
            name: RowwiseParallel() if name in ("o", "down") else ColwiseParallel()
            for name, _ in layer.named_children()
        }
        parallelize_module(layer, mesh, ways)
    return model


Job = Callable[[Path, int, int], Callable[[], Any]]
"""Prepares a rank's part from (folder, hidden size, layers), and returns what is timed."""


def ours_load(make: Callable[[int, int], Any], shard: Callable[[Any], Any], source: str, rules: Any = None) -> Job:
    def job(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
        import ckptsurgery as cs

        model = shard(make(hidden, layers))
        return lambda: cs.load_into(model, folder / source, rules)

    return job


def dcp_load(source: str, huggingface: bool) -> Job:
    def job(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
        import torch.distributed.checkpoint as dcp

        state = fsdp(separate(hidden, layers)).state_dict()
        path = str(folder / source)
        reader = dcp.HuggingFaceStorageReader(path) if huggingface else dcp.FileSystemReader(path)
        return lambda: dcp.load(state, storage_reader=reader)

    return job


def reader_load(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    import torch.distributed.checkpoint as dcp

    import ckptsurgery as cs

    state = fsdp(fused(hidden, layers)).state_dict()
    return lambda: dcp.load(state, storage_reader=cs.StorageReader(folder / "hf", FUSE))


def broadcast(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    """Convert on the first rank, and broadcast from there."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = parallel(fused(hidden, layers))

    def run() -> None:
        state: dict[str, torch.Tensor] = {}
        if dist.get_rank() == 0:
            loaded = load_file(folder / "hf" / "model.safetensors")
            for i in range(layers):
                at = f"layers.{i}."
                state[at + "qkv.weight"] = torch.cat([loaded[f"{at}{p}.weight"] for p in "qkv"])
                state[at + "gate_up.weight"] = torch.cat([loaded[f"{at}{p}.weight"] for p in ("gate", "up")])
                state |= {f"{at}{m}.weight": loaded[f"{at}{m}.weight"] for m in ("o", "down")}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, state, options=options)

    return run


def save_dcp(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    import torch.distributed.checkpoint as dcp

    state = fsdp(separate(hidden, layers)).state_dict()
    return lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp", overwrite=True))


def ours_reshard(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    import ckptsurgery as cs

    trainer, engine = fsdp(separate(hidden, layers)), parallel(fused(hidden, layers))
    sync = cs.reshard(trainer, engine, FUSE)
    sync()
    return sync


def gather(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    """Whole tensors on each rank, joined there, and each rank's part copied."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    trainer, engine = fsdp(separate(hidden, layers)), parallel(fused(hidden, layers))

    def run() -> None:
        with torch.no_grad():
            for held, layer in zip(trainer.layers, engine.layers):
                whole = {name: module.weight.full_tensor() for name, module in held.named_children()}
                joined = {
                    "qkv": torch.cat([whole[p] for p in "qkv"]),
                    "gate_up": torch.cat([whole["gate"], whole["up"]]),
                }
                for name, module in layer.named_children():
                    part = module.weight
                    value = joined[name] if name in joined else whole[name]
                    part.copy_(distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None))

    run()
    return run


def convert_together(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    import torch.distributed as dist

    import ckptsurgery as cs

    out = folder / f"out{dist.get_world_size()}.safetensors"
    return lambda: cs.plan(folder / "hf", FUSE).save(out, together=True, overwrite=True)


def convert_dcp(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    import ckptsurgery as cs

    return lambda: cs.plan(folder / "dcp", FUSE).save(folder / "from_dcp.safetensors", overwrite=True)


def torch_save(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    return lambda: dcp_to_torch_save(folder / "dcp", folder / "whole.pt")


def cp(folder: Path, hidden: int, layers: int) -> Callable[[], Any]:
    def run() -> None:
        shutil.copyfile(folder / "hf" / "model.safetensors", folder / "copy.safetensors")
        descriptor = os.open(folder / "copy.safetensors", os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)

    return run


CASES: dict[str, list[tuple[str, int, Job]]] = {
    "same names, FSDP2": [
        ("load_into", 4, ours_load(separate, fsdp, "hf")),
        ("dcp.load, HF reader", 4, dcp_load("hf", True)),
    ],
    "fused, FSDP2": [
        ("load_into", 4, ours_load(fused, fsdp, "hf", FUSE)),
        ("StorageReader", 4, reader_load),
    ],
    "fused, tensor parallel": [
        ("load_into", 4, ours_load(fused, parallel, "hf", FUSE)),
        ("broadcast_from_rank0", 4, broadcast),
    ],
    "DCP of 2 ranks on 4": [
        ("(dcp.save)", 2, save_dcp),
        ("load_into", 4, ours_load(separate, fsdp, "dcp")),
        ("dcp.load", 4, dcp_load("dcp", False)),
    ],
    "DCP to safetensors, fused": [
        ("(dcp.save)", 2, save_dcp),
        ("plan.save", 1, convert_dcp),
        ("dcp_to_torch_save", 1, torch_save),
        ("cp", 1, cp),
    ],
    "reshard to fused tensor parallel, 2 ranks": [("reshard", 2, ours_reshard), ("full_tensor, cat", 2, gather)],
    "reshard to fused tensor parallel, 4 ranks": [("reshard", 4, ours_reshard), ("full_tensor, cat", 4, gather)],
    "convert together": [("one process", 1, convert_together), ("four ranks", 4, convert_together)],
}


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def rank(case: str, name: str, folder: Path, hidden: int, layers: int) -> None:
    """Do one rank's part and print what was measured."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    me, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["STORE"], size)
    dist.init_process_group("gloo", store=store, rank=me, world_size=size, timeout=timedelta(minutes=3))
    (job,) = [job for label, _, job in CASES[case] if label == name]
    run = job(folder, hidden, layers)
    dist.barrier()
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    read, start = read_bytes(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    memory, read = max(0, most[0] - before), read_bytes() - read
    print(json.dumps({"first": first, "seconds": seconds, "memory": memory, "read": read}), flush=True)
    store.add("over", 1)
    while store.add("over", 0) < size:  # a rank that ends earlier may take what it sent to others with it
        time.sleep(0.01)
    os._exit(0)


def measured(case: str, name: str, size: int, folder: Path, hidden: int, layers: int) -> dict[str, float]:
    """One contender's numbers, over all ranks."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    shared = {**os.environ, "WORLD_SIZE": str(size), "STORE": str(store), "OMP_NUM_THREADS": "1"}
    shared.pop("PYTHONDONTWRITEBYTECODE", None)  # as where a package is installed
    arguments = [sys.executable, __file__, "--rank", case, name, str(folder), str(hidden), str(layers)]
    processes = [
        subprocess.Popen(arguments, env={**shared, "RANK": str(n)}, stdout=subprocess.PIPE, text=True)
        for n in range(size)
    ]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {
        "first": max(one["first"] for one in told),
        "seconds": max(one["seconds"] for one in told),
        "memory": max(one["memory"] for one in told) / 2**20,
        "read": sum(one["read"] for one in told) / 2**20,
    }


def main() -> None:
    if "--rank" in sys.argv:
        case, name, folder, hidden, layers = sys.argv[2:]
        rank(case, name, Path(folder), int(hidden), int(layers))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="a part of the names of the cases to run")
    parser.add_argument("--full", action="store_true", help="the model of 537 MB")
    parser.add_argument("--repeat", type=int, default=3, help="how often each contender runs; the fastest counts")
    asked = parser.parse_args()
    hidden, layers = (1024, 8) if asked.full else (512, 4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        from safetensors.torch import save_file

        (folder / "hf").mkdir()
        save_file(separate(hidden, layers).state_dict(), folder / "hf" / "model.safetensors")
        size = (folder / "hf" / "model.safetensors").stat().st_size
        print(f"checkpoint: {size / 2**20:.0f} MiB")
        for case, contenders in CASES.items():
            if asked.cases and not any(part in case for part in asked.cases):
                continue
            print(f"\n{case}")
            for name, ranks, _ in contenders:
                runs = []
                for _ in range(1 if name.startswith("(") else asked.repeat):
                    if name.startswith("("):
                        shutil.rmtree(folder / "dcp", ignore_errors=True)
                    runs.append(measured(case, name, ranks, folder, hidden, layers))
                best = min(runs, key=lambda one: one["seconds"])
                first = min(one["first"] for one in runs)
                took, held = f"{first:7.2f} s{best['seconds']:7.2f} s", f"{best['memory']:7.0f} MiB a rank"
                print(f"  {name:<24} {took}  {held}  {best['read']:7.0f} MiB read")


if __name__ == "__main__":
    main()
