"""A vendor's pictures: an icon set of SVG bodies, looked up by code points or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.emoji_m3.sources import read_json

PIXELS = 64


@dataclass(frozen=True)
class IconSet:
    """The icons of a package, its names by code points (none in old packages), and its licence."""

    icons: Mapping[str, Any]
    names: Mapping[str, str]
    licence: dict[str, str]

    def find(self, code: str, slug: str) -> str | None:
        """The name of the icon with these code points, else of the icon called so, else None."""
        name = self.names.get(code, slug)
        return name if name in self.icons["icons"] or name in self.icons.get("aliases", {}) else None

    def svg(self, name: str) -> str:
        """A complete SVG of ``PIXELS`` x ``PIXELS``; an icon that is not square is centred."""
        icon = self._resolve(name)
        width, height = icon["width"], icon["height"]
        body = icon["body"]
        if icon.get("hFlip"):
            body = f'<g transform="translate({2 * icon["left"] + width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{PIXELS}" height="{PIXELS}" viewBox="{icon["left"]} {icon["top"]} {width} {height}">{body}</svg>'
        )

    def _resolve(self, name: str) -> dict[str, Any]:
        """The icon with the set's defaults; an alias adds its own changes to its parent."""
        alias = self.icons.get("aliases", {}).get(name)
        if alias is not None:
            return {**self._resolve(alias["parent"]), **alias}
        defaults = {"left": 0, "top": 0, "width": self.icons.get("width", 16), "height": self.icons.get("height", 16)}
        return {**defaults, **self.icons["icons"][name]}


def read_icons(tarball: Path) -> IconSet:
    """Reads an icon set's package."""
    parsed = read_json(tarball, ("icons.json", "chars.json", "info.json"))
    names = {code.replace("-fe0f", ""): name for code, name in parsed["chars.json"].items()}
    info = parsed["info.json"]
    licence = {"title": info["license"]["title"], "spdx": info["license"]["spdx"], "author": info["author"]["name"]}
    return IconSet(parsed["icons.json"], names, licence)
