"""Try one mutant: a forked process imports the changed package and runs the tests that cover the change.

The forking process has imported torch and pytest but nothing of the package, so a trial costs no start-up. The change
is written into a copy of the repository, hence processes that a test starts run it too.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported here once, not in each trial.
import _pytest.legacypath
import _pytest.unittest
import anyio.pytest_plugin
import hypothesis.strategies
import numpy
import pytest
import safetensors.torch
import torch

_PRELOADED = (_pytest, anyio, hypothesis, numpy, safetensors, torch)

_MEMORY = 8 << 30
_FILE = 8 << 30
"""Bytes of memory and of one file: a mutant may loop and fill either."""
_UNKNOWN = 0.5
"""Seconds that a test takes which was not measured."""
_HEAVY = ("tests/real/", "tests/recipes/", "tests/inference/", "tests/hardening/", "tests/demo/")
"""Tests that import other libraries, train, or repeat what they do many times: they come last."""
_SLOWER = 10
_GRACE = 20.0
"""A test hangs that takes ten times its usual time and 20 seconds of the processor, or six times that by the clock."""
_WAITING = 6
_HUNG = (signal.SIGALRM, signal.SIGPROF, signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: "killed" (a test failed), "hung", "crashed" or "survived".

    `unrun` counts the covering tests for which no time was left.
    """

    verdict: str
    test: str = ""
    run: int = 0
    unrun: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Tests:
    """The tests to run: ids with the seconds that they usually take, and files of which every other test is run too.

    Tests in the folder `near` come first, since to collect one folder is quicker than to collect all; what is in
    `whole` alone comes last, since nobody knows whether it runs the changed lines.
    """

    seconds: dict[str, float]
    whole: Sequence[str] = ()
    near: str = "tests"

    def stages(self) -> list[list[str]]:
        """Return the files in the order in which they are collected; those of the last two stages are run whole."""
        stages: list[list[str]] = [[], [], [], [], []]
        for file in sorted({test.partition("::")[0] for test in self.seconds}):
            stages[0 if file.startswith(self.near) else 2 if file.startswith(_HEAVY) else 1].append(file)
        for file in self.whole:
            stages[3 if file.startswith((self.near, "tests/matrix/")) else 4].append(file)
        return stages


class Chooser:
    """A pytest plugin: runs the chosen tests only, in order of cost, until the time is up."""

    def __init__(self, tests: dict[str, float], limit: float, report: Path) -> None:
        self.tests, self.limit, self.report = tests, limit, report
        self.others = False
        self.began = _processor_seconds()
        self.failed: list[str] = []
        self.ran = 0
        self.total = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Take one quick test of each file first, then all others, the quick ones first and by file."""
        kept = [item for item in items if (item.nodeid in self.tests) is not self.others]
        first: dict[str, pytest.Item] = {}
        for item in sorted(kept, key=self._seconds):
            first.setdefault(item.nodeid.partition("::")[0], item)
        early = {item.nodeid for item in first.values() if self._seconds(item) < 1}

        def order(item: pytest.Item) -> tuple[bool, int, str]:
            cost = sum(self._seconds(item) > step for step in (0.03, 0.3, 2))
            return item.nodeid not in early, cost, item.nodeid.partition("::")[0]

        items[:] = sorted(kept, key=order)
        self.total += len(items)

    def _seconds(self, item: pytest.Item) -> float:
        return self.tests.get(item.nodeid, _UNKNOWN)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """End the process when the test hangs: an exception could be caught by what hangs."""
        limit = _GRACE + _SLOWER * self.tests.get(nodeid, _UNKNOWN)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.setitimer(signal.ITIMER_REAL, _WAITING * limit)
        self.report.write_text(json.dumps({"test": nodeid, "run": self.ran, "total": self.total}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failure."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember a file that cannot be imported."""
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Stop when the time is up."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.ran += 1

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Stop before a test for which no time is left."""
        if _processor_seconds() - self.began > self.limit:
            item.session.shouldstop = "the time is up"


def _processor_seconds() -> float:
    """Return what this process and its children took of the processor: a loaded machine takes no tests away."""
    return sum(os.times()[:4])


@dataclass(frozen=True)
class Trial:
    """A running trial."""

    process: int
    tree: Path
    folder: Path
    began: float
    latest: float

    def ended(self) -> Outcome | None:
        """Return the outcome, or None while the trial runs."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() > self.latest
        if not process and not late:
            return None
        _kill_all(self.process)
        if not process:
            os.waitpid(self.process, 0)
        took = round(time.monotonic() - self.began, 2)
        found: dict[str, Any] = json.loads(_text(self.folder / "report.json") or "{}")
        shutil.rmtree(self.folder, ignore_errors=True)
        verdict = found.get("verdict")
        if verdict is None:
            hung = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in _HUNG)
            verdict = "hung" if hung else "crashed"
        run, total = found.get("run", 0), found.get("total", 0)
        return Outcome(verdict, found.get("test", ""), run, max(0, total - run), took)

    def stop(self) -> None:
        """End the trial before it is done."""
        _kill_all(self.process)


