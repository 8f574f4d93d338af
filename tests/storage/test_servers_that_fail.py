"""Servers and stores that refuse, send less, break off or redirect: each has its code, its reason and its remedy."""

from __future__ import annotations

import base64
import io
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from range_server import RangeServer, serving

import ckptsurgery as cs
from ckptsurgery.storage.sources import remote
from ckptsurgery.storage.sources.fsspec_source import FsspecSource
from ckptsurgery.storage.sources.http_source import HttpSource, _Redirects

STATE = {"w": torch.arange(40_000.0), "b": torch.ones(3)}
KIB = 1 << 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    cs.save(STATE, folder / "x.safetensors")
    cs.save({"w": torch.arange(4.0)}, folder / "short.safetensors")
    cs.save(STATE, folder / "x.pt")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(remote, "_WAIT", 0.001)
    with serving() as made:
        made.files = dict(files)
        yield made


def refused(call: Callable[[], object]) -> tuple[str, str, str, str]:
    with pytest.raises(cs.CheckpointError) as caught:
        call()
    (problem,) = caught.value.diagnostics
    return problem.code, problem.headline, str(problem.place), problem.help or ""


@pytest.mark.parametrize(
    ("status", "code", "headline", "help"),
    [
        (401, "permission-denied", "the server refused '{}': 401 Unauthorized", "needs a token"),
        (403, "permission-denied", "the server refused '{}': 403 Forbidden", "signature that has expired"),
        (404, "missing-file", "there is no file at '{}'", "check the address"),
        (410, "missing-file", "there is no file at '{}'", "check the address"),
        (408, "download-failed", "'{}' could not be read: the server answered 408 Request Timeout", "connection"),
        (500, "download-failed", "'{}' could not be read: the server answered 500", "check the connection"),
    ],
)
def test_a_status_has_its_code(server: RangeServer, status: int, code: str, headline: str, help: str) -> None:
    server.refused["x.safetensors"] = status
    address = f"{server.url}/x.safetensors"
    found = refused(lambda: HttpSource(address))
    assert found[0] == code
    assert found[1].startswith(headline.format(address))
    assert found[2] == address
    assert help in found[3]
    assert len(server.tokens) == (5 if code == "download-failed" else 1)


