"""Find which tests run each line of the package, by one run of the suite under coverage.py.

This module is also the pytest plugin of that run: it tells coverage.py which test is running, and writes how long each
test took and whether it passed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

_CONFIGURATION = """
[run]
source = ckptsurgery
relative_files = True
data_file = {data}
parallel = True
sigterm = True
patch = subprocess, fork, _exit
context = ${{PYTEST_CURRENT_TEST-}}
disable_warnings = no-data-collected, module-not-imported, module-not-measured, couldnt-parse
"""
_PHASES = (" (setup)", " (call)", " (teardown)")


@dataclass(frozen=True)
class CoverageMap:
    """Which tests run a line: `lines[file][line]` holds test ids, and `seconds` the duration of each test that passed.

    A test that failed without any mutant is in neither.
    """

    lines: dict[str, dict[int, frozenset[str]]]
    seconds: dict[str, float]

    @cached_property
    def files(self) -> frozenset[str]:
        """The test files that were run."""
        return frozenset(test.partition("::")[0] for test in self.seconds)

    def covering(self, file: str, lines: Sequence[int], on_import: bool = False) -> set[str]:
        """Return the tests that run one of the lines.

        Args:
            on_import: whether the lines run when the file is imported; then every test that runs the file counts.
        """
        by_line = self.lines.get(file, {})
        found = {test for line in lines for test in by_line.get(line, ())}
        if on_import or (not found and any(line in by_line for line in lines)):
            return {test for tests in by_line.values() for test in tests}
        return found


def runs_on_import(source: str, line: int) -> bool:
    """Return whether a line is in no function's body: at the top, in a class, or among a function's defaults."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return not any(n.body[0].lineno <= line <= (n.end_lineno or line) for n in functions)


class Recorder:
    """A pytest plugin: names the running test to coverage.py, and collects durations and outcomes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def _switch(self, context: str) -> None:
        from coverage import Coverage

        running = Coverage.current()
        if running is not None:
            running.switch_context(context)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Count everything that a test runs as run by it."""
        self._switch(item.nodeid)
        result = yield
        self._switch("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: pytest.FixtureRequest) -> Iterator[None]:
        """Count a fixture that several tests share as run by each test of the file."""
        if fixturedef.scope == "function":
            return (yield)
        node = request.node.nodeid
        self._switch(node.partition("::")[0])
        try:
            return (yield)
        finally:
            self._switch(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases of a test."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write what was collected."""
        kept = {test: round(seconds, 4) for test, seconds in self.seconds.items() if test not in self.failed}
        Path(os.environ["MUTATION_SECONDS"]).write_text(json.dumps(kept))
        if self.failed:
            print("left out, since they fail without a mutant:", *sorted(self.failed), sep="\n  ")


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder (pytest imports this module by `-p`)."""
    config.pluginmanager.register(Recorder(), "mutation-recorder")


def measure(tree: Path, work: Path, tests: Sequence[str]) -> None:
    """Run the tests of `tree` under coverage.py and keep the data in `work`."""
    for left in work.glob("data*"):
        left.unlink()
    settings = work / "coverage.ini"
    settings.write_text(_CONFIGURATION.format(data=work / "data"))
    environment = {
        **os.environ,
        "CI": "1",
        "PYTHONPATH": os.pathsep.join((str(tree), str(Path(__file__).parent))),
        "MUTATION_SECONDS": str(work / "seconds.json"),
    }
    coverage = [sys.executable, "-m", "coverage"]
    command = [*coverage, "run", f"--rcfile={settings}", "-m", "pytest", "-p", "no:cacheprovider", "-p", "coverage_map"]
    subprocess.run([*command, "--rootdir", str(tree), "--tb=no", *tests], cwd=tree, env=environment, check=False)
    subprocess.run([*coverage, "combine", f"--rcfile={settings}"], cwd=tree, check=True)


def read(work: Path) -> CoverageMap:
    """Return what `measure` found."""
    from coverage import CoverageData

    seconds: dict[str, float] = json.loads((work / "seconds.json").read_text())
    by_file: dict[str, list[str]] = {}
    for test in seconds:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    data = CoverageData(str(work / "data"))
    data.read()
    tests_of: dict[str, list[str]] = {}
    lines: dict[str, dict[int, frozenset[str]]] = {}
    for file in data.measured_files():
        found = lines.setdefault(Path(file).as_posix(), {})
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                if context not in tests_of:
                    tests_of[context] = _tests(context, seconds, by_file)
            found[line] = frozenset(test for context in contexts for test in tests_of[context])
    return CoverageMap(lines, seconds)


def _tests(context: str, seconds: dict[str, float], by_file: dict[str, list[str]]) -> list[str]:
    """Return the tests that a context stands for.

    A process that a test started has the test's id twice, or its phase behind it, or both.
    """
    for part in (context, *context.split("|")):
        for phase in _PHASES:
            part = part.removesuffix(phase)
        if part in seconds:
            return [part]
        if part in by_file:
            return by_file[part]
    return []
