"""Pages as a browser shows them: what is drawn, what a search and a click find, in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from browser import rows, visit

import ckptsurgery as cs
from ckptsurgery.reporting.inspecting import inspection

EVIL = "<img src=x onerror=document.title='run'>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    w = torch.arange(24.0).reshape(6, 4)
    state = {f"model.h.{i}.{m}": w + i for i in range(12) for m in ("qkv", "out", "old")}
    state |= {"model.embed": w, f"model.{EVIL}": w}
    rules = [
        "model.h.{i}.qkv [(p r) d] -> h.{i}.{p:q,k,v} [d r]",
        "model.h.{i}.out -> h.{i}.out",
        "model.embed -> embed",
    ]
    recipe = cs.Recipe(rules, rest="keep", drop=["model.h.{i}.old"], tie={"head": "embed"})
    plan = cs.plan(state, recipe)
    other = {k: v + (k == "model.h.7.out") for k, v in state.items()}
    (folder / "plan.html").write_text(plan.to_html("a plan"))
    (folder / "diff.html").write_text(cs.diff(state, other).to_html("a difference"))
    (folder / "inspect.html").write_text(inspection(cs.open(state)).to_html("a checkpoint"))
    chosen = cs.select(torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Linear(40, 60)), "0.weight", "1.bias")
    before = chosen.stats()
    cs.select(chosen.model, "0.weight").init_("xavier_normal")
    promised = cs.select(chosen.model, "0.weight").promised("xavier_normal")
    (folder / "stats.html").write_text(chosen.stats().to_html("before and after", before=before, promised=promised))
    return folder


def test_a_plan_is_two_trees_with_ribbons(chromium: str, pages: Path, tmp_path: Path) -> None:
    dom = visit(chromium, pages / "plan.html", tmp_path, "pick=model.h.3.qkv", "--dump-dom")
    assert rows(dom, 0) == [
        "model",
        "h.{0..11}",
        "qkv",
        "out",
        "old",
        "embed",
        EVIL.replace("<", "&lt;").replace(">", "&gt;"),
    ]
    assert {"q", "k", "v"} <= set("".join(rows(dom, 1))) and "head" in rows(dom, 1)
    assert dom.count("<path ") >= 4 and "<title>a plan</title>" in dom  # the key's markup did not run
    detail = dom.split("<aside>")[1]
    assert "model.h.{i}.qkv [(p r) d]" in detail.replace("&gt;", ">") and detail.count("<rect ") >= 3 + 4
    assert 'class="row lost' in dom and dom.count('class="tie"') == 2
    assert int(re.search(r'data-painted="(\d+)"', dom)[1]) >= 0


def test_a_search_finds_the_key_in_a_folded_row(chromium: str, pages: Path, tmp_path: Path) -> None:
    dom = visit(chromium, pages / "plan.html", tmp_path, "search=model.h.7.out", "--dump-dom")
    assert 'data-found="1"' in dom and len(re.findall(r'class="row[^"]*found"', dom)) == 1
    dom = visit(chromium, pages / "inspect.html", tmp_path, "search=model.h.12.out", "--dump-dom")
    assert 'data-found="0"' in dom


def test_a_difference_is_one_coloured_cell(chromium: str, pages: Path, tmp_path: Path) -> None:
    dom = visit(chromium, pages / "diff.html", tmp_path, "", "--dump-dom")
    cells = re.findall(r'<td[^>]*style="background: ?([^"]*)"[^>]*>', dom)
    assert sum("hsl" in colour or "rgb" in colour for colour in cells) == 1
    assert len(cells) == 3 * 12 + 2


def test_statistics_are_histograms_before_and_after(chromium: str, pages: Path, tmp_path: Path) -> None:
    dom = visit(chromium, pages / "stats.html", tmp_path, "", "--dump-dom")
    assert dom.count('class="histogram"') == 2 and dom.count('class="now"') == dom.count('class="before"') == 2
    assert dom.count('class="promise ') == 3 and dom.count('class="kept"') == 1 and "NaN" not in dom.split("<script")[0]
    dom = visit(chromium, pages / "stats.html", tmp_path, "search=0.weight", "--dump-dom")
    assert 'data-found="1"' in dom


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_draw(chromium: str, pages: Path, tmp_path: Path, theme: str) -> None:
    picture = tmp_path / "page.png"
    size = ("--window-size=600,400", f"--screenshot={picture}")
    visit(chromium, pages / "plan.html", tmp_path / "profile", f"theme={theme}", *size)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 8000  # an empty one has 2,000
    dom = visit(chromium, pages / "plan.html", tmp_path / "profile", f"theme={theme}", "--dump-dom")
    assert f'data-theme="{theme}"' in dom
