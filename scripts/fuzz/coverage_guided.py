"""Fuzzes one reader guided by what code its inputs reach, by atheris (`pip install atheris`), for as long as it is let.

    python scripts/fuzz/coverage_guided.py torch-zip -max_total_time=3600 corpus/
    python scripts/fuzz/coverage_guided.py torch-zip crash-…            # one input again

Options behind the reader's name are libFuzzer's. A folder keeps what was found, and is where the next run goes on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckptsurgery"], enable_loader_override=False):
    import targets

    import ckptsurgery.planning.planner
    import ckptsurgery.storage.formats.plain_pickle
    import ckptsurgery.storage.formats.torch_legacy
    import ckptsurgery.storage.formats.torch_zip  # noqa: F401 - imported to be instrumented


def main() -> None:
    """Run one reader until the time is up or a promise is broken."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in targets.TARGETS:
        sys.exit(f"usage: coverage_guided.py READER [libFuzzer's options]; readers: {', '.join(targets.TARGETS)}")
    target = targets.TARGETS[name]
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as root:
        (Path(root) / "out").mkdir()
        corpus = Path(root) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)

        def run(data: bytes) -> None:
            if target.run(data, Path(root)) and target.compare is not None:
                target.compare(Path(root))

        given = any(Path(word).is_file() for word in sys.argv[2:])  # inputs to be run again, and no corpus with them
        atheris.Setup([sys.argv[0], *sys.argv[2:], *([] if given else [str(corpus)])], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
