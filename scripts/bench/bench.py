"""Speed and memory of ckptsurgery beside its peers, in fresh processes, alternating: `python scripts/bench/bench.py`.

--small        a few hundred megabytes instead of 4 GB, within a minute: shows that all of ours runs, no more
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
MIB = 1 << 20
NO_SYNC = "ours, no sync"


Found = dict[str, dict[str, Any]]
Judge = Callable[[Found], tuple[str, bool]]
Commands = dict[str, list[str]]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        name: what is done.
        bar: what must be reached, in words.
        commands: label -> argument list; "ours" and "cp", each with and without waiting for the disk, are known labels,
            the others are peers.
        outputs: what is removed before each run.
        judge: from the medians of all labels to (figure, reached).
    """

    name: str
    bar: str
    commands: Commands
    judge: Judge
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


def measure(case: Case, runs: int, warming: int) -> Found:
    """Medians for each label, the commands taken in turn; the first turns may only warm the page cache."""
    runs_of: dict[str, list[Run]] = {label: [] for label in case.commands}
    for turn in range(warming + runs):
        for label, command in case.commands.items():
            for output in case.outputs:
                clean(output)
            os.sync()  # else the next command would wait for what the last one, or the removal of its output, left
            one = run(command)
            if turn >= warming:
                runs_of[label].append(one)
    for output in case.outputs:
        clean(output)
    return {label: summary(runs_of[label]) for label in runs_of}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians of one label."""
    numbers: dict[str, Any] = {
        "wall": statistics.median(r.wall for r in runs),
        "best": min(r.wall for r in runs),
        "cpu": statistics.median(r.cpu for r in runs),
        "peak": statistics.median(r.peak for r in runs),
    }
    for key, value in runs[-1].said.items():
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        numbers[key] = statistics.median(r.said[key] for r in runs if key in r.said) if numeric else value
    return numbers


def against_cp(times: float, memory: int, torch: Found | None = None) -> Judge:
    """A bar in multiples of `cp`, with a limit on peak memory.

    Like is compared with like: what waits for the disk with `cp` and fsync, what does not with `cp` alone.

    Args:
        memory: bytes at the peak; beside torch's own, where torch is given.
        torch: what a process that imports torch takes, which the bar allows besides; None forbids the import. From
            what is shown it is taken off only where torch was imported.
    """
    start, own = (torch["torch"]["wall"], torch["torch"]["peak"]) if torch else (0.0, 0)

    def judge(found: Found) -> tuple[str, bool]:
        pairs = (found["ours"], found["cp + fsync"]), (found[NO_SYNC], found["cp"])
        imported = any(ours["torch"] for ours, _ in pairs)
        in_time = all(ours["wall"] <= times * copied["wall"] + start for ours, copied in pairs)
        apart = start if imported else 0.0
        synced, unsynced = (max(0.0, ours["wall"] - apart) / copied["wall"] for ours, copied in pairs)
        peak = max(ours["peak"] for ours, _ in pairs)
        fits = peak <= memory + own and (torch is not None or not imported)
        held = f"{(peak - own) / MIB:.0f} MiB beside torch" if imported else f"{peak / MIB:.0f} MiB, no torch"
        return f"{synced:.2f} x cp + fsync, without sync {unsynced:.2f} x cp, {held}", in_time and fits

    return judge


def seconds(limit: float) -> Judge:
    """A bar in seconds, inside the process where it says so, else of the whole process."""

    def judge(found: Found) -> tuple[str, bool]:
        took = found["ours"].get("seconds", found["ours"]["wall"])
        return f"{took:.2f} s", took <= limit

    return judge


def judge_meta(found: Found) -> tuple[str, bool]:
    ours = found["ours"]
    text = f"{ours['seconds']:.2f} s, {ours['anonymous'] / MIB:.0f} MiB anonymous"
    return text, ours["seconds"] <= 0.3 and ours["anonymous"] <= 16 * MIB


def judge_copy(found: Found) -> tuple[str, bool]:
    ours = found["ours"]
    fastest = min(m["seconds"] for label, m in found.items() if label != "ours" and "seconds" in m)
    ratio = ours["seconds"] / fastest
    text = f"{ours['seconds']:.2f} s, {ratio:.2f} x the fastest peer, {ours['anonymous'] / MIB:.0f} MiB anonymous"
    return text, ratio <= 1


def judge_device(found: Found) -> tuple[str, bool]:
    ours = found["ours"]
    ratio = ours["seconds"] / found["pinned copy"]["seconds"]
    text = f"{ours['seconds']:.2f} s, {ratio:.2f} x a pinned copy, {ours['anonymous'] / MIB:.0f} MiB anonymous"
    return text, ratio <= 1.1 and ours["anonymous"] <= 256 * MIB


def judge_partial(found: Found) -> tuple[str, bool]:
    ratio = found["ours"]["read"] / max(1, found["ours"]["wanted"])
    return f"reads {ratio:.3f} x the bytes wanted", ratio <= 1.1


def copies(source: str, copy: str) -> Commands:
    """`cp`, and `cp` followed by what we do too: waiting until the bytes are on the disk."""
    recursive = ["-r"] if Path(source).is_dir() else []
    return {"cp": ["cp", *recursive, source, copy], "cp + fsync": job("cp_and_sync", source, copy)}


def cases(work: Path, small: bool, torch: Found) -> list[Case]:
    """The table's lines over data in `work`."""
    made = subprocess.run(
        [sys.executable, str(HERE / "data.py"), str(work), str(int(small))], check=True, stdout=subprocess.PIPE
    )
    return [*writing(work, json.loads(made.stdout), small, torch), *reading(work, json.loads(made.stdout), small)]


