"""Run the conformance suite of the language against an implementation. It needs the Python standard library alone.

    python scripts/conformance/run.py -- python scripts/conformance/ours.py
    python scripts/conformance/run.py --cases tests/conformance/cases --without ops -- ./my-implementation

The implementation is a program that reads one case a line from its standard input, as JSON, and writes one answer a
line, as JSON: `{"tensors": {key: {"dtype", "shape", "elements"}}}`, or `{"errors": [code, …]}`. The format of cases is
described in `tests/conformance/README.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["cases_of", "digest", "judged"]

CASES = Path(__file__).parents[2] / "tests" / "conformance" / "cases"


def cases_of(folder: Path, without: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cases of a folder with their names; those that need what an implementation lacks are left out."""
    for path in sorted(folder.glob("*.json")):
        for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            if not set(case["needs"]) & set(without):
                yield f"{path.stem}/{number}: {case['name']}", case


def digest(tensors: Mapping[str, Any]) -> str:
    """Return the hash of tensors of whole numbers: key, a zero byte, elements as little-endian int64, keys sorted."""
    whole = hashlib.sha256()
    for key in sorted(tensors):
        elements = tensors[key]["elements"]
        whole.update(key.encode() + b"\0" + struct.pack(f"<{len(elements)}q", *map(int, elements)))
    return whole.hexdigest()


def judged(case: Mapping[str, Any], answer: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an answer; None where it is right."""
    if "errors" in case:
        found = sorted(set(answer.get("errors", ())))
        return None if found == case["errors"] else f"refused with {found}, and {case['errors']} is right"
    if "errors" in answer:
        return f"refused with {answer['errors']}"
    made = answer["tensors"]
    if made.keys() != case["expected"].keys():
        return f"made {sorted(made)}, and {sorted(case['expected'])} is right"
    if "digest" in case:
        shapes = {key: list(tensor["shape"]) for key, tensor in made.items()}
        return None if shapes == case["expected"] and digest(made) == case["digest"] else "other shapes or elements"
    wrong = [key for key, tensor in case["expected"].items() if made[key] != tensor]
    return f"wrong: {wrong}" if wrong else None


def main() -> None:
    """Ask an implementation, and print what it gets wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--without", nargs="*", default=[], help="what the implementation lacks: ops")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    cases = list(cases_of(options.cases, options.without))
    lines = "\n".join(json.dumps(case) for _, case in cases)
    done = subprocess.run(options.command, input=lines, stdout=subprocess.PIPE, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(cases):
        raise SystemExit(f"{len(answers)} answers to {len(cases)} cases")
    wrong = [(name, text) for (name, case), answer in zip(cases, answers) if (text := judged(case, answer))]
    for name, text in wrong:
        print(f"{name}: {text}"[:300])
    print(f"{len(cases) - len(wrong)} of {len(cases)} cases")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
