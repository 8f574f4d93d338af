"""Compare what ranks do together with what one process does, on random meshes, placements and recipes.

    python scripts/fuzz/meshes.py                        # 40 cases on 2, 3 and 4 ranks each
    python scripts/fuzz/meshes.py --ranks 3 --seeds 17   # one case again

The cases are those of `tests/sharding/random_cases.py`; what is wrong with a case is printed with its seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "sharding"))

import random_cases
from rank_group import Group, RankError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="*", help="the cases; the first 40 by default")
    parser.add_argument("--until", type=int, default=40, help="how many cases, where none is named")
    asked = parser.parse_args()
    failed = 0
    for ranks in asked.ranks:
        group = Group(ranks)
        with tempfile.TemporaryDirectory() as folder:
            for seed in asked.seeds if asked.seeds is not None else range(asked.until):
                try:
                    wrong = sorted({line for lines in group(random_cases.check, seed, folder) for line in lines})
                except RankError as error:
                    wrong = [*dict.fromkeys(line for line in str(error).splitlines() if line[:1].isalpha())]
                failed += bool(wrong)
                if wrong:
                    print(
                        f"{ranks} ranks, seed {seed}: {random_cases.drawn(seed).rules}", *wrong, sep="\n  ", flush=True
                    )
        group.close()
        print(f"{ranks} ranks: done, {failed} failed so far", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