def writing(work: Path, sources: list[str], small: bool, torch: Found) -> list[Case]:
    """Checkpoints to files."""
    llama, many, zipped, plain = sources
    out, copy = str(work / "out"), str(work / "copy")
    file = out + ".safetensors"
    gone = (out, copy, file)
    count = "20,000" if small else "100,000"

    def case(name: str, bar: str, source: str, judge: Judge, ours: list[str], peers: Commands | None = None) -> Case:
        commands = {"ours": ours, NO_SYNC: [*ours, "no sync"], **copies(source, copy), **(peers or {})}
        return Case(name, bar, commands, judge, gone)

    free, beside = against_cp(1.2, 64 * MIB), against_cp(2.0, 256 * MIB, torch)
    casts = against_cp(1.5, 256 * MIB, torch)
    found = [
        case("rename, drop, re-shard", "1.2 x cp, 64 MiB, no torch", llama, free,
             job("ours_rename", llama, out), {"load_file + save_file": job("peer_rename", llama, out)}),
        case(f"rename {count} tensors", "1.2 x cp, 128 MiB, no torch", many, against_cp(1.2, 128 * MIB),
             job("ours_many", many, out)),
        case("torch zip to safetensors", "1.3 x cp, 64 MiB, no torch", zipped, against_cp(1.3, 64 * MIB),
             job("ours_zip", zipped, file), {"torch.load + save_file": job("peer_zip", zipped, file)}),
        case("fuse and transpose", "2 x cp + torch's start", llama, beside,
             job("ours_rearrange", llama, out), {"load all + torch": job("peer_rearrange", llama, out)}),
        case("stack experts", "2 x cp + torch's start", many, beside, job("ours_stack", many, out)),
        case("stack and transpose experts", "2 x cp + torch's start", many, beside, job("ours_turn", many, out)),
        case("cast bf16 to fp16", "1.5 x cp + torch's start", llama, casts,
             job("ours_cast", llama, out, "f16"), {"load_file + to + save_file": job("peer_cast", llama, out, "f16")}),
        case("cast fp32 to bf16", "1.5 x cp + torch's start", plain, casts,
             job("ours_cast", plain, out, "bf16"),
             {"load_file + to + save_file": job("peer_cast", plain, out, "bf16")}),
    ]  # fmt: skip
    if not data.missing("mergekit"):
        found[0].commands["mergekit passthrough"] = job("peer_mergekit", llama, out)
    return found


