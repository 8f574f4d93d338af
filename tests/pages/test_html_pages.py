"""Pages: one file that fetches nothing, of bounded size, in which keys stand as text and never as markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.comparing.heat_map import heat_rows
from ckptsurgery.planning.layout import Piece
from ckptsurgery.planning.picturing import boxes_of
from ckptsurgery.reporting.inspecting import inspection

EVIL = "</script><img src=x onerror=alert(1)>"


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def evil_pages() -> dict[str, str]:
    state = {EVIL + ".w": torch.ones(2), "h.0.w": torch.ones(2)}
    plan = cs.plan(state, cs.Recipe(rest="keep"))
    other = {k: v + 1 for k, v in state.items()} | {EVIL: torch.ones(1)}
    return {
        "plan": plan.to_html(EVIL),
        "diff": cs.diff(state, other).to_html(EVIL),
        "inspect": inspection(cs.open(state)).to_html(EVIL),
    }


@pytest.mark.parametrize("kind", ["plan", "diff", "inspect"])
def test_a_page_is_one_file_and_keys_are_no_markup(kind: str) -> None:
    text = evil_pages()[kind]
    assert "<img" not in text and text.count("</script>") == 2
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text)
    assert any(EVIL in json.dumps(value) for value in data_of(text).values())


def test_a_plan_of_100_000_keys_is_a_page_below_2_megabytes() -> None:
    spec = cs.TensorSpec([64, 64], "BF16")
    folds = {f"layers.{i}.experts.{j}.{m}.weight": spec for i in range(40) for j in range(800) for m in "abc"}
    odd = {f"name{i * i % 99991}x{i}.{'ab'[i % 2]}": spec for i in range(9000)}
    text = cs.plan({**folds, **odd}, cs.Recipe(rest="keep")).to_html()
    data = data_of(text)
    assert len(text) < 2_000_000
    assert data["source"]["keys"] == len(folds) + len(odd)
    shown = sum(row[1] for row in data["source"]["rows"])
    assert shown + data["source"]["left"] == len(folds) + len(odd)


def test_a_row_says_what_becomes_of_its_keys() -> None:
    w = torch.arange(24.0).reshape(6, 4)
    state = {"h.0.qkv": w, "h.1.qkv": w, "old": w, "e": w}
    recipe = cs.Recipe(
        ["h.{i}.qkv [(p r) d] -> h.{i}.{p:q,k,v} [d r]", "e -> embed"], drop=["old"], tie={"head": "embed"}
    )
    data = data_of(cs.plan(state, recipe).to_html("a plan"))
    source = {row[0]: row for row in data["source"]["rows"]}
    target = {row[0]: row for row in data["target"]["rows"]}
    assert source["old"][4:] == [-1, -1, "dropped by old"]
    assert source["h.{0,1}.qkv"][1] == 2 and data["rules"][source["h.{0,1}.qkv"][4]]["text"].startswith("h.{i}.qkv")
    assert target["head"][7] == target["embed"][7] == "embed"
    (move,) = data["programs"][source["h.{0,1}.qkv"][5]]["moves"]
    assert [piece["from"][1] for piece in move["pieces"]] == [
        [[0.0, 0.3333, 0.0, 1.0]],
        [[0.3333, 0.6667, 0.0, 1.0]],
        [[0.6667, 1.0, 0.0, 1.0]],
    ]
    assert [piece["to"] for piece in move["pieces"]] == [[n, [[0.0, 1.0, 0.0, 1.0]]] for n in range(3)]


@pytest.mark.parametrize(
    "piece, shape, wanted",
    [
        (Piece(0, 0, (4, 3), 0, (6, 1), 0, (3, 1)), (4, 6), [[0, 1, 0, 0.5]]),  # the left half of the columns
        (Piece(0, 0, (2, 3), 3, (6, 1), 0, (3, 1)), (4, 3), [[0.25, 0.5, 0, 1], [0.75, 1, 0, 1]]),  # every other row
        (Piece(0, 0, (), 5, (), 0, ()), (2, 3), [[0.5, 1, 0.6667, 1]]),  # one element
        (Piece(0, 0, (3,), 0, (1,), 0, (1,)), (3,), [[0, 1, 0, 1]]),  # a vector is one row
    ],
)
def test_a_piece_is_drawn_where_it_lies(piece: Piece, shape: tuple[int, ...], wanted: list[list[float]]) -> None:
    assert boxes_of(piece, shape, of_target=False) == wanted


def test_a_heat_map_tells_equal_from_absent_and_counts_every_tensor() -> None:
    a = {f"h.{i}.{m}": torch.full((3,), float(i)) for i in range(5) for m in "pq"} | {"norm": torch.ones(2)}
    b = {k: v.clone() for k, v in a.items()}
    b["h.3.p"][1] += 0.5
    b["h.2.q"] = torch.ones(4)
    found = cs.diff(a, b)
    rows, columns = heat_rows(found.alike, found.values)
    cells = dict(rows)
    assert columns == [0, 1, 2, 3, 4]
    assert cells["h.{i}.p"][3][:1] + cells["h.{i}.p"][3][2:4] == [0.5, 1, 3]
    assert {layer: cell for layer, cell in cells["h.{i}.p"].items() if layer != 3} == dict.fromkeys([0, 1, 2, 4], 0)
    assert 2 not in cells["h.{i}.q"] and cells["norm"] == {-1: 0}


def test_the_command_writes_the_page_and_nothing_but_a_page(tmp_path: Path) -> None:
    source, page = tmp_path / "a.safetensors", tmp_path / "page.html"
    cs.save({"a.w": torch.ones(2)}, source)
    before = source.read_bytes()

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptsurgery", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    for command in (["plan", source], ["inspect", source], ["diff", source, source]):
        done = run(*command, "--html", page)
        assert done.returncode == 0 and f"wrote {page}" in done.stderr and done.stdout
        assert page.read_text().startswith("<!doctype html>")
        page.unlink()
    done = run("inspect", source, "--html", source)
    assert done.returncode == 1 and "a.html" in done.stderr and source.read_bytes() == before
    done = run("inspect", source, "--html", tmp_path / "nowhere" / "page.html")
    assert done.returncode == 1 and "no such file" in done.stderr
