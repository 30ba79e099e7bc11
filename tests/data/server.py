"""A local HTTP server of a folder that can be told to misbehave."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Behaviour:
    """What the server does to requests of a path: each fault is taken once, from the front.

    Attributes:
        faults: Path suffix -> list of ``500``, ``404``, ``short`` (the
            connection ends early), ``wrong`` (other bytes), ``slow``.
        requests: How often each path was asked for.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, behaviour: Behaviour, **kwargs: Any) -> None:
        self.behaviour = behaviour
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.behaviour.requests[self.path] += 1
        waiting = next(
            (found for end, found in self.behaviour.faults.items() if self.path.endswith(end) and found), None
        )
        fault = waiting.pop(0) if waiting else ""
        if fault in ("500", "404"):
            self.send_error(int(fault))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "short":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if fault == "slow":
            for start in range(0, len(data), 1 + len(data) // 4):
                self.wfile.write(data[start : start + 1 + len(data) // 4])
                time.sleep(0.05)
            return
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path, address: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[str, Behaviour]]:
    """Serve a folder without support for ranges, at any free port; gives its URL and its behaviour."""
    behaviour = Behaviour()
    server = ThreadingHTTPServer((address, port), partial(_Handler, directory=str(folder), behaviour=behaviour))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{address}:{server.server_port}", behaviour
    finally:
        server.shutdown()
        server.server_close()
