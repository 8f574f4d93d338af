"""Names that no model gives its tensors, and files hold all the same: they are written and read back, or refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.storage.formats.table import writable_suffixes

PARTS = [
    *"ab01{}'\"\\/|:?#%=[]+-> \n\t\x00\x7f\u2028é😀",
    ".",
    "..",
    "__",
    "~",
    "_metadata",
    "model",
    "state_dict",
    "data",
    "mod",
]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
REFUSED = {"reserved-name", "tie-not-in-format"}


@pytest.mark.parametrize("suffix", writable_suffixes())
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_what_is_written_is_read_under_the_same_names(suffix: str, names: list[str]) -> None:
    source = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"odd{suffix}")
        try:
            cs.save(source, path)
        except cs.CheckpointError as error:
            assert {problem.code for problem in error.diagnostics} <= REFUSED and not path.exists()
        else:
            written = cs.open(path)
            assert {name: written.load(name).tolist() for name in written} == {k: t.tolist() for k, t in source.items()}


@pytest.mark.parametrize("suffix", writable_suffixes())
def test_a_tensor_without_a_name_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError) as caught:
        cs.save({"": torch.ones(1), "a": torch.ones(1)}, tmp_path / f"odd{suffix}")
    assert [problem.code for problem in caught.value.diagnostics] == ["bad-name"] and not list(tmp_path.iterdir())
