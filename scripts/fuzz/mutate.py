"""Fuzzes every reader with mutations of sound inputs: the same seed gives the same cases.

    python scripts/fuzz/mutate.py                       # 2,000 cases a reader
    python scripts/fuzz/mutate.py --cases 1000000 --seed 7 --only torch-zip

The process watches itself: its memory is limited, a case that takes long is ended, and whatever a reader opens, removes,
runs or connects to outside of the folder of the case is a broken promise (an audit hook sees it, and cannot be unset).
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
import traceback
from pathlib import Path

import ckptsurgery
from targets import TARGETS, BrokenPromise, Target

SECONDS_A_CASE = 30
_WORDS = [
    b"\x00", b"\xff", b"\x80", b"\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8, b"\x00" * 8, b"\x01" + b"\0" * 7,
    b"{", b"}", b"[", b"]", b'"', b"\\", b"null", b"true", b"NaN", b"-1", b"1e400", b"9" * 30, b"1152921504606846976", b"..",
    b"/", b"\\u0000", b"\xed\xa0\x80", b"__metadata__", b"dtype", b"shape", b"data_offsets", b"F4", b"U8", b"PK\x01\x02",
    b"PK\x03\x04", b"PK\x05\x06", b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"R", b"b", b"h\x00", b"(",
    b"ctorch\nload\n", b"->", b"|", b"{i}", b"...", b"?", b",", b"config.", b"??", b"//", b"[[scope]]\n", b"rest = 'keep'\n",
]  # fmt: skip
_HARMLESS_EVENTS = frozenset(
    {"object.__getattr__", "object.__setattr__", "sys._getframe", "marshal.loads", "builtins.id"}
)
_FORBIDDEN = (
    "os.", "shutil.", "subprocess.", "socket.", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "urllib.", "pty.",
    "exec", "webbrowser.", "pickle.find_class",
)  # fmt: skip
_INSTALLED = (sys.prefix, sys.base_prefix, str(Path(ckptsurgery.__file__).parent.parent))
_CHANGING = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "os.utime",
}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data after one to eight small changes."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
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
        if not self.on or event in _HARMLESS_EVENTS:
            return
        if event == "open" or event in _CHANGING:
            paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, str | bytes)]
            outside = [
                p for p in paths[: 2 if event in _CHANGING else 1] if not os.path.abspath(p).startswith(self.root)
            ]
            if outside and not (event == "open" and _is_code(outside[0])):
                self.seen.append(f"{event} {outside}")
        elif event == "exec" and (_is_code(getattr(args[0], "co_filename", "")) or _asks_for_types()):
            return
        elif event.startswith(_FORBIDDEN) and event not in ("os.listdir", "os.scandir"):
            self.seen.append(f"{event} {args!r:.200}")


def _is_code(path: str) -> bool:
    """What Python, this package and its shelf of recipes are made of: read when something is first used."""
    return path.startswith(_INSTALLED)


def _asks_for_types() -> bool:
    """Whether `typing` evaluates an annotation of the library's own classes."""
    return sys._getframe(2).f_globals.get("__name__") == "typing"


def fuzz(target: Target, cases: int, seed: int, root: Path, watch: Watch) -> tuple[int, int]:
    """Run the cases of one target; how many were accepted, and how many refused.

    Raises:
        BrokenPromise: with the case, which was kept in a file.
    """
    chance = random.Random(f"{seed} {target.name}")
    folder = root / target.name
    (folder / "out").mkdir(parents=True)
    for data in target.seeds:
        target.run(data, folder)
    accepted = 0
    for number in range(cases):
        data = mutated(chance.choice(target.seeds), chance)
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        watch.on = True
        try:
            accepted += target.run(data, folder)
            problem = "; ".join(watch.seen)
        except (BrokenPromise, Exception):
            problem = traceback.format_exc()
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
        if problem:
            kept = Path(tempfile.gettempdir(), f"broken-{target.name}-{seed}-{number}")
            kept.write_bytes(data)
            raise BrokenPromise(f"{target.name}: case {number} of seed {seed}, kept as {kept}: {problem}")
        if number % 200 == 0:
            gc.collect()
    return accepted, cases - accepted


def main() -> None:
    """Fuzz, and print a line of JSON for each reader."""
    parser = argparse.ArgumentParser(description="Fuzz every reader with mutations of sound inputs.")
    parser.add_argument("--cases", type=int, default=2000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted(TARGETS))
    parser.add_argument("--memory", type=int, default=6 << 30, help="bytes of address space for the process")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    failed = 0
    for module in pkgutil.walk_packages(ckptsurgery.__path__, "ckptsurgery."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        watch = Watch(Path(root))
        for name in options.only or TARGETS:
            try:
                accepted, refused = fuzz(TARGETS[name], options.cases, options.seed, Path(root), watch)
            except BrokenPromise as error:
                print(error, file=sys.stderr)
                failed += 1
                watch.seen.clear()
                continue
            print(json.dumps({"reader": name, "accepted": accepted, "refused": refused}), flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
