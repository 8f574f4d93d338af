"""What each process of the benchmark does: `python jobs.py NAME ARGUMENT...`; peers are the usual ways to do the same.

Jobs that write take "no sync" as a last argument, and then do not wait for the disk. Every job prints one line of JSON
with what only the process itself knows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

RENAME = {
    "rules": [
        "model.layers.{i}.{r...} -> transformer.h.{i}.{r...}",
        "model.{m:embed_tokens,norm}.weight -> transformer.{m}.weight",
    ],
    "drop": ["lm_head.weight"],
}
FUSE = [
    "model.layers.{i}.self_attn.{p:q,k,v}_proj.weight [rows:p d] -> h.{i}.qkv.weight [d (p rows:p)]",
    "model.layers.{i}.mlp.{p:gate,up,down}_proj.weight [o i] -> h.{i}.{p}.weight [i o]",
]
STACK = [
    "model.layers.{i}.mlp.experts.{e}.{p:gate,up}_proj.weight [f d] -> layers.{i}.gate_up_proj [e (p f) d]",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight [d f] -> layers.{i}.down_proj [e d f]",
]
TURN = ["model.layers.{i}.mlp.experts.{e}.{p}.weight [o d] -> layers.{i}.{p} [e d o]"]
FORTY = [
    *(
        f"model.layers.{{i}}.mlp.experts.{{e}}.{a}_proj.weight -> l.{{i}}.e.{{e}}.{b}.weight"
        for a, b in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
    *(f"? model.layers.{{i}}.block{n}.{{r...}} -> l.{{i}}.b{n}.{{r...}}" for n in range(37)),
]  # fmt: skip


def anonymous() -> int:
    """Memory of this process now that is no page of a file, in bytes; page-locked memory may count as shared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def cp_and_sync(source: str, target: str) -> dict[str, object]:
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in Path(target).iterdir() if Path(target).is_dir() else [Path(target)]:
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return {}


def ours_rename(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, cs.Recipe(**RENAME)).save(target, max_shard_size="2GB", overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def peer_rename(source: str, target: str) -> dict[str, object]:
    from safetensors.torch import load_file, save_file

    Path(target).mkdir(exist_ok=True)
    for path in sorted(Path(source).glob("*.safetensors")):
        tensors = load_file(path)
        tensors.pop("lm_head.weight", None)
        save_file(
            {k.replace("model.layers.", "transformer.h."): v for k, v in tensors.items()}, Path(target) / path.name
        )
    return {}


def ours_many(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, FORTY[:3]).save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def ours_share(source: str, target: str) -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, "layers.{i}.weight -> l.{i}.weight").save(target, overwrite=True)
    return {"torch": "torch" in sys.modules}


def ours_zip(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, "{k...} -> model.{k...}").save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def peer_zip(source: str, target: str) -> dict[str, object]:
    import torch
    from safetensors.torch import save_file

    save_file({f"model.{k}": v.contiguous() for k, v in torch.load(source, mmap=True).items()}, target)
    return {}


def ours_rearrange(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, cs.Recipe(FUSE, rest="keep")).save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def peer_rearrange(source: str, target: str) -> dict[str, object]:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        tensors.update(load_file(path))
    for i in range(sum(k.endswith("q_proj.weight") for k in tensors)):
        parts = [tensors.pop(f"model.layers.{i}.self_attn.{p}_proj.weight") for p in "qkv"]
        tensors[f"h.{i}.qkv.weight"] = torch.cat(parts).T.contiguous()
        for p in ("gate", "up", "down"):
            tensors[f"h.{i}.{p}.weight"] = tensors.pop(f"model.layers.{i}.mlp.{p}_proj.weight").T.contiguous()
    Path(target).mkdir(exist_ok=True)
    save_file(tensors, Path(target) / "model.safetensors")
    return {}


