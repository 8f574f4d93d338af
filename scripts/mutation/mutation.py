"""Change the package in one place at a time and count the changes that the tests notice.

    pip install -e '.[test,mutation]'
    python scripts/mutation/mutation.py --sample 300 --seed 1               # measure, try 300 mutants, print survivors
    python scripts/mutation/mutation.py --sample 300 --seed 1 --again       # after new tests: try the survivors again
    python scripts/mutation/mutation.py --sample 300 --seed 1 --show        # print the results so far

The first run executes the whole suite once under coverage.py, in `--jobs` parts; `--measure` repeats it for the test
files that changed. Each mutant is then tried by the tests that run its lines, and
by all tests of the files that are not measured. Results are kept in the work folder: a run that was interrupted, or
that reached `--minutes`, goes on where it stopped. `equivalent.toml` lists the mutants that were read and change no
behaviour, with the reason; they are left out of the kill rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import; threads do not survive a fork

import coverage_map
import trial
from coverage_map import CoverageMap
from operators import Mutant, sample
from trial import Outcome, Tests, Trial

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("planning", "running", "storage", "transfer", "modeling")
UNSUITED = (
    "tests/test_house.py",  # these three read the source or build a wheel: a mutant is not their subject
    "tests/test_layering.py",
    "tests/test_wheel.py",
    "tests/test_readme.py",
    "tests/running/test_costs.py",  # seconds and bytes of memory depend on the machine's load
)


def repository_files() -> list[str]:
    """Return the files of the work tree that git knows or would know."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(set(listed.splitlines()))


@dataclass(frozen=True)
class Layer:
    """One measurement: a copy of the repository as it was then, and which tests of some files ran which lines."""

    tree: Path
    map: CoverageMap

    def same(self, file: str) -> bool:
        """Whether a file is what it was then."""
        return (self.tree / file).exists() and (self.tree / file).read_bytes() == (ROOT / file).read_bytes()

    def lines(self, mutant: Mutant) -> list[int]:
        """Return the numbers that the mutant's lines had then."""
        if not (self.tree / mutant.file).exists():
            return []
        old = (self.tree / mutant.file).read_text().splitlines()
        new = (ROOT / mutant.file).read_text().splitlines()
        matched = difflib.SequenceMatcher(None, new, old, autojunk=False).get_matching_blocks()
        place = {block.a + i + 1: block.b + i + 1 for block in matched for i in range(block.size)}
        return [place[line] for line in mutant.lines if line in place]


class Measured:
    """Which tests cover a mutant, by the last measurement of each test file."""

    def __init__(self, work: Path, again: bool, jobs: int) -> None:
        done = [folder for folder in sorted(work.glob("measured-*")) if (folder / "seconds.json").exists()]
        self._layers = [_layer(folder) for folder in done]
        changed = [file for file in repository_files() if _is_test(file) and not self._knows(file)]
        if again or not self._layers:
            measured = [*changed, "ckptsurgery"]  # last: a test names a plugin of the package, to be imported by pytest
            self._layers += _measure(work, len(self._layers), [measured[job::jobs] for job in range(jobs)])
            changed = [file for file in changed if not any(file in layer.map.files for layer in self._layers)]
        self._changed = changed
        self._of = {file: layer for layer in self._layers for file in layer.map.files if (ROOT / file).exists()}

    def _knows(self, file: str) -> bool:
        return any(file in layer.map.files and layer.same(file) for layer in self._layers)

    def tests(self, mutant: Mutant, also: Sequence[str]) -> Tests:
        """Return the tests that cover a mutant, and the files that were never measured."""
        seconds: dict[str, float] = {}
        on_import = coverage_map.runs_on_import((ROOT / mutant.file).read_text(), mutant.lines[0])
        for layer in self._layers:
            for test in layer.map.covering(mutant.file, layer.lines(mutant), on_import):
                if self._of.get(test.partition("::")[0]) is layer:
                    seconds[test] = layer.map.seconds[test]
        return Tests(seconds, [*self._changed, *also], "tests/" + mutant.file.split("/")[1] + "/")

    def seconds(self, test: str) -> float:
        """Return how long a test took when it was measured."""
        layer = self._of.get(test.partition("::")[0])
        return layer.map.seconds.get(test, 1.0) if layer else 1.0


