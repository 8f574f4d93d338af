"""Every source into every sink with every step, against plain torch; written against the public face alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cells import SINKS, SOURCES, as_shards, hold, model_for, same
from safetensors.torch import save_file
from steps import STEPS, known, recipe_of

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parent.parent / "storage"))
from hub_server import serving

EVERYTHING = tuple(STEPS)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("source", SOURCES)
def test_all_steps_together(source: str, sink: str, tmp_path: Path) -> None:
    hold(source, sink, EVERYTHING, tmp_path)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("source", SOURCES)
def test_each_step_alone_into_shards(source: str, step: str, tmp_path: Path) -> None:
    hold(source, "shards", [step], tmp_path)


@pytest.mark.parametrize("sink", ["file", "torch zip", "state_dict", "model", "meta model"])
@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone_out_of_shards(step: str, sink: str, tmp_path: Path) -> None:
    hold("shards", sink, [step], tmp_path)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("assign", [False, True])
def test_load_into_takes_what_a_recipe_makes_and_initialises_the_rest(
    source: str, assign: bool, tmp_path: Path
) -> None:
    steps = list(STEPS.values())
    state, expected = known(EVERYTHING)
    opened = SOURCES[source](state, tmp_path)
    model = model_for(cs.plan(state, recipe_of(steps)), meta=assign)
    with torch.device("meta" if assign else "cpu"):
        model.head = torch.nn.Linear(3, 2)
    report = cs.load_into(model, opened, recipe_of(steps, init={"head.{l}": "constant(0.25)"}), assign=assign)
    found = dict(model.state_dict())
    assert torch.equal(found.pop("head.weight"), torch.full((2, 3), 0.25))
    assert torch.equal(found.pop("head.bias"), torch.full((2,), 0.25))
    same(found, expected)
    assert set(report.initialised) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_saved_as_it_is_does_not_differ(source: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    opened = SOURCES[source](known(EVERYTHING)[0], tmp_path / "in")
    with cs.open(opened) as checkpoint:
        for name in ("out.safetensors", "out", "out.pt"):
            cs.save(
                checkpoint, tmp_path / name, max_shard_size=200_000 if name == "out" else None, check=True, sync=False
            )
            assert cs.diff(checkpoint, tmp_path / name).identical


@pytest.mark.parametrize("source", ["file", "shards", "torch zip"])
def test_a_difference_is_found_in_whatever_a_recipe_makes(source: str, tmp_path: Path) -> None:
    steps = list(STEPS.values())
    state, made = known(EVERYTHING)
    expected = {key: tensor.clone() for key, tensor in made.items()}
    expected["tie.head"] = expected["tie.embed"]
    with cs.open(SOURCES[source](state, tmp_path)) as checkpoint:
        assert cs.diff(checkpoint, expected, recipe_of(steps)).identical
        expected["turn.large"][-1, -1] += 1
        expected["fp8.1"][199, 260] += 8
        assert set(cs.diff(checkpoint, expected, recipe_of(steps)).values) == {"turn.large", "fp8.1"}


HUB = """
import sys
from pathlib import Path
from cells import SINKS, STEPS, hold_sink
import ckptsurgery as cs
with cs.open("hf://org/model") as checkpoint:
    for number, sink in enumerate(SINKS):
        folder = Path(sys.argv[1]) / str(number)
        folder.mkdir()
        hold_sink(checkpoint, sink, list(STEPS), folder)
print("held")
"""


def test_all_steps_from_a_hub_into_every_sink(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    as_shards(known(EVERYTHING)[0], tmp_path / "in")
    with serving() as hub:
        hub.repos["org/model"] = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": paths}
        command = [sys.executable, "-c", HUB, str(tmp_path / "out")]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr


@pytest.mark.parametrize("op", ["", " | cast(f16)"])
@pytest.mark.parametrize("sink", ["file", "state_dict", "model"])
def test_what_would_adjoin_in_one_file_is_read_from_two(sink: str, op: str, tmp_path: Path) -> None:
    """The second part lies in its shard where the first ends in its own, so that only the file tells them apart."""
    parts = {key: torch.randn(9, 21, generator=torch.Generator().manual_seed(n)) for n, key in enumerate("wxyz")}
    table = {"x": "one", "z": "one", "w": "two", "y": "two"}
    shards = {"one": ("x", "z"), "two": ("w", "y")}
    for name, keys in shards.items():
        save_file({key: parts[key] for key in keys}, tmp_path / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {key: f"{name}.safetensors" for key, name in table.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    recipe = cs.Recipe(["{p:x,y} [o d] -> m.w [(p o) d]" + op], drop=["w", "z"])
    expected = torch.cat([parts["x"], parts["y"]])
    for _, found in SINKS[sink](cs.plan(tmp_path, recipe), tmp_path / "out"):
        same(found, {"m.w": expected.half() if op else expected})
