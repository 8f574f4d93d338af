"""Merge models beside mergekit, each run in a fresh process, in turns: `python scripts/bench/merging.py`.

--size GB      of each model, bf16 (1)
--runs N       counted runs of each command (median is shown), after one that warms the page cache (1)
--only WORD    cases whose name holds the word
--work DIR     where the data lies (kept between calls)
--peer DIR     a folder that holds mergekit 0.1.5 and what it imports, if the environment lacks it:
               pip install --target DIR mergekit immutables accelerate sentencepiece scipy peft psutil protobuf
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import MIB, NO_SYNC, Case, Found, machine, measure, run, summary

CASES = (("linear", 2), ("linear", 3), ("slerp", 2), ("task_arithmetic", 2), ("task_arithmetic", 3),
         ("ties", 2), ("ties", 3))  # fmt: skip
BARS = {"linear": 0.3, "slerp": 0.3, "task_arithmetic": 0.3, "ties": 0.4}
BESIDE_TORCH = 64 * MIB


def models(root: Path, gigabytes: float) -> None:
    """Three models of a Llama's shapes: a base, and two that differ from it by a tenth."""
    import torch
    from safetensors.torch import save_file

    width, inner, vocabulary = 2048, 5632, 32000 if gigabytes > 0.5 else 4000
    shapes = {f"self_attn.{p}_proj": (n, width) for p, n in (("q", width), ("k", 512), ("v", 512), ("o", width))}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, int((gigabytes * 1e9 - 4 * vocabulary * width) / size))
    keys = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,), "lm_head": (vocabulary, width)}
    keys |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
              "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": vocabulary, "tie_word_embeddings": False,
              "dtype": "bfloat16"}  # fmt: skip
    for number in range(3):
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        base, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(number)
        state = {}
        for key, shape in keys.items():
            tensor = torch.randn(shape, generator=base) * 0.02
            tensor += torch.randn(shape, generator=own) * (0.002 if number else 0)
            state[f"{key}.weight"] = tensor.bfloat16()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    (root / "done").touch()


def ours(method: str, count: int, root: str, out: str, sync: str = "sync") -> None:
    """One merge by ckptsurgery."""
    start = time.perf_counter()
    import ckptsurgery as cs

    names = [f"m{n}" for n in range(count)]
    terms = ", ".join(f"{name}/{{k...}}" for name in names)
    shares, tuned = [1 / count] * count, [0.5] * (count - 1)
    rule = {
        "linear": f"{{m:{','.join(names)}}}/{{k...}} -> {{k...}} | sum_over(m, w={shares})",
        "slerp": f"{terms} -> {{k...}} | slerp(0.3)",
        "task_arithmetic": f"{terms} -> {{k...}} | task_arithmetic(1.0, w={tuned})",
        "ties": f"{terms} -> {{k...}} | ties(0.3, w={tuned})",
    }[method]
    plan = cs.plan(cs.open({f"{name}/": f"{root}/{n}" for n, name in enumerate(names)}), cs.Recipe([rule]))
    plan.save(out, overwrite=True, sync=sync == "sync")
    say(start)


def theirs(method: str, count: int, root: str, out: str) -> None:
    """The same merge by mergekit, in the models' own dtype, which it does not change."""
    start = time.perf_counter()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    first, *others = [f"{root}/{n}" for n in range(count)]
    setting: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        setting["models"] = [{"model": m, "parameters": {"weight": 1 / count}} for m in (first, *others)]
    elif method == "slerp":
        setting |= {"base_model": first, "models": [{"model": m} for m in (first, *others)], "parameters": {"t": 0.3}}
    else:
        density = {"density": 0.3} if method == "ties" else {}
        setting |= {
            "base_model": first,
            "models": [{"model": m, "parameters": {"weight": 0.5, **density}} for m in others],
        }
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, lazy_unpickle=True, quiet=True)
    run_merge(MergeConfiguration.model_validate(setting), out, options)
    say(start)


def say(start: float) -> None:
    """What only the process knows."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_inside": peak}))


def case(method: str, count: int, root: Path, work: Path, peer: str | None, torch: Found) -> Case:
    """One line of the table."""
    out = str(work / "merged")
    arguments = [method, str(count), str(root), out]
    here = [sys.executable, str(Path(__file__).resolve()), "--job"]
    path = os.pathsep.join(filter(None, [peer, os.environ.get("PYTHONPATH")]))
    commands = {
        "ours": [*here, "ours", *arguments],
        NO_SYNC: [*here, "ours", *arguments, "no sync"],
        "mergekit": ["env", f"PYTHONPATH={path}", *here, "theirs", *arguments],
    }
    judge: Callable[[Found], tuple[str, bool]] = lambda found: judged(found, BARS[method], torch)  # noqa: E731
    return Case(f"{method}, {count} models", f"{BARS[method]} x mergekit", commands, judge, (out,))


def judged(found: Found, bar: float, torch: Found) -> tuple[str, bool]:
    """What does not wait for the disk is compared with mergekit, which does not either."""
    mine, other = found[NO_SYNC], found["mergekit"]
    beside = max(found["ours"]["peak"], mine["peak"]) - torch["torch"]["peak"]
    ratio, cpu = mine["wall"] / other["wall"], mine["cpu"] / other["cpu"]
    text = (
        f"{ratio:.2f} x ({cpu:.2f} x its CPU time): {mine['wall']:.1f} s, with sync {found['ours']['wall']:.1f} s, "
        f"mergekit {other['wall']:.1f} s; {beside / MIB:.0f} MiB beside torch, mergekit {other['peak'] / MIB:.0f} MiB"
    )
    return text, ratio <= bar and beside <= BESIDE_TORCH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--peer")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ckptsurgery-bench")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    )
    root = options.work / f"merging-{options.size:g}"
    if not (root / "done").exists():  # in a process of its own: children begin with the memory of their parent
        subprocess.run([sys.executable, __file__, "--job", "models", str(root), str(options.size)], check=True)
    torch: Found = {"torch": summary([run([sys.executable, "-c", "import torch"]) for _ in range(3)])}
    print(f"{machine()}\n\n| case | bar | reached |\n|---|---|---|")
    for method, count in CASES:
        one = case(method, count, root, options.work, options.peer, torch)
        if options.only in one.name:
            figure, reached = one.judge(measure(one, options.runs, 1))
            print(f"| {one.name} | {one.bar} | {'yes' if reached else 'no'}: {figure} |", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        name, first, second, *rest = sys.argv[2:]
        if name == "models":
            models(Path(first), float(second))
        else:
            (ours if name == "ours" else theirs)(first, int(second), *rest)
        sys.exit(0)
    sys.exit(main())