def test_an_address_where_nothing_listens_is_tried_and_given_up(server: RangeServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/x.safetensors"
        code, headline, *_ = refused(lambda: HttpSource(address))
    assert code == "download-failed"
    assert headline.startswith(f"{address!r} could not be read: [Errno") and "refused" in headline


@pytest.mark.parametrize("how", ["breaks", "resets"])
def test_a_first_answer_that_breaks_is_asked_for_again(server: RangeServer, how: str) -> None:
    setattr(server, how, 2)
    source = HttpSource(f"{server.url}/x.safetensors")
    assert source.first == server.files["x.safetensors"][: 64 * KIB]
    assert source.fetched == 64 * KIB and len(server.asked) == 3
    setattr(server, how, 100)
    code, headline, *_ = refused(lambda: HttpSource(f"{server.url}/x.safetensors"))
    assert code == "download-failed"
    assert ("IncompleteRead" if how == "breaks" else "reset") in headline


def test_a_connection_that_is_reset_goes_on_where_it_broke(server: RangeServer) -> None:
    data = server.files["x.safetensors"]
    source = HttpSource(f"{server.url}/x.safetensors")
    server.resets = 2
    assert source.fetch(10, 100_000) == data[10:100_010]
    server.resets = 100
    code, headline, *_ = refused(lambda: source.fetch(10, 16))
    assert code == "download-failed" and "reset" in headline


def test_a_server_may_send_less_than_it_is_asked_for(server: RangeServer) -> None:
    server.most_sent = 50_000
    with cs.open(f"{server.url}/x.safetensors") as checkpoint:
        assert torch.equal(checkpoint.load("w"), STATE["w"])
    assert max(stop - start for _, start, stop in server.asked) == 50_000


def test_bytes_beyond_those_that_were_asked_for_are_not_taken(server: RangeServer) -> None:
    source = HttpSource(f"{server.url}/x.safetensors")
    server.surplus = 50
    assert source.fetch(1000, 100) == server.files["x.safetensors"][1000:1100]


@pytest.mark.parametrize("shift", [-3, 5])
def test_another_range_than_the_one_asked_for_is_not_taken(server: RangeServer, shift: int) -> None:
    source = HttpSource(f"{server.url}/x.safetensors")
    server.shift = shift
    code, headline, _, help = refused(lambda: source.fetch(1000, 100))
    assert code == "download-failed" and headline.endswith("does not send parts of files")
    assert f"download_url_to_file('{source.url}', 'x.safetensors')" in help


def test_a_short_file_comes_with_the_first_request_even_where_no_parts_are_sent(server: RangeServer) -> None:
    for whole in (False, True):
        server.whole = whole
        server.reset()
        with cs.open(f"{server.url}/short.safetensors") as checkpoint:
            assert torch.equal(checkpoint.load("w"), torch.arange(4.0))
        assert [path for path, *_ in server.asked] == ["short.safetensors"]


def test_a_file_without_bytes_is_empty_however_the_server_answers(server: RangeServer) -> None:
    server.refused["none"] = 416
    server.files["none"] = b""
    source = HttpSource(f"{server.url}/none")
    assert (source.size, source.first, source.identity) == (0, b"", (None, 0))
    assert refused(lambda: cs.open(f"{server.url}/none"))[0] == "empty-file"


@pytest.mark.parametrize("size", [64 * KIB, 64 * KIB + 1])
def test_a_whole_file_is_taken_up_to_the_size_of_a_first_request(server: RangeServer, size: int) -> None:
    server.files["data"], server.whole = b"x" * size, True
    if size == 64 * KIB:
        assert HttpSource(f"{server.url}/data").size == size
    else:
        assert refused(lambda: HttpSource(f"{server.url}/data"))[0] == "download-failed"


def test_a_file_that_became_shorter_has_changed(server: RangeServer) -> None:
    source = HttpSource(f"{server.url}/x.safetensors")
    server.files["x.safetensors"] = server.files["x.safetensors"][:1000]
    assert refused(lambda: source.fetch(100_000, 10))[0] == "file-changed"


def test_the_unit_of_a_range_may_be_in_capitals(server: RangeServer) -> None:
    server.unit = "Bytes"  # RFC 9110, section 14.1
    assert HttpSource(f"{server.url}/x.safetensors").size == len(server.files["x.safetensors"])


def test_a_password_in_an_address_is_sent_and_not_shown(server: RangeServer) -> None:
    source = HttpSource(server.url.replace("://", "://me:se%40cret@") + "/x.safetensors")
    assert source.name == f"{server.url}/x.safetensors"
    assert source.beside("x.safetensors").size == source.size
    assert server.tokens == ["Basic " + base64.b64encode(b"me:se@cret").decode()] * 2
    server.refused["y"] = 403
    found = refused(lambda: HttpSource(server.url.replace("://", "://me:se%40cret@") + "/y"))
    assert "se%40cret" not in "".join(found)


def test_a_redirection_without_end_is_named(server: RangeServer) -> None:
    server.moved = {"round": "/round"}
    code, headline, _, _ = refused(lambda: HttpSource(f"{server.url}/round"))
    assert code == "download-failed" and headline.startswith(f"'{server.url}/round' leads on to an address")
    assert "\n" not in headline


def test_an_address_that_went_through_a_path_is_given_back(server: RangeServer) -> None:
    address = f"{server.url}/x.safetensors"
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(Path(address))
    (problem,) = caught.value.diagnostics
    (remedy,) = problem.remedies
    with cs.open(remedy.value[str(Path(address))]) as checkpoint:
        assert len(checkpoint)


def test_a_token_is_not_sent_to_another_host(server: RangeServer) -> None:
    token = {"Authorization": "Bearer secret"}
    with serving() as other:
        other.files = dict(server.files)
        server.moved = {"here": "/x.safetensors", "there": f"{other.url}/x.safetensors"}
        assert HttpSource(f"{server.url}/here", token).size == len(server.files["x.safetensors"])
        assert server.tokens == ["Bearer secret"] * 2
        assert HttpSource(f"{server.url}/there", token).size == len(server.files["x.safetensors"])
        assert server.tokens == ["Bearer secret"] * 3
        assert other.tokens == [None]


@pytest.mark.parametrize(
    ("start", "end", "kept"),
    [
        ("https://a/x", "https://a/y", True),
        ("http://a/x", "https://a/y", True),
        ("https://a/x", "http://a/y", False),
        ("https://a/x", "https://b/x", False),
    ],
)
def test_a_token_is_not_sent_in_the_clear(start: str, end: str, kept: bool) -> None:
    request = Request(start, headers={"Authorization": "Bearer secret"})
    made = _Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, end)  # type: ignore[arg-type]
    assert made is not None and made.full_url == end
    assert made.has_header("Authorization") is kept


