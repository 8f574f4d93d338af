"""Speed and memory of ckptsurgery beside its peers, in fresh processes, alternating: `python scripts/bench/bench.py`.

--small        a few hundred megabytes instead of 4 GB: about a minute
--runs N       counted runs of each command (median is shown)
--only WORD    cases whose name holds the word
--json FILE    the table as data too
--work DIR     where the data lies (kept between calls); on the file system that is to be measured
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
from jobs import clean

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        name: what is done.
        bar: what must be reached, in words.
        commands: label -> argument list; "ours" and "cp" are known labels, the others are peers.
        outputs: what is removed before each run.
        judge: from the medians of all labels to (figure, reached).
    """

    name: str
    bar: str
    commands: dict[str, list[str]]
    judge: Callable[[dict[str, dict[str, Any]]], tuple[str, bool]]
    outputs: tuple[str, ...] = ()


@dataclass
class Run:
    """What one process took."""

    wall: float
    cpu: float
    peak: int
    said: dict[str, Any] = field(default_factory=dict)


def job(name: str, *arguments: object) -> list[str]:
    """A command that runs one job in a fresh interpreter."""
    return [sys.executable, str(HERE / "jobs.py"), name, *map(str, arguments)]


def run(command: list[str]) -> Run:
    """Run a command and account for it as the operating system does."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        return Run(float("nan"), 0, 0, {"failed": process.returncode})
    said = json.loads(text[-1]) if text and text[-1].startswith("{") else {}
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def measure(case: Case, runs: int) -> dict[str, dict[str, Any]]:
    """Medians for each label, the commands taken in turn."""
    found: dict[str, list[Run]] = {label: [] for label in case.commands}
    for turn in range(runs + 1):
        for label, command in case.commands.items():
            for output in case.outputs:
                clean(output)
            one = run(command)
            if turn:  # the first turn warms the page cache
                found[label].append(one)
    for output in case.outputs:
        clean(output)
    return {label: summary(found[label]) for label in found}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians of one label."""
    numbers: dict[str, Any] = {
        "wall": statistics.median(r.wall for r in runs),
        "cpu": statistics.median(r.cpu for r in runs),
        "peak": statistics.median(r.peak for r in runs),
    }
    for key, value in runs[-1].said.items():
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        numbers[key] = statistics.median(r.said[key] for r in runs if key in r.said) if numeric else value
    return numbers


