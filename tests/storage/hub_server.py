"""A hub on loopback: files of repositories in memory, served as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos[id][file]` are the files; `gated` ids are refused; `requests` lists what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.requests.append((self.command, path))
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
            return
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo in self.server.gated:
            self._send(403, b"gated", {"X-Error-Code": "GatedRepo"}, body)
        elif repo not in self.server.repos:
            self._send(404, b"no repository", {"X-Error-Code": "RepoNotFound"}, body)
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"no revision", {"X-Error-Code": "RevisionNotFound"}, body)
        elif name not in self.server.repos[repo]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"Entry not found", headers, body)
        else:
            data = self.server.repos[repo][name]
            etag = hashlib.sha256(name.encode() + data).hexdigest()
            found = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if data else None
            if asked is None:
                self._send(200, data, found, body)
                return
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            found["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._send(206, data[start:stop], found, body)

    def _api(self, path: str) -> None:
        repo = path.partition("/revision/")[0]
        if "/tree/" in path:
            repo = path.partition("/tree/")[0]
        files = self.server.repos.get(repo)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, True)
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, True)
        else:
            about = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, True)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
