from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.language.folding import fold, fold_groups, fold_items

CASES = [
    ([], []),
    (["weight"], [("weight", 1)]),
    (["7"], [("7", 1)]),
    (["h.0.w"], [("h.0.w", 1)]),
    (["h.0.w", "h.1.w"], [("h.{0,1}.w", 2)]),
    ([f"h.{i}.w" for i in range(32)], [("h.{0..31}.w", 32)]),
    ([f"h.{i}.w" for i in (5, 0, 2)], [("h.{0,2,5}.w", 3)]),
    ([f"h.{i}.w" for i in (0, 1, 2, 3, 7, 9, 10, 11)], [("h.{0..3,7,9..11}.w", 8)]),
    ([f"block_{i:02d}" for i in range(12)], [("block_{00..11}", 12)]),
    (["a.1", "a.01", "a.10"], [("a.{01,1,10}", 3)]),
    (["fc1", "fc2", "fc3"], [("fc{1..3}", 3)]),
    (["h.0.w", "h.0.b", "h.1.b"], [("h.0.w", 1), ("h.{0,1}.b", 2)]),
    (["a.0", "b.0", "a.1"], [("a.{0,1}", 2), ("b.0", 1)]),
    (["a.0", "a.0"], [("a.0", 1)]),
    (["a.b.", "", "{0}"], [("a.b.", 1), ("", 1), ("{0}", 1)]),
    (["h." + "1" * 5000, "h." + "2" * 5000], [("h." + "1" * 5000, 1), ("h." + "2" * 5000, 1)]),
]


@pytest.mark.parametrize(("keys", "expected"), CASES)
def test_keys_fold_to_exactly_this(keys: list[str], expected: list[tuple[str, int]]) -> None:
    assert fold(keys) == expected


def test_a_full_grid_folds_to_one_line() -> None:
    keys = [f"layers.{i}.experts.{e}.w" for i in range(4) for e in range(8)]
    assert fold(keys) == [("layers.{0..3}.experts.{0..7}.w", 32)]


def test_a_grid_with_a_hole_never_shows_the_missing_key() -> None:
    keys = [f"layers.{i}.experts.{e}.w" for i in range(4) for e in range(3) if (i, e) != (2, 1)]
    assert fold(keys) == [("layers.{0,1,3}.experts.{0..2}.w", 9), ("layers.2.experts.{0,2}.w", 2)]


def test_ragged_stages_fold_by_equal_depth() -> None:
    keys = [f"stages.{s}.blocks.{b}.w" for s, depth in enumerate([2, 2, 6, 2]) for b in range(depth)]
    assert fold(keys) == [("stages.{0,1,3}.blocks.{0,1}.w", 6), ("stages.2.blocks.{0..5}.w", 6)]


def test_keys_with_other_labels_stay_apart() -> None:
    keys = [f"h.{i}.w" for i in range(4)]
    groups = fold_groups(keys, label=lambda key: key in {"h.0.w", "h.1.w"})
    assert [(g.text, g.first) for g in groups] == [("h.{0,1}.w", "h.0.w"), ("h.{2,3}.w", "h.2.w")]


def test_a_pattern_names_its_numbers_and_escapes_the_rest() -> None:
    keys = [f"a?[{i}].{j}->w" for i in range(2) for j in range(3)]
    assert [g.pattern for g in fold_groups(keys)] == [r"a\?\[{i}\].{j}\->w"]


def spelled_out(text: str) -> list[str]:
    """The keys a folded line stands for."""
    choices = []
    for part in re.split(r"(\{[^}]*\})", text):
        if not part.startswith("{"):
            choices.append([part])
            continue
        values: list[str] = []
        for piece in part[1:-1].split(","):
            low, _, high = piece.partition("..")
            values += [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if high else [piece]
        choices.append(values)
    return ["".join(parts) for parts in itertools.product(*choices)]


segments = st.one_of(st.sampled_from(["a", "fc", "00", "01", "09"]), st.integers(0, 12).map(str))


@given(st.lists(st.lists(segments, min_size=1, max_size=4).map(".".join), unique=True, max_size=60))
def test_folded_lines_stand_for_the_keys_given_once_each(keys: list[str]) -> None:
    folded = fold(keys)
    unfolded = [key for text, _ in folded for key in spelled_out(text)]
    assert sorted(unfolded) == sorted(keys)
    assert [count for _, count in folded] == [len(spelled_out(text)) for text, _ in folded]


@given(st.dictionaries(st.lists(segments, min_size=1, max_size=3).map(".".join), st.integers(0, 2), max_size=40))
def test_what_folds_by_label_is_each_label_s_keys_folded_by_themselves(labels: dict[str, int]) -> None:
    folded = fold_items(labels)
    assert folded == fold_groups(labels, label=labels.__getitem__)
    assert [group.first for group in folded] == sorted((group.first for group in folded), key=list(labels).index)
    for label in set(labels.values()):
        mine = [(group.text, group.count) for group in folded if labels[group.first] == label]
        assert mine == fold(key for key in labels if labels[key] == label)


def test_a_pattern_that_is_narrowed_may_capture_words() -> None:
    from ckptsurgery.language.covering import _narrowed

    assert _narrowed("{i}.w", ["stem.w", "body.w"], ["head.w"], "") == "{i:body,stem}.w"
    assert _narrowed("{i}.w", ["3.w", "10.w"], ["4.w"], "") == "{i:3,10}.w"
