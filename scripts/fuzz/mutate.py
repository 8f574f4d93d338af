"""Fuzzes every reader with mutations of sound inputs, and holds it against the bad files that have names.

    python scripts/fuzz/mutate.py                       # 2,000 cases a reader
    python scripts/fuzz/mutate.py --cases 1000000 --seed 7 --only torch-zip
    python scripts/fuzz/mutate.py --only named
    python scripts/fuzz/mutate.py --skim --cases 100000 --only gguf --only onnx

The same seed gives the same cases. The process watches itself: its memory is limited, a case that takes long is ended,
and whatever a reader opens, removes, runs or connects to outside of the folder of the case is a broken promise (an
audit hook sees it, and cannot be unset). With `--skim`, changes are near structures, readers are asked for headers and
small tensors alone, and a case may take a second of CPU time and 64 MiB.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nasty import CASES, MARKER
from targets import TARGETS, BrokenPromise, Target, refusal, walk

import ckptsurgery

SECONDS_A_CASE = 30
_GROWTH = 512 << 20
"""Bytes by which the process may grow over all cases of a reader; the largest case has some 10 MB."""

_GROWTH_A_CASE = 64 << 20

_WORDS = [
    b"\x00", b"\xff", b"\x80", b"\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8, b"\x00" * 8,
    b"\x01" + bytes(7), b"{", b"}", b"[", b"]", b'"', b"\\", b"null", b"true", b"NaN", b"-1", b"1e400", b"9" * 30,
    b"1152921504606846976", b"..", b"/", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"__metadata__", b"dtype", b"shape",
    b"data_offsets", b"F4", b"U8", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"cos\nsystem\n", b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n", b"R", b"b", b"h\x00", b"(", b"ctorch\nload\n", b"->", b"|", b"{i}", b"...", b"?", b",",
    b"config.", b"??", b"//", b"[[scope]]\n", b"rest = 'keep'\n",
]  # fmt: skip
_INSTALLED = (sys.prefix, sys.base_prefix, str(Path(ckptsurgery.__file__).parent.parent))
_LOOKING = frozenset({"os.listdir", "os.scandir"})
_CHANGING = frozenset({
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "os.utime",
})  # fmt: skip
_FORBIDDEN = (
    "os.", "shutil.", "subprocess.", "socket.", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "urllib.",
    "pty.", "exec", "webbrowser.", "pickle.find_class",
)  # fmt: skip


def _anywhere(made: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(made) + 1)


def _near_ends(made: bytearray, chance: random.Random) -> int:
    """Mostly a place near the start or the end, where formats have headers and directories."""
    at = int(len(made) * chance.random() ** 3)
    return at if chance.random() < 0.7 else len(made) - at


def mutated(data: bytes, chance: random.Random, place: Callable[[bytearray, random.Random], int] = _anywhere) -> bytes:
    """The data after one to eight small changes."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = place(made, chance)
        match chance.randrange(8):
            case 0:
                made[at : at + 1] = bytes([chance.randrange(256)])
            case 1 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 2:
                del made[at : at + chance.choice((1, 2, 4, 16, 100))]
            case 3:
                made[at:at] = chance.choice(_WORDS)
            case 4:
                word = chance.choice(_WORDS)
                made[at : at + len(word)] = word
            case 5:
                start = chance.randrange(len(made) + 1)
                made[at:at] = made[start : start + chance.choice((1, 8, 64, 500))]
            case 6:
                del made[at:]
            case _:
                made[at:at] = chance.choice(_WORDS) * chance.choice((2, 50, 1000))
    return bytes(made)


class Watch:
    """Sees what the process does while a case runs."""

    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root) + "/"
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        """Note what reaches out of the folder."""
        if not self.on:
            return
        if event == "open" or event in _CHANGING:
            paths = [os.fsdecode(a) for a in args[: 1 if event == "open" else 2] if isinstance(a, str | bytes)]
            outside = [p for p in paths if not os.path.normpath(p).startswith(self.root)]
            if outside and not (event == "open" and outside[0].startswith(_INSTALLED)):
                self.seen.append(f"{event} {outside}")
        elif event == "exec" and (_is_module(args[0]) or _asks_for_types()):
            return
        elif event.startswith(_FORBIDDEN) and event not in _LOOKING:
            self.seen.append(f"{event} {args!r:.200}")

    @contextmanager
    def case(self) -> Iterator[None]:
        """One case: it may neither reach out nor take long.

        Raises:
            BrokenPromise: it did, or raised what it must not raise.
        """
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        self.seen.clear()
        self.on = True
        try:
            yield
        except Exception:
            raise BrokenPromise(traceback.format_exc()) from None
        finally:
            self.on = False
            faulthandler.cancel_dump_traceback_later()
        if self.seen:
            raise BrokenPromise("; ".join(self.seen))


