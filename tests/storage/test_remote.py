"""Checkpoints at addresses: headers and what a plan needs are fetched; a real server counts each byte."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from range_server import RangeServer, serving
from safetensors.torch import load

import ckptsurgery as cs
from ckptsurgery.running.dequantising import packed_in
from ckptsurgery.storage.sources import remote
from ckptsurgery.storage.sources.http_source import HttpSource

STATE = {f"layers.{n}.w": torch.randn(64, 1024, generator=torch.Generator().manual_seed(n)) for n in range(100)}
STATE |= {f"layers.{n}.b": torch.full((7,), float(n)) for n in range(100)}
KIB = 1 << 10


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    cs.save(STATE, folder / "x.safetensors")
    cs.save(STATE, folder / "x.pt")
    cs.save(STATE, folder / "shards", max_shard_size="6MB")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"shards/config.json": b'{"hidden_size": 1024}'}


@pytest.fixture
def server(written: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(remote, "_WAIT", 0.001)
    with serving() as made:
        made.files = dict(written)
        yield made


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def same(checkpoint: cs.Checkpoint) -> None:
    assert set(checkpoint) == set(STATE)
    for key in ("layers.0.w", "layers.99.b", "layers.50.w"):
        assert torch.equal(checkpoint[key].load(), STATE[key])


def test_a_header_is_all_that_is_fetched_to_open(server: RangeServer) -> None:
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        assert server.sent <= header_size(server.files["x.safetensors"]) + 64 * KIB
        assert {path for path, *_ in server.asked} == {"x.safetensors"}
        same(checkpoint)


def test_a_torch_file_is_opened_by_its_directory(server: RangeServer) -> None:
    with cs.open(f"{server.url}/x.pt") as checkpoint:
        assert server.sent < len(server.files["x.pt"]) / 50
        same(checkpoint)


def test_a_torch_file_takes_few_round_trips(server: RangeServer) -> None:
    """Its directory in one piece, and the headers of its records several at a time."""
    server.files["x.pt"] = server.files["x.pt"]
    with cs.open(f"{server.url}/x.pt") as checkpoint:
        tensors = [start for _, start, stop in server.asked if stop - start < 4096]
        assert len(server.asked) - len(tensors) <= 3
        assert len(tensors) <= len(checkpoint) + 5
        assert server.most > 2
        pickled = server.files["x.pt"].index(b"byteorder")
        assert server.sent <= 64 * KIB + pickled + 300 * len(checkpoint)


def test_a_long_header_is_fetched_without_more_than_a_block_too_much(server: RangeServer, tmp_path: Path) -> None:
    cs.save({f"a.rather.long.name.of.a.tensor.{n}": torch.ones(1) for n in range(3000)}, tmp_path / "x.safetensors")
    server.files["long.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    server.reset()
    assert len(cs.open(f"{server.url}/long.safetensors")) == 3000
    size = header_size(server.files["long.safetensors"])
    assert size > 128 * KIB
    assert server.sent <= size + 64 * KIB


@pytest.mark.parametrize("name", ["x.safetensors", "shards/model.safetensors.index.json"])
def test_a_plan_fetches_what_it_needs(server: RangeServer, name: str, tmp_path: Path) -> None:
    with cs.open(f"{server.url}/{name}") as checkpoint:
        plan = cs.plan(
            checkpoint, cs.Recipe(rules=["layers.3.{k} -> {k}", "layers.{i:40..44}.b -> b.{i}"], rest="drop")
        )
        for use in (lambda: plan.save(tmp_path / "part.safetensors", overwrite=True), plan.state_dict):
            server.reset()
            use()
            needed = sum(spec.nbytes for spec in plan.specs.values())
            assert server.sent <= 1.05 * needed
    with cs.open(tmp_path / "part.safetensors") as part:
        assert torch.equal(part["w"].load(), STATE["layers.3.w"])
        assert torch.equal(part["b.44"].load(), STATE["layers.44.b"])


def test_a_whole_model_comes_in_merged_ranges_several_at_a_time(server: RangeServer, tmp_path: Path) -> None:
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        server.reset()
        cs.plan(checkpoint, "layers.{i}.{k} -> {k}.{i}").save(tmp_path / "all.safetensors")
        assert server.sent <= 1.001 * checkpoint.nbytes
        assert len(server.asked) < 40
        assert 2 <= server.most <= 8
    with cs.open(tmp_path / "all.safetensors") as made:
        assert all(torch.equal(made[f"{k}.{i}"].load(), STATE[f"layers.{i}.{k}"]) for i in range(100) for k in "wb")


def test_a_model_is_loaded_by_ranges(server: RangeServer) -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module() for _ in range(100)])})
    for layer in model["layers"]:
        layer.w, layer.b = torch.nn.Parameter(torch.zeros(64, 1024)), torch.nn.Parameter(torch.zeros(7))
    cs.load_into(model, f"{server.url}/x.safetensors")
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in model.state_dict().items())
    assert len(server.asked) < 60


def test_shards_and_the_config_beside_an_index(server: RangeServer) -> None:
    with cs.open(f"{server.url}/shards/model.safetensors.index.json") as checkpoint:
        headers = sum(64 * KIB for path in server.files if path.startswith("shards/"))
        assert server.sent <= headers
        assert checkpoint.config == {"hidden_size": 1024}
        same(checkpoint)


def test_a_broken_connection_goes_on_where_it_broke(server: RangeServer) -> None:
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        server.reset()
        server.breaks, server.busy = 3, 2
        assert torch.equal(checkpoint["layers.7.w"].load(), STATE["layers.7.w"])
        assert server.sent == STATE["layers.7.w"].nbytes


def test_a_server_that_stays_away_is_given_up(server: RangeServer) -> None:
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        server.busy = 100
        with pytest.raises(cs.CheckpointError, match=r"download-failed.*503"):
            checkpoint["layers.7.w"].load()


def test_a_file_that_changes_between_two_ranges_is_an_error(server: RangeServer, tmp_path: Path) -> None:
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        data = bytearray(server.files["x.safetensors"])
        data[-1] ^= 1
        server.files["x.safetensors"] = bytes(data)
        with pytest.raises(cs.CheckpointError, match="file-changed"):
            checkpoint["layers.7.w"].load()
        with pytest.raises(cs.CheckpointError, match="file-changed"):
            cs.save(checkpoint, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_read_is_said(server: RangeServer) -> None:
    with pytest.raises(cs.CheckpointError, match="missing-file"):
        cs.open(f"{server.url}/no.safetensors")
    server.files["page"] = b"<!doctype html><title>Sign in</title>"
    with pytest.raises(cs.CheckpointError, match="html-page"):
        cs.open(f"{server.url}/page")
    server.files["empty"] = b""
    with pytest.raises(cs.CheckpointError, match="empty-file"):
        cs.open(f"{server.url}/empty")
    server.whole = True
    with pytest.raises(cs.CheckpointError, match="html-page"):
        cs.open(f"{server.url}/page")
    with pytest.raises(cs.CheckpointError, match=r"(?s)does not send parts of files.*download_url_to_file"):
        cs.open(f"{server.url}/x.safetensors")


def test_ranges_of_any_shape_are_filled(server: RangeServer) -> None:
    rng, data = random.Random(0), random.Random(1).randbytes(300_000)
    server.files["data"] = data
    source = HttpSource(f"{server.url}/data")
    ranges = [(start, rng.choice([0, 1, 50, 5000, 90_000])) for start in (rng.randrange(200_000) for _ in range(60))]
    buffers = [bytearray(n) for _, n in ranges]
    source.read_into([(start, memoryview(b)) for (start, _), b in zip(ranges, buffers)])
    assert [bytes(b) for b in buffers] == [data[s : s + n] for s, n in ranges]
    with source.open() as file:
        for _ in range(200):
            start, n = rng.randrange(300_100), rng.choice([0, 1, 100, 70_000])
            file.seek(start)
            assert file.read(n) == data[start : start + n]
        file.seek(-5, 2)
        assert file.read() == data[-5:]
    with pytest.raises(cs.CheckpointError, match="truncated-file"):
        source.read_into([(299_999, memoryview(bytearray(2)))])


def test_a_packed_tensor_is_fetched_whole_to_be_dequantised(server: RangeServer, tmp_path: Path) -> None:
    blocks = torch.zeros(1024, 34 * 64, dtype=torch.uint8)
    cs.save({"w": blocks}, tmp_path / "x.safetensors")
    server.files["packed"] = (tmp_path / "x.safetensors").read_bytes()
    with cs.open(f"{server.url}/packed") as checkpoint:
        server.reset()
        cs.plan(checkpoint, "w -> w | gguf_dequant(Q8_0)").save(tmp_path / "y.safetensors")
        assert server.sent == blocks.nbytes
        assert len(server.asked) <= 8


def test_what_fsspec_knows_is_opened(written: dict[str, bytes]) -> None:
    store = fsspec.filesystem("memory")
    for name, data in written.items():
        store.pipe(f"/bucket/{name}", data)
    same(cs.open("memory://bucket/x.safetensors"))
    same(cs.open("memory://bucket/x.pt"))
    with cs.open("memory://bucket/shards") as checkpoint:
        same(checkpoint)
        assert checkpoint.config == {"hidden_size": 1024}
    same(cs.open("memory://bucket"))
    with pytest.raises(cs.CheckpointError, match="missing-file"):
        cs.open("memory://bucket/nothing.pt")
    changed = cs.open("memory://bucket/x.safetensors")
    store.pipe("/bucket/x.safetensors", written["x.safetensors"] + b"!")
    with pytest.raises(cs.CheckpointError, match="file-changed"):
        changed["layers.0.w"].load()
    store.rm("/bucket", recursive=True)


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    cs.save({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    assert list(cs.open(f"file://{tmp_path}/x.safetensors")) == ["w"]


def test_what_inspect_says_of_an_address(server: RangeServer) -> None:
    from typer.testing import CliRunner

    from ckptsurgery.cli.program import app

    done = CliRunner().invoke(app, ["inspect", "--json", f"{server.url}/x.safetensors"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)
    assert server.sent <= header_size(server.files["x.safetensors"]) + 64 * KIB


def test_a_server_that_compresses_unasked_is_refused(server: RangeServer) -> None:
    server.encoding = True
    with pytest.raises(cs.CheckpointError, match=r"(?s)compresses what it sends \(gzip\).*download_url_to_file"):
        cs.open(f"{server.url}/x.safetensors")


def test_a_small_file_is_fetched_once_and_needs_no_ranges(server: RangeServer, tmp_path: Path) -> None:
    cs.save({"w": torch.arange(5.0)}, tmp_path / "small.safetensors")
    server.files["a b/kl\u00e9.safetensors"] = data = (tmp_path / "small.safetensors").read_bytes()
    for server.whole in (False, True):
        server.reset()
        with cs.open(f"{server.url}/a b/kl\u00e9.safetensors") as checkpoint:
            assert torch.equal(checkpoint["w"].load(), torch.arange(5.0))
        assert (server.sent, len(server.asked)) == (len(data), 1)


def test_a_redirection_is_followed_on_the_web_alone_and_without_the_token(server: RangeServer) -> None:
    server.moved = {
        "here": f"{server.url}/x.safetensors",
        "elsewhere": f"http://localhost:{server.server_port}/x.safetensors",
        "ftp": "ftp://127.0.0.1/x",
        "round": f"{server.url}/round",
    }
    for path, token in (("here", "Bearer t"), ("elsewhere", None)):
        server.tokens.clear()
        source = HttpSource(f"{server.url}/{path}", {"Authorization": "Bearer t"})
        assert source.size == len(server.files["x.safetensors"])
        assert server.tokens == ["Bearer t", token]
    with cs.open(f"{server.url}/elsewhere") as checkpoint:
        same(checkpoint)
    for path in ("ftp", "round"):
        with pytest.raises(cs.CheckpointError, match="download-failed"):
            cs.open(f"{server.url}/{path}")


def test_a_busy_server_is_left_alone_as_long_as_it_asks(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    server.busy, server.wait = 2, "7"
    same(cs.open(f"{server.url}/x.safetensors"))
    assert waited == [7, 7]
    server.busy, server.wait = 2, "86400"
    same(cs.open(f"{server.url}/x.safetensors"))
    assert waited[2:] == [60, 60]


def test_a_store_whose_client_fails_in_its_own_words_is_said() -> None:
    class NoCredentialsError(Exception):
        pass

    class Store(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "locked"

        def _open(self, *args: object, **options: object) -> None:
            raise NoCredentialsError("no credentials")

        def info(self, path: str, **options: object) -> dict[str, object]:
            raise NoCredentialsError("no credentials")

    fsspec.register_implementation("locked", Store, clobber=True)
    with pytest.raises(cs.CheckpointError, match=r"(?s)download-failed.*no credentials.*check the credentials"):
        cs.open("locked://bucket/x.safetensors")


def test_a_whole_file_beside_the_shards_of_an_address_is_asked_back(written: dict[str, bytes]) -> None:
    store = fsspec.filesystem("memory")
    shards = {name: data for name, data in written.items() if name.startswith("shards/")}
    for name, data in shards.items():
        store.pipe(f"/beside/{name}", data)
    store.pipe("/beside/shards/model.safetensors", written["x.safetensors"])
    with pytest.raises(cs.CheckpointError, match="ambiguous-folder"):
        cs.open("memory://beside/shards")
    index = json.dumps({"weight_map": dict.fromkeys(STATE, "model.safetensors")})
    store.pipe("/beside/shards/model.safetensors.index.json", index.encode())
    for name in shards:
        if name.endswith(".safetensors"):
            store.rm(f"/beside/{name}")
    same(cs.open("memory://beside/shards"))


def test_packed_weights_of_an_address_are_named_without_a_request_for_each(server: RangeServer, tmp_path: Path) -> None:
    held = Path(__file__).parents[1] / "data" / "quantised" / "packed_4.safetensors.xz"
    state = load(lzma.decompress(held.read_bytes()))
    cs.save({"a": torch.zeros(1 << 16), **{f"fc.{k}": v for k, v in state.items()}}, tmp_path / "x.safetensors")
    server.files["packed"] = (tmp_path / "x.safetensors").read_bytes()
    with cs.open(f"{server.url}/packed") as checkpoint, cs.open(tmp_path / "x.safetensors") as local:
        server.reset()
        assert packed_in(checkpoint).keys() == packed_in(local).keys() != set()
        assert server.asked == []