def test_a_remote_file_is_a_file_to_others(server: RangeServer, files: dict[str, bytes]) -> None:
    source = HttpSource(f"{server.url}/x.pt")
    with source.open() as file:
        names = zipfile.ZipFile(file).namelist()
    assert names == zipfile.ZipFile(io.BytesIO(files["x.pt"])).namelist()
    with io.BufferedReader(source.open(), 1000) as buffered:  # type: ignore[type-var]
        assert buffered.seek(-70, io.SEEK_END) == len(files["x.pt"]) - 70
        assert buffered.read(50) + buffered.read() == files["x.pt"][-70:]
        assert buffered.read(1) == b""


def test_a_file_beside_another_is_below_its_folder(server: RangeServer) -> None:
    server.files |= {"a b/x": b"x", "a b/c d/y": b"yy"}
    source = HttpSource(f"{server.url}/a%20b/x", {"Authorization": "t"}).beside("c d/y")
    assert (source.first, source.size) == (b"yy", 2)
    assert source.name == source.url == f"{server.url}/a%20b/c%20d/y"
    assert server.tokens == ["t", "t"]
    store = fsspec.filesystem("memory")
    store.pipe({"/beside/x": b"x", "/beside/c/y": b"yy"})
    found = FsspecSource("memory://beside/x", store, "/beside/x").beside("c/y")
    assert (found.name, found.first) == ("memory://beside/c/y", b"yy")
    store.rm("/beside", recursive=True)


@pytest.fixture
def store(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(remote, "_WAIT", 0.001)
    system = fsspec.filesystem("memory")
    system.pipe({f"/failing/{name}": data for name, data in files.items()})
    yield system
    monkeypatch.undo()
    system.rm("/failing", recursive=True)


def failing(error: Exception, times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    left = [error] * times

    def call(*args: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return then(*args, **options)

    return call


@pytest.mark.parametrize("method", ["info", "cat_file"])
def test_a_store_that_falters_is_asked_again(store: MemoryFileSystem, method: str, monkeypatch: Any) -> None:
    def source() -> FsspecSource:
        return FsspecSource("memory://failing/x.pt", store, "/failing/x.pt")

    rest = getattr(store, method)
    monkeypatch.setattr(store, method, failing(TimeoutError("too slow"), 4, rest))
    assert source().first == store.cat_file("/failing/x.pt")[: 64 * KIB]
    monkeypatch.setattr(store, method, failing(TimeoutError("too slow"), 5, rest))
    assert refused(source)[:2] == ("download-failed", "'memory://failing/x.pt' could not be read: too slow")


@pytest.mark.parametrize(
    ("method", "error", "code", "headline", "help"),
    [
        ("info", FileNotFoundError("x"), "missing-file", "there is no file at '{}'", "check the address"),
        ("cat_file", FileNotFoundError("x"), "missing-file", "there is no file at '{}'", "check the address"),
        ("info", PermissionError("no key"), "permission-denied", "no permission to read '{}': no key", "credentials"),
    ],
)
def test_a_store_that_refuses_is_asked_once(
    store: MemoryFileSystem, method: str, error: Exception, code: str, headline: str, help: str, monkeypatch: Any
) -> None:
    name = "memory://failing/x.pt"
    monkeypatch.setattr(store, method, failing(error, 1, getattr(store, method)))
    found = refused(lambda: FsspecSource(name, store, "/failing/x.pt"))
    assert found[:3] == (code, headline.format(name), name)
    assert help in found[3]


def test_a_name_without_a_size_is_not_a_file(store: MemoryFileSystem, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "info", lambda path: {"name": path, "size": None, "type": "other"})
    found = refused(lambda: FsspecSource("memory://failing/x.pt", store, "/failing/x.pt"))
    assert found[:2] == ("not-a-file", "'memory://failing/x.pt' is not a file whose size is known")
    assert found[3] == "name a file"


@pytest.mark.parametrize("error", [OSError("no route to the store"), ValueError("no such bucket")])
def test_a_store_that_cannot_be_asked_for_a_folder_is_named(
    store: MemoryFileSystem, error: Exception, monkeypatch: Any
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "isdir", failing(error, 1, MemoryFileSystem.isdir))
    found = refused(lambda: cs.open("memory://failing/x.pt"))
    assert found[:2] == ("download-failed", f"'memory://failing/x.pt' cannot be reached: {error}")
    assert "credentials" in found[3]


def test_a_folder_that_may_not_be_listed_has_nothing_to_read(store: MemoryFileSystem, monkeypatch: Any) -> None:
    monkeypatch.setattr(MemoryFileSystem, "ls", failing(PermissionError("no list"), 1, MemoryFileSystem.ls))
    assert refused(lambda: cs.open("memory://failing"))[0] == "nothing-to-read"