def _measure(work: Path, number: int, parts: Sequence[Sequence[str]]) -> list[Layer]:
    """Run each part of the tests under coverage.py, at the same time, each in a copy and a folder of its own."""
    folders = [work / f"measured-{number + i}" for i in range(len(parts))]
    for folder in folders:
        trial.grow(folder / "tree", ROOT, repository_files())
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda folder, tests: coverage_map.measure(folder / "tree", folder, tests), folders, parts))
    return [_layer(folder) for folder in folders]


def _layer(folder: Path) -> Layer:
    return Layer(folder / "tree", coverage_map.read(folder))


def _is_test(file: str) -> bool:
    return Path(file).match("test_*.py") and file.startswith("tests/") and file not in UNSUITED


class Results:
    """The results file: one line of JSON a trial, the last one of a mutant counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.of: dict[str, Outcome] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            found = json.loads(line)
            name = found.pop("id")
            self.of[name] = Outcome(**found)

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Write a result down."""
        self.of[mutant.id] = outcome
        with self._path.open("a") as file:
            file.write(json.dumps({"id": mutant.id, **dataclasses.asdict(outcome)}) + "\n")


def drawn(work: Path, size: int, seed: int) -> list[Mutant]:
    """Return the sample; it takes a minute to draw, so it is kept until the package changes."""
    digest = hashlib.sha256(repr((size, seed)).encode())
    for path in (Path(__file__).with_name("operators.py"), *sorted((ROOT / "ckptsurgery").rglob("*.py"))):
        digest.update(path.read_bytes())
    kept = work / f"sample-{digest.hexdigest()[:12]}.json"
    if not kept.exists():
        mutants = sample(ROOT, PACKAGES, size, seed)
        kept.write_text(json.dumps([dataclasses.asdict(mutant) for mutant in mutants]))
    found = json.loads(kept.read_text())
    return [Mutant(**{**entry, "lines": tuple(entry["lines"])}) for entry in found]


class Bench:
    """A few copies of the repository, in each of which one mutant at a time is tried."""

    def __init__(self, work: Path, jobs: int) -> None:
        self._work = work
        self._free = [work / f"tree-{number}" for number in range(jobs)]
        self._running: dict[Path, tuple[Mutant, Trial]] = {}
        files = repository_files()
        for tree in self._free:
            if trial.grow(tree, ROOT, files) < 20:
                continue  # a few files are compiled in no time, in each trial
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-qq"]
            subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True)

    def start(self, mutant: Mutant, tests: Tests, limit: float) -> None:
        """Try a mutant in a free copy."""
        tree = self._free.pop()
        (tree / mutant.file).write_text(mutant.text)
        trial.forget_compiled(tree / mutant.file)
        self._running[tree] = mutant, trial.start(tree, _folder(tree), tests, limit)

    @property
    def full(self) -> bool:
        """Whether every copy is in use."""
        return not self._free

    def ended(self, to_the_last: bool = False) -> Iterator[tuple[Mutant, Outcome]]:
        """Yield what ended; wait until a copy is free, or all are."""
        while self._running:
            for tree, (mutant, running) in list(self._running.items()):
                outcome = running.ended()
                if outcome is not None:
                    shutil.copy2(ROOT / mutant.file, tree / mutant.file)
                    del self._running[tree]
                    self._free.append(tree)
                    yield mutant, outcome
            if self._free and not to_the_last:
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """End what runs: a trial leads a group of processes, so it outlives this one."""
        for _, running in self._running.values():
            running.stop()

    def failing(self, tests: Tests) -> list[str]:
        """Return which of the tests fail without a mutant."""
        tree = self._free[0]
        return trial.failing(trial.start(tree, _folder(tree), tests, 3600, every=True))


def _folder(tree: Path) -> Path:
    return tree.with_name(tree.name + "-trial")


def equivalents() -> dict[str, str]:
    """Return the reason why a mutant changes no behaviour, by its id."""
    noted = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text()).get("mutant", [])
    return {
        hashlib.sha256("\n".join((note["file"], note["function"], *note["change"])).encode()).hexdigest()[:12]: reason
        for note in noted
        for reason in [note["reason"]]
    }


