"""SVG to PNG on white."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.emoji_m3.catalog import Catalog

Pictures = dict[tuple[str, str], bytes]


def render(svg: str) -> bytes:
    """PNG of an SVG at the size that it states, on white. System fonts are left out: no two machines have the same."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))


def render_all(catalog: Catalog) -> Iterator[tuple[tuple[str, str], bytes]]:
    """((code of the emoji, vendor), PNG) for every emoji and every vendor that draws it."""
    for emoji in catalog.emoji:
        for vendor in emoji.vendors:
            yield (emoji.code, vendor), render(catalog.svg(emoji, vendor))
