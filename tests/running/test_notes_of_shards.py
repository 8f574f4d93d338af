"""What the files of one checkpoint say of themselves is taken over; where they differ, the output's report says so."""

import json

import pytest
import torch
from safetensors.torch import save_file

import ckptsurgery as cs


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("values, disputed", [(("1", "2"), ("step",)), (("1", "1"), ())])
def test_metadata_that_files_give_differently_is_said(tmp_path, indexed, values, disputed):
    folder = tmp_path / "source"
    folder.mkdir()
    keys = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for (key, name), value in zip(keys.items(), values):
        save_file({key: torch.ones(2)}, folder / name, metadata={"format": "pt", "step": value})
    if indexed:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": keys}))
    source = cs.open(folder)
    assert source.disputed == disputed
    report = cs.save(source, tmp_path / "out.safetensors")
    said = [note for note in report.notes if "different values" in note]
    assert len(said) == bool(disputed)
    assert all("step" in note for note in said)
    assert cs.open(tmp_path / "out.safetensors").metadata["step"] == values[-1]