def run(arguments: argparse.Namespace, mutants: list[Mutant], results: Results) -> None:
    """Try the mutants that have no result yet; with `--again`, the survivors too."""
    reasons = equivalents()
    measured = Measured(arguments.work, arguments.measure, arguments.jobs)
    bench = Bench(arguments.work, arguments.jobs)
    try:
        _try_all(arguments, mutants, results, measured, bench, reasons)
    finally:
        bench.stop()
    _confirm(bench, measured, mutants, results)


def _try_all(
    arguments: argparse.Namespace,
    mutants: list[Mutant],
    results: Results,
    measured: Measured,
    bench: Bench,
    reasons: Container[str],
) -> None:
    until = time.monotonic() + 60 * arguments.minutes
    for mutant in mutants:
        before = results.of.get(mutant.id)
        if before and not (arguments.again and before.verdict == "survived" and mutant.id not in reasons):
            continue
        if arguments.only and arguments.only not in f"{mutant.file} {mutant.id}":
            continue
        if time.monotonic() > until:
            break
        bench.start(mutant, measured.tests(mutant, arguments.also), arguments.seconds)
        for ended, outcome in bench.ended() if bench.full else ():
            _tell(ended, outcome, results)
    for ended, outcome in bench.ended(to_the_last=True):
        _tell(ended, outcome, results)


def _tell(mutant: Mutant, outcome: Outcome, results: Results) -> None:
    results.add(mutant, outcome)
    told = f"{mutant.id} {outcome.verdict} {outcome.seconds} s, {outcome.run} tests run {outcome.test}"
    print(told, file=sys.stderr, flush=True)


def _confirm(bench: Bench, measured: Measured, mutants: list[Mutant], results: Results) -> None:
    """Run every test that killed a mutant without one: a test that fails then has killed nothing."""
    outcomes = [results.of[mutant.id] for mutant in mutants if mutant.id in results.of]
    killers = {outcome.test for outcome in outcomes if outcome.verdict == "killed" and "::" in outcome.test}
    for test in bench.failing(Tests({test: measured.seconds(test) for test in killers})) if killers else ():
        spoilt = [m for m in mutants if m.id in results.of and results.of[m.id].test == test]
        print(f"{test} fails without a mutant; {len(spoilt)} kills do not count", file=sys.stderr)
        for mutant in spoilt:
            results.add(mutant, Outcome("survived", test, unrun=1))


def show(mutants: list[Mutant], results: Results) -> None:
    """Print the survivors with their diffs, then the figures."""
    reasons = equivalents()
    counts: Counter[str] = Counter()
    for mutant in mutants:
        outcome = results.of.get(mutant.id)
        verdict = "not tried" if outcome is None else outcome.verdict
        if verdict == "survived" and mutant.id in reasons:
            verdict = "equivalent"
        counts[verdict] += 1
        if outcome and verdict == "survived":
            left = f", {outcome.unrun} not run" if outcome.unrun else ""
            print(f"\n{mutant.id} {mutant.file}:{mutant.lines[0]} {mutant.function} ({outcome.run} tests{left})")
            print(mutant.diff)
    caught = counts["killed"] + counts["hung"] + counts["crashed"]
    telling = caught + counts["survived"]
    print(f"\n{len(mutants)} mutants:", ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    print(f"kill rate among those that change behaviour: {caught}/{telling} = {100 * caught / max(1, telling):.1f}%")


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other mutants")
    parser.add_argument("--seconds", type=float, default=60, help="processor time for one mutant's tests")
    parser.add_argument("--minutes", type=float, default=600, help="time limit of this run")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes measure and try")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutation", help="folder for results and copies")
    parser.add_argument("--measure", action="store_true", help="find which lines new and changed tests run")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--only", help="only mutants whose file or id contains this text")
    parser.add_argument("--also", action="append", default=[], metavar="FILE", help="run this test file on each mutant")
    parser.add_argument("--show", action="store_true", help="try nothing, print the results so far")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    mutants = drawn(arguments.work, arguments.sample, arguments.seed)
    results = Results(arguments.work / "results.jsonl")
    if not arguments.show:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
        run(arguments, mutants, results)
    show(mutants, results)


if __name__ == "__main__":
    main()