def ours_stack(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, STACK).save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def ours_turn(source: str, target: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, TURN).save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def ours_cast(source: str, target: str, dtype: str, sync: str = "sync") -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan(source, f"{{k...}} -> {{k...}} | cast({dtype})").save(target, overwrite=True, sync=sync == "sync")
    return {"torch": "torch" in sys.modules}


def peer_cast(source: str, target: str, dtype: str) -> dict[str, object]:
    import torch
    from safetensors.torch import load_file, save_file

    wanted = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    paths = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else [Path(source)]
    Path(target).mkdir(exist_ok=True)
    for path in paths:
        save_file({k: v.to(wanted) for k, v in load_file(path).items()}, Path(target) / path.name)
    return {}


def ours_plan(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    cs.plan  # noqa: B018 - imports before the clock starts, as for the peer
    start = time.perf_counter()
    plan = cs.plan(source, FORTY)
    return {"seconds": time.perf_counter() - start, "steps": len(plan.steps), "torch": "torch" in sys.modules}


def ours_plan_million(keys: str) -> dict[str, object]:
    import ckptsurgery as cs
    from ckptsurgery.catalog import load_recipe
    from ckptsurgery.planning.planner import make_plan

    spec = cs.TensorSpec((64, 128), "BF16")
    specs = {
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight": spec
        for i in range(int(keys) // 1536 + 1) for e in range(512) for p in ("gate", "up", "down")
    }  # fmt: skip
    start = time.perf_counter()
    plan = make_plan(specs, cs.Recipe(FORTY), load_recipe)
    return {"seconds": time.perf_counter() - start, "steps": len(plan.steps)}


def peer_plan(source: str) -> dict[str, object]:
    import re

    from safetensors import safe_open

    start = time.perf_counter()
    keys = []
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            keys += list(file.keys())
    rules = [
        (re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(\d+)\." + p), r"l.\1.e.\2." + p)
        for p in ("gate", "up", "down")
    ]
    rules += [(re.compile(rf"^model\.layers\.(\d+)\.block{n}\."), rf"l.\1.b{n}.") for n in range(37)]
    for pattern, replacement in rules:
        keys = [pattern.sub(replacement, key) for key in keys]
    return {"seconds": time.perf_counter() - start}


def peer_inspect(source: str) -> dict[str, object]:
    from safetensors import safe_open

    total = 0
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            total += sum(len(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    return {"dims": total}


def meta_model(source: str):  # type: ignore[no-untyped-def]
    """A model of the source's shapes on the meta device, without any library's model code."""
    import torch

    import ckptsurgery as cs

    root = torch.nn.Module()
    for key, spec in cs.open(source).specs.items():
        *path, leaf = key.split(".")
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module._modules[name]
        module.register_parameter(
            leaf, torch.nn.Parameter(torch.empty(spec.shape, dtype=torch.bfloat16, device="meta"))
        )
    return root


def ours_meta(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    model = meta_model(source)
    cs.load_into  # noqa: B018 - imports before the clock starts, as for the peers
    before, start = anonymous(), time.perf_counter()
    cs.load_into(model, source, assign=True)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def peer_meta(source: str) -> dict[str, object]:
    from safetensors.torch import load_file

    model = meta_model(source)
    before, start = anonymous(), time.perf_counter()
    tensors = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        tensors.update(load_file(path))
    model.load_state_dict(tensors, assign=True)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def peer_from_pretrained(source: str) -> dict[str, object]:
    from transformers import LlamaForCausalLM

    before, start = anonymous(), time.perf_counter()
    LlamaForCausalLM.from_pretrained(source)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def ours_copy(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    model = meta_model(source).to_empty(device="cpu")
    touch(model)
    cs.load_into  # noqa: B018 - imports before the clock starts, as for the peers
    before, start = anonymous(), time.perf_counter()
    cs.load_into(model, source)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def peer_copy(source: str) -> dict[str, object]:
    from safetensors.torch import load_file

    model = meta_model(source).to_empty(device="cpu")
    touch(model)
    before, start = anonymous(), time.perf_counter()
    for path in sorted(Path(source).glob("*.safetensors")):
        model.load_state_dict(load_file(path), strict=False)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def touch(model) -> None:  # type: ignore[no-untyped-def]
    """Make the model's memory real before the clock starts."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def on_device(work: Callable[[str], object]) -> dict[str, object]:
    """Time until the accelerator has all that `work` gives it, and the most memory that the host held for it."""
    import torch

    device = str(torch.accelerator.current_accelerator())
    torch.empty(1, device=device)  # a device takes a while to start
    torch.accelerator.synchronize()
    before, seen, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen.append(anonymous() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        start = time.perf_counter()
        kept = work(device)
        torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
    finally:
        over.set()
        watching.join()
    del kept
    return {"seconds": seconds, "anonymous": max(seen)}


def ours_device(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    model = meta_model(source)
    cs.load_into  # noqa: B018 - imports before the clock starts, as for the peers
    return on_device(lambda device: cs.load_into(model, source, assign=True, device=device))


def peer_device(source: str) -> dict[str, object]:
    from safetensors.torch import load_file

    model = meta_model(source)

    def load(device: str) -> object:
        tensors = {}
        for path in sorted(Path(source).glob("*.safetensors")):
            tensors.update(load_file(path, device=device))
        return model.load_state_dict(tensors, assign=True)

    return on_device(load)


def pinned_device(source: str) -> dict[str, object]:
    """As many bytes from page-locked memory, which nothing has to fill: the rate of the way itself."""
    import torch

    total = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    block = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    block.zero_()
    there = torch.empty(total, dtype=torch.uint8, device=str(torch.accelerator.current_accelerator()))

    def copy(device: str) -> object:
        for at in range(0, total, len(block)):
            part = there[at : at + len(block)]
            part.copy_(block[: len(part)], non_blocking=True)
        return there

    return on_device(copy)


def ours_partial(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    with cs.open(source) as checkpoint:
        keys = list(checkpoint)
        start, wanted, read = time.perf_counter(), int(0.01 * checkpoint.nbytes), 0
        before = bytes_read()
        for key in keys[5:]:
            if read + checkpoint[key].nbytes > wanted:
                continue
            checkpoint.read(key)
            read += checkpoint[key].nbytes
        return {"seconds": time.perf_counter() - start, "wanted": read, "read": bytes_read() - before}


def bytes_read() -> int:
    """Bytes that this process asked the system to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def peer_mergekit(source: str, target: str) -> dict[str, object]:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    layers = json.loads(Path(source, "config.json").read_text())["num_hidden_layers"]
    slices = [{"sources": [{"model": source, "layer_range": [0, layers]}]}]
    config = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(yaml.dump(config))), target, options)
    return {}


def peer_accelerate_meta(source: str) -> dict[str, object]:
    from accelerate import load_checkpoint_in_model

    model = meta_model(source)
    before, start = anonymous(), time.perf_counter()
    load_checkpoint_in_model(model, source, device_map={"": "cpu"})
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def peer_accelerate_copy(source: str) -> dict[str, object]:
    from accelerate import load_checkpoint_in_model

    model = meta_model(source).to_empty(device="cpu")
    touch(model)
    before, start = anonymous(), time.perf_counter()
    load_checkpoint_in_model(model, source)
    return {"seconds": time.perf_counter() - start, "anonymous": anonymous() - before}


def ours_in_place(source: str) -> dict[str, object]:
    import ckptsurgery as cs

    start = time.perf_counter()
    cs.plan(source, "layers.{i}.weight -> l.{i}.weight").save(source, in_place=True)
    seconds = time.perf_counter() - start
    from ckptsurgery.storage.output.header_swap import restore_header

    restore_header(source)
    return {"seconds": seconds, "torch": "torch" in sys.modules}


def clean(path: str) -> None:
    """Remove an output between runs."""
    if Path(path).is_dir():
        shutil.rmtree(path)
    elif Path(path).exists():
        Path(path).unlink()


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
