"""A report counts every entry once, and what it does not show it counts as well."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.errors import Diagnostic
from ckptsurgery.planning.report import ACTIONS, Proof, Report, ReportEntry
from ckptsurgery.specs import TensorSpec

ENTRIES = st.lists(
    st.builds(
        lambda action, shape, bare, cast: (action, None if bare else TensorSpec(shape, "F32"), cast),
        st.sampled_from(ACTIONS),
        st.lists(st.integers(0, 4), max_size=3),
        st.booleans(),
        st.sampled_from([None, ("F64", "F32"), ("BF16", "F32")]),
    ),
    max_size=12,
)


def report_of(rows: list[tuple[str, TensorSpec | None, tuple[str, str] | None]], **others: object) -> Report:
    ledger = tuple(
        ReportEntry(f"k{number}", action, spec, (f"s{number}",), "a rule", cast)
        for number, (action, spec, cast) in enumerate(rows)
    )
    return Report(ledger, "a.pt", "Net", **others)  # type: ignore[arg-type]


@given(ENTRIES)
def test_every_entry_is_counted_once(rows: list[tuple[str, TensorSpec | None, tuple[str, str] | None]]) -> None:
    report = report_of(rows)
    by_action = {action: tuple(f"k{n}" for n, row in enumerate(rows) if row[0] == action) for action in ACTIONS}
    lists = (report.loaded, report.initialised, report.kept, report.tied, report.missing_keys)
    assert (*lists, report.dropped, report.unexpected_keys) == tuple(by_action.values())
    assert report.cast == tuple(f"k{n}" for n, row in enumerate(rows) if row[2])

    told = report.to_json()
    assert told["counts"] == {**{action: len(keys) for action, keys in by_action.items()}, "cast": len(report.cast)}
    assert [entry["key"] for entry in told["ledger"]] == [f"k{number}" for number in range(len(rows))]
    assert [entry["shape"] for entry in told["ledger"]] == [list(spec.shape) if spec else None for _, spec, _ in rows]
    assert [entry["cast"] for entry in told["ledger"]] == [list(cast) if cast else None for _, _, cast in rows]
    assert json.loads(json.dumps(told)) == told

    wanted = [spec.numel for action, spec, _ in rows if spec and action in ("loaded", "initialised", "kept", "missing")]
    loaded = [spec.numel for action, spec, _ in rows if spec and action == "loaded"]
    assert report.coverage == (sum(loaded) / sum(wanted) if sum(wanted) else 1.0)

    assert Counter(row[0] for row in rows) == {
        action: int(count) for count, action in re.findall(rf"(\d+) ({'|'.join(ACTIONS)})\b", repr(report))
    }
    lines = [line for line in str(report).splitlines()[1:] if re.match(r"  \w", line)]
    heads = {line.split()[0]: line for line in lines}
    for action, keys in by_action.items():
        numel = sum(spec.numel for row_action, spec, _ in rows if spec and row_action == action)
        if keys:
            assert re.search(rf"\b{len(keys):,} tensors?\b.*\b{numel:,} elements?\b", heads[action])
        else:
            assert action not in heads
    kinds = Counter(" -> ".join(cast) for _, _, cast in rows if cast)
    assert ("cast" in heads) is bool(kinds)
    for kind, count in kinds.items():
        assert f"{kind} ({count})" in heads["cast"]


@pytest.mark.parametrize("number", [15, 16, 17, 40])
def test_lists_that_are_cut_say_how_many_are_left(number: int) -> None:
    proofs = tuple(Proof(f"rule {n}", "copied", 1, 2, 8, "equal") for n in range(number))
    # no two keys are of one pattern
    ledger = tuple(ReportEntry("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQR"[n] * 2, "kept") for n in range(number))
    for text, more in ((str(Report((), proofs=proofs)), "more rules"), (str(Report(ledger)), "more patterns")):
        listed = len(re.findall(r"proved  copied|^    \w", text, re.MULTILINE))
        rest = re.search(rf"… and (\d+) {more}", text)
        assert listed == min(number, 16)
        assert listed + (int(rest[1]) if rest else 0) == number


def test_a_report_says_what_else_is_to_be_known() -> None:
    warning = Diagnostic("odd", "this is odd", severity="warning")
    report = Report((), "a", "b", notes=("one note",), warnings=(warning,), files=("x", "y"), bytes_written=12345)
    assert str(report).splitlines() == [
        "a -> b: 2 files, 12,345 bytes of tensors",
        "  note: one note",
        "  warning: this is odd",
    ]
    told = report.to_json()
    assert told["notes"] == ["one note"]
    assert told["files"] == ["x", "y"]
    assert told["warnings"] == [warning.to_json()]
    assert (told["source"], told["target"], told["bytes_read"], told["bytes_written"]) == ("a", "b", 0, 12345)
    assert report._repr_html_() == f"<pre>{str(report).replace('>', '&gt;')}</pre>"


@pytest.mark.parametrize(("loaded", "share"), [(1, "0.1"), (9, "0.9"), (995, "99.5"), (999, "99.9"), (500, "50.0")])
def test_a_share_is_cut_off_and_not_rounded(loaded: int, share: str) -> None:
    rows = [("loaded", TensorSpec([loaded], "F32"), None), ("missing", TensorSpec([1000 - loaded], "F32"), None)]
    assert f"{share}% of the model's elements loaded" in str(report_of(rows))
