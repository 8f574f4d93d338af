"""Loads, saves and exchanges on several ranks of which one is killed, or fails, at some point.

Points are the calls of functions of the package and of system calls that one rank makes, numbered in order; at one of
them the process kills itself, or the call raises. Ranks are forks of one process that has imported torch, so that a
trial takes a part of a second. Their process group has a longer timeout than a trial may take: a rank that waits for it
counts as hanging.

Run: python tests/sharding/killed_ranks.py kill 2 20 /tmp/new-folder                   20 points for each rank and work
     python tests/sharding/killed_ranks.py fail 3 20 /tmp/new-folder "convert to a file"         one work alone
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import ckptsurgery as cs

PATIENCE = 60  # seconds until ranks that still run count as hanging
_PACKAGE = str(Path(cs.__file__).parent)
_BELOW = tuple(str(Path(_PACKAGE, "sharding", name)) for name in ("peers.py", "exchanges.py", "lost_ranks.py"))


def state() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.w": torch.arange(40.0).reshape(10, 4) + i for i in range(4)} | {"b": torch.ones(3)}


def _convert(folder: Path, out: Path) -> Callable[[], object]:
    rules = ["layers.{i}.w [a b] -> blocks.{i}.w [b a]", "b -> b"]
    plan = cs.plan(folder / "source.safetensors", rules)  # each rank by itself: none waits for another one yet
    return lambda: plan.save(out, together=True)


def _shards() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in state().items()}


def _save(folder: Path, out: Path) -> Callable[[], object]:
    shards = _shards()
    return lambda: cs.save(shards, out)


def _save_dcp(folder: Path, out: Path) -> Callable[[], object]:
    shards = _shards()
    return lambda: cs.save(shards, out, format="dcp")


def _net(rows: dict[str, int]) -> torch.nn.Module:
    """A model with sharded matrices and a replicated one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Module()
    for name, count in rows.items():
        way = Replicate() if name == "same" else Shard(0)
        model.register_parameter(name, torch.nn.Parameter(distribute_tensor(torch.zeros(count, 4), mesh, [way])))
    return model


def _load(folder: Path, out: Path) -> Callable[[], object]:
    model = _net({"moved": 10, "same": 10, "made": 13})
    rules = ["layers.0.w -> moved", "layers.1.w -> same", "layers.2.w -> made | resize_rows(13)"]
    recipe = cs.Recipe(rules=rules, drop=["layers.3.w", "b"])
    return lambda: cs.load_into(model, folder / "source.safetensors", recipe)


def _exchange(folder: Path, out: Path) -> Callable[[], object]:
    rules = ["{k...} -> {k...}", "+ made -> longer | resize_rows(43)"]
    source, target = _net({"moved": 40, "same": 40, "made": 40}), _net({"made": 40, "same": 40, "moved": 40})
    target.register_parameter("longer", _net({"longer": 43}).longer)
    return lambda: cs.reshard(source, target, rules, bucket_size=600)()


WORK: dict[str, tuple[str, Callable[[Path, Path], Callable[[], object]]]] = {
    "convert to a file": ("out.safetensors", _convert),
    "convert to a folder": ("out", _convert),
    "save to a file": ("out.safetensors", _save),
    "save to a folder": ("out", _save),
    "save as DCP": ("out", _save_dcp),
    "load": ("nothing", _load),
    "exchange": ("nothing", _exchange),
}


class Points:
    """Counts calls on all threads of the process, and kills it, or fails, at one of them."""

    def __init__(self, how: str, last: int | None) -> None:
        self.how = how
        self.count = 0
        self.last = last

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if self.how == "fail" and (name in _BELOW or threading.current_thread() is not threading.main_thread()):
            return
        own = event == "call" and name.startswith(_PACKAGE)
        if own or (event == "c_call" and getattr(argument, "__module__", None) == "posix"):
            self.step()

    def step(self) -> None:
        self.count += 1
        if self.count == self.last:
            if self.how == "fail":
                raise MemoryError("injected")
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        codes: of each rank: "done", the code of its error, "killed", or "hangs". texts: what each error said.
        points: how many the watched rank came by.
    """

    codes: tuple[str, ...]
    texts: tuple[str, ...]
    points: int


def _rank(how: str, name: str, folder: Path, rank: int, size: int, victim: int, last: int | None) -> None:
    """Do one rank's part in this process, write how it went, and end."""
    out, prepare = WORK[name]
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE * 2))
    work, points, code, text = prepare(folder, folder / "made" / out), Points(how, last), "done", ""
    dist.barrier()
    try:
        if rank == victim:
            points.start()
        work()
    except cs.CkptSurgeryError as error:
        code, text = error.diagnostics[0].code, str(error)
    except Exception as error:  # nothing else may come out
        code = f"{type(error).__name__}: {error}"
    points.stop()
    (folder / f"answer{rank}").write_bytes(pickle.dumps((code, text, points.count)))
    os._exit(0)


