"""`ShardCache`: remote shards on the local disk, named by their digest, within a bound."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from mmrep.data.locations import is_url
from mmrep.errors import DataError

CHUNK = 1 << 20
ATTEMPTS = 6
FIRST_WAIT = 0.2
"""Seconds before the second attempt; each later wait is twice as long, and jittered, so that ranks do not ask together."""
STALL_SECONDS = 60
MAX_UNSIZED = 1 << 40
T = TypeVar("T")
EXTRAS = {"s3": "s3", "gs": "gs", "hf": "hf"}


def default_folder() -> Path:
    """``$MMREP_CACHE``, or ``mmrep/shards`` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MMREP_CACHE") or Path(cache) / "mmrep" / "shards")


class ShardCache:
    """Files of URLs, each downloaded once for all processes of a machine.

    A file is verified before it takes its name, so that whatever is in the folder is whole. When it grows over its bound the
    least recently used files go; processes that have one open keep reading it.

    Args:
        folder: Where; `default_folder` by default.
        max_bytes: Bound of the folder's size. One file may exceed it alone.
    """

    def __init__(self, folder: Path | str | None = None, max_bytes: int = 64 << 30) -> None:
        self.folder, self.max_bytes = Path(folder) if folder else default_folder(), max_bytes

    def get(self, url: str, sha256: str, size: int) -> Path:
        """The local copy of a file, downloaded if need be.

        Raises:
            DataError: If it cannot be had after some attempts, or is not the one that the digest names.
        """
        path = self._path(sha256)
        if not self._touch(path, size):
            with self._lock(path.name):
                if not self._touch(path, size):  # another process may have fetched it meanwhile
                    self._fetch(url, path, sha256, size)
        return path

    def add(self, url: str) -> Path:
        """Download a file whose digest is not known yet."""
        part = self._part(hashlib.sha256(url.encode()).hexdigest())
        path = self._path(retried(lambda: download(url, part, MAX_UNSIZED)[0], url))
        self._admit(part, path)
        return path

    def drop_if_damaged(self, sha256: str) -> bool:
        """Remove a file that is not what its name says any more, as a disk may do; says whether it was."""
        path = self._path(sha256)
        with self._lock(path.name), suppress(FileNotFoundError), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                path.unlink(missing_ok=True)
                return True
        return False

    def _fetch(self, url: str, path: Path, sha256: str, size: int) -> None:
        part = self._part(path.name)

        def once() -> None:
            digest, received = download(url, part, size)
            if received != size:
                raise OSError(f"{received} bytes came instead of {size}")
            if digest != sha256:
                raise OSError(f"it has sha256 {digest[:12]}, the index says {sha256[:12]}")

        try:
            retried(once, url)
            self._admit(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _admit(self, part: Path, path: Path) -> None:
        with self._lock("cache"):
            self._evict(part.stat().st_size)
            part.replace(path)

    def _evict(self, coming: int) -> None:
        files = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = coming + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, sha256: str) -> Path:
        if len(sha256) != 64 or any(character not in "0123456789abcdef" for character in sha256):
            raise DataError(f"'{sha256}' is no sha256", fix="make the index anew: mmrep data index")
        return self.folder / f"{sha256}.tar"

    def _part(self, name: str) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the cache folder cannot be made ({error})", where=self.folder, fix="set data.cache_dir"
            ) from error
        return self.folder / f"{name}.{os.getpid()}.part"

    def _touch(self, path: Path, size: int) -> bool:
        """Whether the file is there, marked as used just now."""
        try:
            os.utime(path)
            return path.stat().st_size == size
        except FileNotFoundError:
            return False

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self._part(name)  # the folder
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def download(url: str, path: Path, max_bytes: int) -> tuple[str, int]:
    """Copy a URL to a file; returns its sha256 and its size. Stops as soon as more comes than may."""
    digest, received = hashlib.sha256(), 0
    try:
        with open_url(url) as source, path.open("wb") as target:
            while data := source.read(CHUNK):
                received += len(data)
                if received > max_bytes:
                    raise OSError(f"more than {max_bytes} bytes came")
                digest.update(data)
                target.write(data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), received


def open_url(url: str) -> Any:
    """A binary stream of a URL, by fsspec.

    Raises:
        DataError: If the scheme is refused, or its package is not installed.
    """
    if not is_url(url):
        raise DataError("not a URL", where=url)
    import fsspec

    scheme, options = url.partition(":")[0], {}
    if scheme in ("http", "https"):
        import aiohttp

        # One request for the whole file, from servers without ranges too; a stalled one is given up.
        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_read=STALL_SECONDS)}}
    try:
        system, path = fsspec.url_to_fs(url, **options)
        # With a size, which it does not use then, fsspec asks for no header beforehand.
        return system.open(path, "rb", **({"block_size": 0, "size": 1} if options else {}))
    except (ImportError, ValueError) as error:
        fix = f"pip install 'mmrep[{EXTRAS[scheme]}]'" if scheme in EXTRAS else None
        raise DataError(f"{scheme}:// cannot be read ({error})", where=url, fix=fix) from error


def retried(once: Callable[[], T], where: object) -> T:
    """What a function gives, after some attempts with growing waits; what cannot heal is raised at once.

    Raises:
        DataError: With the last error.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once()
        except (DataError, MemoryError, ImportError):
            raise
        except Exception as error:
            if _is_final(error):
                raise DataError(
                    f"not there, or not to be read ({_short(error)})", where=where, fix="check the address"
                ) from error
            if attempt == ATTEMPTS:
                raise DataError(
                    f"cannot be read after {ATTEMPTS} attempts ({_short(error)})",
                    where=where,
                    fix="check network and disk",
                ) from error
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether another attempt is in vain. Of other failures fsspec may say "not found" too, with the true cause behind."""
    return isinstance(error, FileNotFoundError | PermissionError) and error.__cause__ is None


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