def reading(work: Path, sources: list[str], small: bool) -> list[Case]:
    """Plans, models, and what moves nothing."""
    llama, many, _, plain = sources
    million = "100000" if small else "1000000"
    cli = [sys.executable, "-m", "ckptsurgery"]
    by_load_file = "load_file + load_state_dict"
    found = [
        Case("open and plan, 40 rules", "0.5 s",
             {"ours": job("ours_plan", many), "re.sub a rule": job("peer_plan", many)}, seconds(0.5)),
        Case(f"plan {int(million):,} keys", "6 s", {"ours": job("ours_plan_million", million)}, seconds(6.0)),
        Case("inspect, whole process", "0.4 s",
             {"ours": [*cli, "inspect", many], "safe_open": job("peer_inspect", many)}, seconds(0.4)),
        Case("load into a meta model", "0.3 s, 16 MiB anonymous",
             {"ours": job("ours_meta", llama), by_load_file: job("peer_meta", llama)}, judge_meta),
        Case("load into an allocated model", "no slower than the fastest peer",
             {"ours": job("ours_copy", llama), by_load_file: job("peer_copy", llama)}, judge_copy),
        Case("read 1% of the tensors", "1.1 x their bytes", {"ours": job("ours_partial", llama)}, judge_partial),
        Case("rename in place", "0.5 s, whatever the size", {"ours": job("ours_in_place", plain)}, seconds(0.5)),
    ]  # fmt: skip
    # Of a small run, the start of these libraries would be a fifth.
    if not small and not data.missing("accelerate"):
        for case, name in ((found[3], "peer_accelerate_meta"), (found[4], "peer_accelerate_copy")):
            case.commands["accelerate"] = job(name, llama)
    if not small and not data.missing("transformers"):
        found[3].commands["from_pretrained"] = job("peer_from_pretrained", llama)
    if data.accelerator():
        found.append(
            Case("load onto a GPU", "1.1 x a pinned copy, 256 MiB anonymous",
                 {"ours": job("ours_device", llama), "load_file(device=)": job("peer_device", llama),
                  "pinned copy": job("pinned_device", llama)}, judge_device)
        )  # fmt: skip
    shared = data.sharing_file(work, plain)
    if shared is not None:
        source, out = shared
        found.append(
            Case("rename on XFS, blocks shared", "0.5 s, whatever the size",
                 {"ours": job("ours_share", source, out),
                  "cp --reflink": ["cp", "--reflink=always", source, out + "-cp"]},
                 seconds(0.5), (out, out + "-cp"))
        )  # fmt: skip
    return found


def machine() -> str:
    """The machine, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {platform.system()} {platform.release()}, load {load:.1f}"
    )


def show(case: Case, found: Found, small: bool) -> str:
    """One line of the table; where everything fits the page cache, the start of a process is most of it."""
    figure, reached = case.judge(found)
    verdict = "" if small else "yes: " if reached else "no: "
    peers = "; ".join(
        f"{label} failed"
        if "failed" in m
        else f"{label} {m.get('seconds', m['wall']):.2f} s, {m['peak'] / MIB:.0f} MiB"
        for label, m in found.items()
        if label != "ours"
    )
    ours = found["ours"]
    took = f"{ours.get('seconds', ours['wall']):.2f} s"
    return f"| {case.name} | {case.bar} | {verdict}{figure} | {took} | {peers or '-'} |"


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
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    # What is installed has its bytecode; what is run from a working tree gets it from the first run of each command.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    starts = [run([sys.executable, "-c", "import torch"]) for _ in range(1 if options.small else 3)]
    torch: Found = {"torch": summary(starts)}
    results: dict[str, Found] = {}
    print(f"{machine()}\n\n| case | bar | reached | ours | peers |\n|---|---|---|---|---|")
    for case in cases(options.work, options.small, torch):
        if options.only in case.name:
            found = measure(case, options.runs or (1 if options.small else 3), 0 if options.small else 1)
            if "failed" in found["ours"]:
                print(f"| {case.name} | {case.bar} | failed | - | - |", flush=True)
                continue
            results[case.name] = found
            print(show(case, found, options.small), flush=True)
    for name in data.PEERS:
        if data.missing(name):
            print(f"\n{name} is not installed, so it is not measured.")
    if not any("blocks shared" in name for name in results) and options.only in "rename on XFS, blocks shared":
        print("\nNo file system that shares extents could be made (root, losetup and mkfs.xfs are needed).")
    if not data.accelerator() and options.only in "load onto a GPU":
        print("\nNo accelerator that torch knows is there, so loading onto a GPU is not measured.")
    data.unmount(options.work)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    shutil.which("cp") or sys.exit("cp is needed")
    sys.exit(main())
