"""Shards and their records. A shard is finished when both are there, and the tar is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrep.data.writer import write_shard
from mmrep.files import replacing


@dataclass(frozen=True)
class FinishedShards:
    """Of one build.

    Attributes:
        folder: Where the tars go.
        work: Where the records are.
    """

    folder: Path
    work: Path

    def write(self, name: str, samples: Iterable[Mapping[str, Any]], report: Callable[[], dict[str, Any]]) -> None:
        """Write a shard and then its record; where there is no sample, the record alone.

        Args:
            name: The tar's.
            samples: As `mmrep.data.writer.write_shard` takes them.
            report: What else the record says; called after the last sample.
        """
        tar = self.folder / name
        self._record(name).unlink(missing_ok=True)
        with replacing(tar) as part:
            count = write_shard(part, samples)
            size, digest = _size_and_digest(part)
        if not count:
            tar.unlink()
        with replacing(self._record(name), sync=True) as part:
            facts = {"samples": count, "bytes": size, "sha256": digest}
            part.write_text(json.dumps(facts | report()), encoding="utf-8")

    def load(self, name: str) -> dict[str, Any] | None:
        """The record of a finished shard, ``samples``, ``bytes``, ``sha256`` and its report; else None, as of a damaged one."""
        try:
            record: dict[str, Any] = json.loads(self._record(name).read_text(encoding="utf-8"))
            written = (record["bytes"], record["sha256"])
            record["samples"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        tar = self.folder / name
        whole = _size_and_digest(tar) == written if record["samples"] else not tar.exists()
        return record if whole else None

    def _record(self, name: str) -> Path:
        return self.work / f"{name}.json"


def _size_and_digest(path: Path) -> tuple[int, str]:
    if not path.is_file():
        return -1, ""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