def _is_module(code: object) -> bool:
    """Whether code belongs to a module that is imported when it is first used."""
    return str(getattr(code, "co_filename", "")).startswith(_INSTALLED)


def _asks_for_types() -> bool:
    """Whether `typing` evaluates an annotation of the library's own classes."""
    return sys._getframe(2).f_globals.get("__name__") == "typing"


def fuzz(target: Target, cases: int, seed: int, root: Path, watch: Watch, skims: bool = False) -> tuple[int, int]:
    """Run the cases of one target; how many were accepted, and how many refused.

    Args:
        skims: skim inputs, changed near their ends, under tight limits.

    Raises:
        BrokenPromise: with the case, which was kept in a file.
    """
    chance = random.Random(f"{seed} {target.name}")
    folder = root / target.name
    (folder / "out").mkdir(parents=True)
    run, place = (target.skim or target.run, _near_ends) if skims else (target.run, _anywhere)
    for data in target.seeds:
        run(data, folder)
    accepted = 0
    for number in range(cases):
        data = mutated(chance.choice(target.seeds), chance, place)
        try:
            with watch.case(), _bounded() if skims else nullcontext():
                fine = run(data, folder)
            accepted += fine
            if fine and target.compare is not None and not skims:
                target.compare(folder)
        except Exception as error:
            kept = Path(tempfile.gettempdir(), f"broken-{target.name}-{seed}-{number}")
            kept.write_bytes(data)
            raise BrokenPromise(f"{target.name}: case {number} of seed {seed}, kept as {kept}: {error}") from None
        if number % 200 == 0:
            gc.collect()
    return accepted, cases - accepted


@contextmanager
def _bounded() -> Iterator[None]:
    """A case that may not take long, or much.

    Raises:
        BrokenPromise: it did.
    """
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > 1 or grown > _GROWTH_A_CASE >> 10:
        raise BrokenPromise(f"a case took {seconds:.1f} s of CPU time, and {grown:,} KiB more than all before")


def named(root: Path, watch: Watch) -> tuple[int, int]:
    """The bad files that have names; how many were read, and how many refused.

    Raises:
        BrokenPromise: with the name.
    """
    accepted = 0
    for number, (name, case) in enumerate(CASES.items()):
        folder = root / f"named-{number}"
        (folder / "out").mkdir(parents=True)
        path = case.make(folder)
        try:
            with watch.case():
                codes = {"read"}
                try:
                    walk(path)
                except ckptsurgery.CkptSurgeryError as error:
                    refusal(error)
                    codes = {diagnostic.code for diagnostic in error.diagnostics}
            if not codes <= set(case.codes) or (folder / MARKER).exists():
                raise BrokenPromise(f"{codes} instead of {case.codes}")
        except BrokenPromise as error:
            raise BrokenPromise(f"{name}: {error}") from None
        accepted += codes == {"read"}
    return accepted, len(CASES) - accepted


def main() -> None:
    """Fuzz, and print a line of JSON for each reader."""
    parser = argparse.ArgumentParser(description="Fuzz every reader with mutations of sound inputs.")
    parser.add_argument("--cases", type=int, default=2000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted([*TARGETS, "named"]))
    parser.add_argument("--memory", type=int, default=6 << 30, help="bytes of address space for the process")
    parser.add_argument("--skim", action="store_true", help="headers and small tensors alone, many times as fast")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    for module in pkgutil.walk_packages(ckptsurgery.__path__, "ckptsurgery."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    failed = 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every case writes files, and copies are synced
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as root:
        watch = Watch(Path(root))
        for name in options.only or ["named", *TARGETS]:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                if name == "named":
                    accepted, refused = named(Path(root), watch)
                else:
                    accepted, refused = fuzz(
                        TARGETS[name], options.cases, options.seed, Path(root), watch, options.skim
                    )
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
                if grown > _GROWTH:
                    raise BrokenPromise(f"{name}: the process grew by {grown:,} bytes")
            except BrokenPromise as error:
                print(error, file=sys.stderr)
                failed += 1
                continue
            print(json.dumps({"reader": name, "accepted": accepted, "refused": refused, "grown": grown}), flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
