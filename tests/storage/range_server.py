"""A web server on loopback that sends parts of files, counts the bytes, and can be made to fail."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class RangeServer(ThreadingHTTPServer):
    """`files` by path; `sent` counts bytes of bodies, `asked` lists (path, start, stop).

    `breaks`: how many answers are cut in the middle. `busy`: how many are refused with 503. `whole`: ignores ranges.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.asked: list[tuple[str, int, int]] = []
        self.breaks = self.busy = self.now = self.most = 0
        self.whole = False
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
        if data is None or busy:
            self.send_response(503 if busy else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = None if server.whole or not data else asked
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
        body = data[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        with server.lock:
            server.asked.append((path, start, stop))
            breaks, server.breaks = server.breaks > 0 and len(body) > 10, max(0, server.breaks - 1)
            body = body[: len(body) // 2] if breaks else body
            server.sent += len(body)  # first: the client may go on, and ask for the sum, before this thread does
        self.wfile.write(body)
        if breaks:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serving() -> Iterator[RangeServer]:
    with RangeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