def trial(how: str, name: str, folder: Path, size: int, victim: int, last: int | None) -> Outcome:
    """Run a load, a save or an exchange on forked ranks.

    Args:
        how: "kill" or "fail".
        folder: empty; gets the source, and `made` with the output.
        victim: the rank that is watched. last: the point at which that happens to it; None lets it live.
    """
    (folder / "made").mkdir(parents=True)
    save_file(state(), folder / "source.safetensors")
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            os.dup2(sys.stderr.fileno(), 2)
            _rank(how, name, folder, rank, size, victim, last)
        children.append(child)
    codes, texts, points, end = [], [], 0, time.monotonic() + PATIENCE
    for rank, child in enumerate(children):
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes.append("hangs")
                break
            time.sleep(0.002)
        else:
            answer = folder / f"answer{rank}"
            code, text, count = pickle.loads(answer.read_bytes()) if answer.exists() else ("killed", "", 0)
            codes.append(code)
            texts.append(text)
            points = count if rank == victim else points
    return Outcome(tuple(codes), tuple(texts), points)


def wrong(name: str, folder: Path, outcome: Outcome, victim: int) -> list[str]:
    """The promises that a trial broke: the output is whole or absent, and no rank hangs or fails without a reason."""
    out = folder / "made" / WORK[name][0]
    found = [f"rank {n}: {code}" for n, code in enumerate(outcome.codes) if code == "hangs" or ":" in code]
    if len({text for text in outcome.texts if text}) > 1:
        found.append(f"errors that differ: {outcome.texts}")
    if out.exists():
        try:
            made = cs.open(out).state_dict()
        except cs.CkptSurgeryError as error:
            return [*found, f"the output is not whole: {error.diagnostics[0].code}"]
        if not _whole(name, made):
            found.append("the output holds other values")
    elif "done" in outcome.codes and out.name != "nothing":
        found.append("a rank is done, and there is no output")
    left = [file.name for file in (folder / "made").iterdir() if file != out]
    if left and (victim or not all(file.startswith(".") for file in left)):
        found.append(f"left behind: {left}")
    return found


def _whole(name: str, made: dict[str, torch.Tensor]) -> bool:
    wanted = state()
    if name.startswith("convert"):
        wanted = {key.replace("layers", "blocks"): t.t() if t.dim() == 2 else t for key, t in wanted.items()}
    return {*made} == {*wanted} and all(torch.equal(made[key], tensor) for key, tensor in wanted.items())


def _import_all(root: Path) -> None:
    """Import before the first fork what the trials use."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for module in ("running.sharded_saving", "running.dcp_saving", "running.writing_together", "running.saving",
                   "running.sharded_loading", "resharding.resharder"):  # fmt: skip
        import_module(f"ckptsurgery.{module}")
    cs.plan(state(), ["layers.{i}.w [a b] -> blocks.{i}.w [b a]", "b -> b"]).save(root / "first.safetensors")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    for tensor in _shards().values():
        tensor.__create_chunk_list__()
    dist.destroy_process_group()


def sweep(how: str, size: int, every: int, root: Path, names: list[str]) -> tuple[int, list[str]]:
    """Kill each rank, or let it fail, at evenly spread points of each work; return how many, and all that was wrong.

    Args:
        every: about how many points a rank and a work get.
    """
    done, problems = 0, []
    _import_all(root)
    for name in names:
        for victim in range(size):
            total = trial(how, name, root / f"{name} {victim}", size, victim, None).points
            for number in range(every):
                last = 1 + total * (2 * number + 1) // (2 * every)
                folder = root / f"{name} {victim} {number}"
                outcome = trial(how, name, folder, size, victim, last)
                done += 1
                problems += [
                    f"{name}, rank {victim}, {how} at {last} of {total}: {text} {outcome.codes}"
                    for text in wrong(name, folder, outcome, victim)
                ]
    return done, problems


if __name__ == "__main__":
    how, ranks, number, root, *names = sys.argv[1:]
    Path(root).mkdir(exist_ok=True)
    count, problems = sweep(how, int(ranks), int(number), Path(root), names or [*WORK])
    print(*problems, f"{count} trials, {len(problems)} problems", sep="\n", flush=True)
    os._exit(bool(problems))
