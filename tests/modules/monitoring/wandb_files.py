"""What wandb left on disk, and a server of its that can be lost: no part of wandb reads its own files in Python."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
LAST = (1, 4)
"""Kinds of a piece that end a record: whole, and last."""


def records(path: Path) -> Iterator[Any]:
    """The protocol buffers of a ``.wandb`` file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), FILE_HEADER, b""
    assert data[:4] == b":W&B"
    while place + RECORD_HEADER <= len(data):
        if BLOCK - place % BLOCK < RECORD_HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + RECORD_HEADER : place + RECORD_HEADER + length]
        place += RECORD_HEADER + length
        if kind in LAST:
            yield Record.FromString(parts)
            parts = b""


def contents(path: Path, patience: float = 10.0) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Config, rows of the history, and the id of the run; waits for the last record, which another process writes."""
    config: dict[str, Any] = {}
    history, run_id, end = [], "", time.monotonic() + patience
    while time.monotonic() < end and all(record.WhichOneof("record_type") != "exit" for record in records(path)):
        time.sleep(0.1)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
    return config, history, run_id


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        inner = found
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return found


class FakeServer:
    """A server that wandb takes for its own.

    Args:
        answers: How many requests it answers, with nothing; it accepts those after them, and is silent. None for all.
    """

    def __init__(self, answers: int | None = None) -> None:
        self.seen: list[str] = []
        self.bodies: list[str] = []
        self._end = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._reply("GET")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.bodies.append(body.decode(errors="replace"))
                self._reply(self.path)

            def _reply(self, what: str) -> None:
                outer.seen.append(what)
                if answers is not None and len(outer.seen) > answers:
                    outer._end.wait(60)
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("Content-Length", "11")
                self.end_headers()
                self.wfile.write(b'{"data":{}}')

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