def start(tree: Path, folder: Path, tests: Tests, limit: float, every: bool = False) -> Trial:
    """Run the tests of the tree in a forked process, until one fails or `limit` seconds of the processor are over.

    With `every`, failures do not end the run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    sys.stdout.flush()
    process = os.fork()
    if process:
        slowest = max(tests.seconds.values(), default=0.0)
        return Trial(process, tree, folder, began, began + _WAITING * (limit + 60 + _GRACE + _SLOWER * slowest))
    status = 1
    try:
        _run(tree, folder, tests, limit, every)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)  # a forked process must never return to its parent's code


def _run(tree: Path, folder: Path, tests: Tests, limit: float, every: bool) -> None:
    os.setsid()
    for end in (signal.SIGALRM, signal.SIGPROF, signal.SIGTERM):
        signal.signal(end, signal.SIG_DFL)
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, place)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, resource.RLIM_INFINITY))
    temporary = folder / "tmp"
    temporary.mkdir()
    os.chdir(tree)
    os.environ |= {
        "CI": "1",
        "PYTHONPATH": str(tree),
        "TMPDIR": str(temporary),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    report = folder / "report.json"
    chooser = Chooser(tests.seconds, limit, report)
    options = ["-p", "no:cacheprovider", "--rootdir", str(tree), f"--basetemp={temporary / 'pytest'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--tb=no"] + ([] if every else ["-x"])
    for files, chooser.others in zip(tests.stages(), (False, False, False, True, True)):
        code = pytest.main([*options, *files], plugins=[chooser]) if files else 0
        if code not in (0, 2, 5) and not chooser.failed:
            chooser.failed.append("pytest itself")
        if chooser.failed and not every:
            break
    failed = chooser.failed
    verdict = "killed" if failed else "survived"
    found = {"verdict": verdict, "test": failed[0] if failed else "", "run": chooser.ran, "total": chooser.total}
    report.write_text(json.dumps(found | {"failed": failed}))
    sys.stdout.flush()
    sys.stderr.flush()


def failing(trial: Trial) -> list[str]:
    """Wait for a trial and return every test that failed in it."""
    while os.waitpid(trial.process, os.WNOHANG)[0] == 0:
        time.sleep(0.1)
    _kill_all(trial.process)
    found: dict[str, Any] = json.loads(_text(trial.folder / "report.json") or "{}")
    return list(found.get("failed", [found.get("test", "")]))


def _kill_all(leader: int) -> None:
    """End whatever the trial's tests left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def grow(tree: Path, root: Path, files: Sequence[str]) -> int:
    """Make the tree hold exactly the named files of the repository; return how many were copied."""
    wanted = {name for name in files if (root / name).is_file()}
    held = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    for name in held - wanted:
        (tree / name).unlink()
    stale = {name for name in wanted if name not in held or (tree / name).read_bytes() != (root / name).read_bytes()}
    for name in stale:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, tree / name)
        forget_compiled(tree / name)
    return len(stale)


def forget_compiled(path: Path) -> None:
    """Remove compiled code, which Python takes for current when size and second of the text agree."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
