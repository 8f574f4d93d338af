"""The hub, on loopback, in a process of its own: huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, serving
from safetensors.torch import save

PROGRAM = """
import json, sys
from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage import open_checkpoint
try:
    asked = {name: True if name in ("by_file", "download") else value
             for name, _, value in (word.partition("=") for word in sys.argv[2:])}
    with open_checkpoint(sys.argv[1], **asked) as ckpt:
        sums = {key: sum(ckpt.read(key)) for key in ckpt}
        print(json.dumps({"keys": list(ckpt), "sums": sums, "config": ckpt.config, "source": ckpt.source,
                          "ties": [tie.names for tie in ckpt.ties], "torch": "torch" in sys.modules}))
except CheckpointError as error:
    print(json.dumps({"codes": [d.code for d in error.diagnostics], "help": error.diagnostics[0].help,
                      "text": str(error)}))
"""

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        running.repos["org/single"] = {
            "model.safetensors": save({"a": A}),
            "pytorch_model.bin": b"never fetched",
            "config.json": b'{"hidden_size": 3}',
        }
        running.repos["org/sharded"] = {
            "model-00001-of-00002.safetensors": save({"a": A}),
            "model-00002-of-00002.safetensors": save({"b": B}),
            "model.safetensors.index.json": json.dumps(
                {
                    "metadata": {"total_size": 40, "head": "a"},
                    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
                }
            ).encode(),
        }
        running.repos["org/nested"] = {
            "unet/diffusion_model.safetensors": save({"u": A}),
            "unet/config.json": b'{"unet": true}',
            "vae/model.safetensors": save({"v": B}),
        }
        yield running


def opened(hub: Hub, source: str, home: Path, *options: str, **env: str) -> dict[str, Any]:
    settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    command = [sys.executable, "-c", PROGRAM, source, *options]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def asked_for(hub: Hub) -> set[str]:
    """The files that were fetched; their list is asked for as well."""
    return {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}


def test_a_single_file_comes_with_its_config_and_without_the_pickle(hub: Hub, tmp_path: Path) -> None:
    found = opened(hub, "hf://org/single", tmp_path)
    assert found["keys"] == ["a"]
    assert found["config"] == {"hidden_size": 3}
    assert found["source"] == "hf://org/single"
    assert found["torch"] is False
    assert asked_for(hub) == {"model.safetensors", "config.json"}


def test_shards_come_with_their_index_and_their_aliases(hub: Hub, tmp_path: Path) -> None:
    found = opened(hub, "hf://org/sharded@v1", tmp_path)
    assert found["keys"] == ["a", "b", "head"]
    assert found["ties"] == [["a", "head"]]
    assert found["sums"]["head"] == sum(A.numpy().tobytes())


def test_a_file_and_a_folder_inside_of_a_repository_can_be_named(hub: Hub, tmp_path: Path) -> None:
    file = opened(hub, "hf://org/nested/unet/diffusion_model.safetensors", tmp_path)
    folder = opened(hub, "hf://org/nested/unet", tmp_path)
    assert file["keys"] == folder["keys"] == ["u"]
    assert file["config"] == folder["config"] == {"unet": True}
    assert opened(hub, "hf://org/nested@main/vae", tmp_path)["keys"] == ["v"]


def test_headers_and_ranges_are_fetched_and_what_the_cache_holds_is_not(hub: Hub, tmp_path: Path) -> None:
    big = {f"layers.{n}": torch.full((64, 1024), float(n)) for n in range(8)}
    hub.repos["org/big"] = {"model.safetensors": save(big), "config.json": b"{}"}
    found = opened(hub, "hf://org/big", tmp_path)
    assert list(found["sums"]) == list(big)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert opened(hub, "hf://org/big", tmp_path, "download") == found
    (kept,) = tmp_path.rglob("model.safetensors")
    assert kept.stat().st_size == len(hub.repos["org/big"]["model.safetensors"])
    hub.requests.clear()
    assert opened(hub, "hf://org/big", tmp_path) == found
    assert "model.safetensors" not in asked_for(hub)


def test_companions_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/single"] |= {"tokenizer.json": b"{}", "notes.pdf": b"x"}
    program = "import sys, ckptsurgery as cs; r = cs.Recipe(rest='keep'); "
    program += "cs.plan(sys.argv[1], r).save(sys.argv[2], companions=True)"
    settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program, "hf://org/single", str(tmp_path / "out")]
    subprocess.run(command, env=settings, check=True, timeout=120)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"model.safetensors", "config.json", "tokenizer.json"}


PIPELINE = json.dumps(
    {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "safety": [None, None]}
)


@pytest.mark.parametrize("way", [(), ("download",)])
def test_a_pipeline_opens_with_its_components_before_the_keys(hub: Hub, tmp_path: Path, way: tuple[str, ...]) -> None:
    hub.repos["org/pipe"] = hub.repos["org/nested"] | {"model_index.json": PIPELINE.encode()}
    found = opened(hub, "hf://org/pipe", tmp_path, *way)
    assert found["keys"] == ["unet.u", "vae.v"]
    assert found["config"] == {"unet": True}
    assert opened(hub, "hf://org/pipe", tmp_path, "component=vae", *way)["keys"] == ["v"]
    assert opened(hub, "hf://org/pipe", tmp_path, "component=unet", *way)["config"] == {"unet": True}
    assert opened(hub, "hf://org/pipe", tmp_path, "file=vae/model.safetensors", *way)["keys"] == ["v"]
    wrong = opened(hub, "hf://org/pipe", tmp_path, "component=vea", *way)
    assert wrong["codes"] == ["missing-component"]


def test_a_file_of_another_format_can_be_named(hub: Hub, tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data" / "formats"
    hub.repos["org/other"] = {name: (data / name).read_bytes() for name in ("latest.h5", "flax.msgpack", "all.gguf")}
    assert len(opened(hub, "hf://org/other/latest.h5", tmp_path)["keys"]) == 12
    assert opened(hub, "hf://org/other", tmp_path)["codes"] == ["ambiguous-folder"]


def test_by_file_mounts_every_file_of_a_folder(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/parts"] = {f"rank{i}.safetensors": save({"w": B}) for i in range(2)}
    for way in ((), ("download",)):
        assert opened(hub, "hf://org/parts", tmp_path, "by_file", *way)["keys"] == ["rank0/w", "rank1/w"]


def test_a_shard_that_is_not_there_is_named_before_all_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    del hub.repos["org/sharded"]["model-00002-of-00002.safetensors"]
    found = opened(hub, "hf://org/sharded", tmp_path, "download")
    assert found["codes"] == ["missing-shard"]
    assert "the index names 1 shard that the repository does not hold" in found["text"]
    assert "model-00002-of-00002.safetensors" in found["text"] and "@rev" in found["help"]


@pytest.mark.parametrize("whole", ["model-00001-of-00002.safetensors", "model.safetensors"])
def test_a_whole_file_beside_an_index_is_ambiguous_unless_it_names_it(hub: Hub, tmp_path: Path, whole: str) -> None:
    files = hub.repos["org/sharded"]
    files |= {"model.safetensors": save({"z": A})}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"z": whole, "a": whole}}).encode()
    if whole != "model.safetensors":
        assert opened(hub, "hf://org/sharded", tmp_path, "download")["codes"] == ["ambiguous-folder"]
    else:
        hub.repos["org/sharded"]["model.safetensors"] = save({"z": A, "a": B})
        assert opened(hub, "hf://org/sharded", tmp_path, "download")["keys"] == ["z", "a"]


def test_offline_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    online = opened(hub, "hf://org/sharded", tmp_path, "download")
    asked = len(hub.requests)
    offline = opened(hub, "hf://org/sharded", tmp_path, HF_HUB_OFFLINE="1")
    assert offline == online
    assert len(hub.requests) == asked


def test_offline_a_cache_of_one_file_is_a_repository_of_it(hub: Hub, tmp_path: Path) -> None:
    """The hub was never asked for the other names that a checkpoint may have."""
    hub.repos["org/odd"] = {"weights.safetensors": save({"a": A}), "notes.txt": b"x"}
    for repository, file in (("single", "model.safetensors"), ("odd", "weights.safetensors")):
        named = opened(hub, f"hf://org/{repository}/{file}", tmp_path, "download")
        asked = len(hub.requests)
        found = opened(hub, f"hf://org/{repository}", tmp_path, HF_HUB_OFFLINE="1")
        assert found == named | {"source": f"hf://org/{repository}"}
        other = opened(hub, f"hf://org/{repository}/other.safetensors", tmp_path, HF_HUB_OFFLINE="1")
        assert other["codes"] == ["missing-file"]
        assert len(hub.requests) == asked


def test_a_hub_that_went_away_leaves_the_cache(hub: Hub, tmp_path: Path) -> None:
    online = opened(hub, "hf://org/sharded/model.safetensors.index.json", tmp_path, "download")
    source = "hf://org/sharded/model.safetensors.index.json"
    assert opened(hub, source, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == online | {"source": source}


@pytest.mark.parametrize(
    ("source", "env", "code", "words"),
    [
        ("hf://org/nothing", {}, "missing-repository", "the hub has no repository 'org/nothing', or hides it"),
        ("hf://org/single@v2", {}, "missing-revision", "'org/single' has no revision 'v2'"),
        ("hf://org/single/other.safetensors", {}, "missing-file", "'org/single' holds no file 'other.safetensors'"),
        ("hf://org/secret", {}, "gated-repository", "'org/secret' is gated"),
        (
            "hf://org/single",
            {"HF_HUB_OFFLINE": "1"},
            "offline",
            "'org/single' is not in the cache, and offline mode is on",
        ),
        (
            "hf://org/single",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "hub-unreachable",
            "'org/single' is not in the cache, and http://127.0.0.1:9 cannot be reached",
        ),
        ("hf://org/nested", {}, "ambiguous-folder", ""),
        ("hf://org/readme", {}, "nothing-to-read", ""),
        ("hf://", {}, "bad-hub-path", ""),
        ("hf://-bad-/--name", {}, "bad-hub-path", "'-bad-/--name' is no repository's name"),
        ("hf://org/evil", {}, "unsafe-index", ""),
        ("hf://org/torn", {}, "missing-shard", ""),
    ],
)
def test_what_cannot_be_fetched_says_why_and_what_to_do(
    hub: Hub, tmp_path: Path, source: str, env: dict[str, str], code: str, words: str
) -> None:
    hub.gated.add("org/secret")
    hub.repos["org/readme"] = {"README.md": b"hello"}
    for repo, shard in (("org/evil", "../../x.safetensors"), ("org/torn", "model-00001-of-00001.safetensors")):
        hub.repos[repo] = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": shard}}).encode()}
    found = opened(hub, source, tmp_path, **env)
    assert found["codes"] == [code], found
    assert found["help"]
    assert words in found["text"], found
