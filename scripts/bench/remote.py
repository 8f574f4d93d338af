"""Load a model from a web server on this machine, beside curl, which fetches the same bytes.

    python scripts/bench/remote.py --mib 512 --rounds 5

The server is a process of its own that sends ranges of a file by `sendfile`. Ours is `cs.load_into` of a model whose
parameters are in memory; curl writes to /dev/null. Both take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import ckptsurgery as cs

MIB = 1 << 20
BAR = 0.8


class Ranges(BaseHTTPRequestHandler):
    """Sends the files of the working folder, or ranges of them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file."""
        path = Path(self.path.lstrip("/"))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, stop = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{size}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if self.command == "GET":
            with path.open("rb") as file:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

    def do_HEAD(self) -> None:
        """Send what comes before a file."""
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Keep still."""


def serve(folder: str, said: Connection) -> None:
    """Serve a folder until the process is ended, and send the port."""
    os.chdir(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    said.send(server.server_port)
    server.serve_forever()


def model_of(mib: int) -> torch.nn.Module:
    """A model of parameters of 4 MiB each."""
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(mib // 4)]
    return torch.nn.Sequential(*layers).requires_grad_(False)


def main() -> None:
    """Measure, and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    curl = shutil.which("curl")
    if curl is None:
        raise SystemExit("curl is not installed")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        model = model_of(options.mib)
        cs.save(model.state_dict(), Path(folder, "x.safetensors"))
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, there), daemon=True)
        server.start()
        address = f"http://127.0.0.1:{here.recv()}/x.safetensors"
        nbytes = sum(p.nbytes for p in model.parameters())
        times: dict[str, list[float]] = {"curl": [], "ours": []}
        for number in range(options.rounds + 1):
            for label in times:
                start = time.perf_counter()
                if label == "curl":
                    subprocess.run([curl, "-s", "-o", "/dev/null", address], check=True)
                else:
                    cs.load_into(model, address)
                times[label] += [time.perf_counter() - start] if number else []  # the first round warms up
        server.terminate()
    rates = {label: nbytes / statistics.median(found) / MIB for label, found in times.items()}
    share = rates["ours"] / rates["curl"]
    print(f"curl {rates['curl']:,.0f} MiB/s, load_into {rates['ours']:,.0f} MiB/s: {share:.2f} (bar {BAR})")


if __name__ == "__main__":
    main()
