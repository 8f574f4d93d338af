"""Put the recipes of model types that were proved on the shelf, with a line each in its list and in the docs.

    python scripts/exchange/prove_transformers.py results.jsonl
    python scripts/exchange/ship_recipes.py results.jsonl

A recipe ships if its proof is bit for bit in both directions, and if no recipe of its name was written by hand. Files
of earlier runs are replaced. The page of the docs has a row for every name in the table of transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import transformers
from prove_transformers import table

import ckptsurgery as cs

ROOT = Path(__file__).parents[2]
SHELF = ROOT / "recipes"
MARK = "# Read from the conversion table of transformers and proved by scripts/exchange/prove_transformers.py.\n"
LONGEST = 160
START, END = "<!-- read from transformers -->\n", "<!-- end -->\n"


def shipped(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The texts of the recipes that ship, by name."""
    found = {}
    for row in rows:
        proved = row["recipe"] == row["forth"] == row["back"] == "ok" and row["rules"] and not row.get("own_config")
        if not proved or row["name"] not in transformers.CONFIG_MAPPING:
            continue
        family = row["name"].replace("-", "_")
        path = SHELF / family / "hf_to_hf5.toml"
        by_hand = path.exists() and not path.read_text().startswith(MARK)
        head, rest = row["toml"].split("\n", 1)
        summary = f"summary = \"{row['name']}: transformers' checkpoints -> transformers 5's modules\""
        text = "\n".join([MARK + head, summary, rest.partition("\n")[2]])
        if not by_hand and max(map(len, text.splitlines())) <= LONGEST:
            found[f"{family}/hf_to_hf5"] = text
    return found


def main() -> None:
    """Write the files, the list and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    last = {row["name"]: row for row in map(json.loads, options.results.read_text().splitlines())}
    for path in SHELF.glob("*/*.toml"):
        if path.read_text().startswith(MARK):
            path.unlink()
    recipes = shipped([last[name] for name in sorted(last)])
    for name, text in recipes.items():
        path = SHELF / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    readme = SHELF / "README.md"
    lines = [f"| `{name}` | {cs.load_recipe(name).summary} |" for name in sorted(recipes)]
    listing = "\n".join(["| recipe | what it does |", "| --- | --- |", *lines]) + "\n"
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(before + START + listing + END + rest.partition(END)[2])
    (ROOT / "docs" / "reference" / "transformers.md").write_text(table(options.results, set(recipes)))
    print(f"{len(recipes)} recipes of model types")


if __name__ == "__main__":
    main()
