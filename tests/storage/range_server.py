"""A web server on loopback that sends parts of files, counts the bytes, and can be made to fail."""

from __future__ import annotations

import gzip
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class RangeServer(ThreadingHTTPServer):
    """`files` by path; `sent` counts bytes of bodies, `asked` lists (path, start, stop).

    `breaks`: how many answers are cut in the middle. `resets`: how many connections are reset instead. `busy`: how many
    are refused with 503, with `wait` as Retry-After. `whole`: ignores ranges. `encoding`: sends gzip unasked.
    `refused`: statuses by path. `moved`: addresses by path. `most_sent`: bytes that it sends at once.
    `shift`: added to the beginning of each range but the first. `surplus`: bytes sent beyond each.
    `unit`: how Content-Range calls bytes. `tokens`: the headers `Authorization`, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.asked: list[tuple[str, int, int]] = []
        self.breaks = self.busy = self.now = self.most = 0
        self.whole = self.encoding = False
        self.wait = ""
        self.unit = "bytes"
        self.resets = self.shift = self.surplus = 0
        self.most_sent = 1 << 40
        self.refused: dict[str, int] = {}
        self.moved: dict[str, str] = {}
        self.tokens: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Be quiet: a client hangs up where it is sent more than it asked for."""

    def reset(self) -> None:
        self.sent, self.asked, self.most = 0, [], 0


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self._answer(unquote(urlsplit(self.path).path).lstrip("/"))
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, path: str) -> None:
        server, data = self.server, self.server.files.get(path)
        with server.lock:
            busy, server.busy = server.busy > 0, max(0, server.busy - 1)
            server.tokens.append(self.headers.get("Authorization"))
        status = 503 if busy else 302 if path in server.moved else server.refused.get(path, 404 if data is None else 0)
        if data is None or status:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", server.moved[path])
            self.send_header("Content-Length", "0")
            if server.wait:
                self.send_header("Retry-After", server.wait)
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = None if server.whole or not data else asked
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
        if start >= len(data) and asked:
            self.send_error(416)
            return
        if asked:
            start += server.shift if start else 0
            stop = min(stop + server.surplus, start + server.most_sent, len(data))
        body = gzip.compress(data[start:stop], 1) if server.encoding else data[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.send_header("Content-Length", str(len(body)))
        if server.encoding:
            self.send_header("Content-Encoding", "gzip")
        if asked:
            self.send_header("Content-Range", f"{server.unit} {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        with server.lock:
            server.asked.append((path, start, stop))
            breaks, server.breaks = server.breaks > 0 and len(body) > 10, max(0, server.breaks - 1)
            resets, server.resets = server.resets > 0, max(0, server.resets - 1)
            body = body[: len(body) // 2] if breaks or resets else body
            server.sent += len(body)  # first: the client may go on, and ask for the sum, before this thread does
        self.wfile.write(body)
        if breaks or resets:
            self.wfile.flush()
            self.close_connection = True
        if resets:  # closed without a farewell, so that the client is reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextmanager
def serving() -> Iterator[RangeServer]:
    with RangeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