def against_cp(
    times: float, memory: int, extra: float = 0.0
) -> Callable[[dict[str, dict[str, Any]]], tuple[str, bool]]:
    """A bar in multiples of `cp`, with a limit on peak memory; `extra` seconds are the start of torch."""

    def judge(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
        ours, cp = found["ours"], found["cp"]
        ratio = (ours["wall"] - extra) / cp["wall"]
        free_of_torch = not ours.get("torch", False)
        return f"{ratio:.2f} x cp, {ours['peak'] / 2**20:.0f} MiB", ratio <= times and ours[
            "peak"
        ] <= memory and free_of_torch

    return judge


def seconds(limit: float) -> Callable[[dict[str, dict[str, Any]]], tuple[str, bool]]:
    """A bar in seconds, inside the process where it says so, else of the whole process."""

    def judge(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
        took = found["ours"].get("seconds", found["ours"]["wall"])
        return f"{took:.2f} s", took <= limit

    return judge


def judge_meta(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    ours = found["ours"]
    return f"{ours['seconds']:.2f} s, {ours['anonymous'] / 2**20:.0f} MiB anonymous", ours["seconds"] <= 0.3 and ours[
        "anonymous"
    ] <= 16 << 20


def judge_copy(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    ours, peer = found["ours"], found["load_file + load_state_dict"]
    text = f"{ours['seconds']:.2f} s ({ours['seconds'] / peer['seconds']:.2f} x peer), {ours['anonymous'] / 2**20:.0f} MiB anonymous"
    return text, ours["seconds"] <= 1.1 * peer["seconds"]


def judge_partial(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    ratio = found["ours"]["read"] / max(1, found["ours"]["wanted"])
    return f"reads {ratio:.3f} x the bytes wanted", ratio <= 1.1


def torch_start() -> float:
    """Seconds that `import torch` takes in a fresh process."""
    times = [run([sys.executable, "-c", "import torch"]).wall for _ in range(3)]
    return statistics.median(times)


def cases(work: Path, small: bool) -> list[Case]:
    """The table's lines over data in `work`."""
    made = json.loads(
        subprocess.run(
            [sys.executable, str(HERE / "data.py"), str(work), str(int(small))], check=True, stdout=subprocess.PIPE
        ).stdout
    )
    llama, many, zipped, plain = made
    out, copy = str(work / "out"), str(work / "copy")
    cli = [sys.executable, "-m", "ckptsurgery"]
    torch = torch_start()
    million = "100000" if small else "1000000"
    both = (out, copy, out + ".safetensors", copy + ".pt")
    cp = ["cp", "-r", llama, copy]
    return [
        Case("rename, drop, re-shard", "1.2 x cp, 64 MiB, no torch",
             {"ours": job("ours_rename", llama, out), "cp": cp, "load_file + save_file": job("peer_rename", llama, out)},
             against_cp(1.2, 64 << 20), both),
        Case(f"rename {'20' if small else '100'},000 tensors", "1.2 x cp, 128 MiB, no torch",
             {"ours": job("ours_many", many, out), "cp": ["cp", "-r", many, copy]}, against_cp(1.2, 128 << 20), both),
        Case("torch zip to safetensors", "1.3 x cp, 64 MiB, no torch",
             {"ours": job("ours_zip", zipped, out + ".safetensors"), "cp": ["cp", zipped, copy + ".pt"],
              "torch.load + save_file": job("peer_zip", zipped, out + ".safetensors")}, against_cp(1.3, 64 << 20), both),
        Case("fuse and transpose", "2 x cp + torch's start",
             {"ours": job("ours_rearrange", llama, out), "cp": cp, "load all + torch": job("peer_rearrange", llama, out)},
             against_cp(2.0, 1 << 30, torch), both),
        Case("stack and transpose experts", "2 x cp + torch's start",
             {"ours": job("ours_stack", many, out), "cp": ["cp", "-r", many, copy]}, against_cp(2.0, 1 << 30, torch), both),
        Case("cast bf16 to fp16", "1.5 x cp + torch's start",
             {"ours": job("ours_cast", llama, out, "f16"), "cp": cp, "load_file + to": job("peer_cast", llama, out, "f16")},
             against_cp(1.5, 1 << 30, torch), both),
        Case("cast fp32 to bf16", "1.5 x cp + torch's start",
             {"ours": job("ours_cast", plain, out, "bf16"), "cp": ["cp", plain, copy],
              "load_file + to": job("peer_cast", plain, out, "bf16")}, against_cp(1.5, 1 << 30, torch), both),
        Case("open and plan, 40 rules", "0.5 s", {"ours": job("ours_plan", many), "re.sub a rule": job("peer_plan", many)}, seconds(0.5)),
        Case(f"plan {int(million):,} keys", "6 s", {"ours": job("ours_plan_million", million)}, seconds(6.0)),
        Case("inspect, whole process", "0.4 s", {"ours": [*cli, "inspect", many], "safe_open": job("peer_inspect", many)}, seconds(0.4)),
        Case("load into a meta model", "0.3 s, 16 MiB anonymous",
             {"ours": job("ours_meta", llama), "load_file + load_state_dict": job("peer_meta", llama)}, judge_meta),
        Case("load into an allocated model", "no slower than the peer",
             {"ours": job("ours_copy", llama), "load_file + load_state_dict": job("peer_copy", llama)}, judge_copy),
        Case("read 1% of the tensors", "1.1 x their bytes", {"ours": job("ours_partial", llama)}, judge_partial),
        Case("rename in place", "0.1 s, whatever the size", {"ours": job("ours_in_place", plain, str(work))}, seconds(0.1)),
    ]  # fmt: skip


def machine() -> str:
    """The machine, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), {memory:.0f} GiB, {platform.system()} {platform.release()}"


def show(case: Case, found: dict[str, dict[str, Any]]) -> str:
    """One line of the table."""
    figure, reached = case.judge(found)
    peers = "; ".join(
        f"{label} {m.get('seconds', m['wall']):.2f} s, {m['peak'] / 2**20:.0f} MiB"
        for label, m in found.items()
        if label != "ours"
    )
    ours = found["ours"]
    took = f"{ours.get('seconds', ours['wall']):.2f} s"
    return f"| {case.name} | {case.bar} | {'yes' if reached else 'no'}: {figure} | {took} | {peers or '-'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=0, help="counted runs (3; with --small 1)")
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ckptsurgery-bench")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    needed = 2e9 if options.small else 20e9
    if data.free_bytes(options.work) < needed:
        print(f"{options.work}: {needed / 1e9:.0f} GB are needed", file=sys.stderr)
        return 1
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    results = {}
    print(f"{machine()}\n\n| case | bar | reached | ours | peers |\n|---|---|---|---|---|")
    for case in cases(options.work, options.small):
        if options.only in case.name:
            found = measure(case, options.runs or (1 if options.small else 3))
            if "failed" in found["ours"]:
                print(f"| {case.name} | {case.bar} | failed | - | - |", flush=True)
                continue
            results[case.name] = found
            print(show(case, found), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    shutil.which("cp") or sys.exit("cp is needed")
    sys.exit(main())
