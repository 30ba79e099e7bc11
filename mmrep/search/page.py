"""What was found as a page: the query, and the hits with pictures, captions and audio players, in one file without links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mmrep.data.decode import decode_file
from mmrep.data.html_members import show
from mmrep.data.html_page import write_page
from mmrep.search.index import Hit
from mmrep.search.originals import Originals

MAX_PAGE_BYTES = 24 << 20
"""Hits that would make the page larger are left out, and it says so."""
STYLE = ".card.query { border-width: 2px; max-width: 320px; }\n"


def write_results(
    path: Path,
    *,
    title: str,
    about: str,
    query: Mapping[str, tuple[str, str]],
    hits: Sequence[Hit],
    originals: Originals,
) -> Path:
    """Write the page.

    Args:
        path: Of the page.
        title, about: Plain text.
        query: Modality -> its kind, and the text or the path of the file that was asked by.
        hits: Best first.
        originals: Where their samples are.

    Raises:
        DataError: If a shard cannot be read. A member that cannot be used is shown as such.
    """
    parts = [f'<h1>{escape(title)}</h1>\n<p class="muted">{escape(about)}</p>\n', "<h2>Query</h2>\n", _query(query)]
    parts.append('<h2>Found</h2>\n<div class="grid">\n')
    total = sum(map(len, parts))
    for rank, hit in enumerate(hits, 1):
        card = _card(rank, hit, originals)
        total += len(card)
        if total > MAX_PAGE_BYTES:
            more = len(hits) - rank + 1
            parts.append(f'<p class="why">{more} more are not shown: the page would be too large.</p>\n')
            break
        parts.append(card)
    return write_page(path, title, [*parts, "</div>\n"], style=STYLE)


def _query(query: Mapping[str, tuple[str, str]]) -> str:
    shown = "".join(f"<p><small>{escape(name)}</small> {_value(*item)}</p>" for name, item in query.items())
    return f'<div class="card query">{shown}</div>\n'


def _value(kind: str, value: str) -> str:
    if kind == "text":
        return show("text", value, "txt", b"")
    path = Path(value)
    return show(kind, decode_file(kind, path), path.suffix.removeprefix(".").lower(), path.read_bytes())


def _card(rank: int, hit: Hit, originals: Originals) -> str:
    members = originals.members(hit)
    bad = " bad" if any(member.broken for member in members) else ""
    shown = "".join(f"<p><small>{escape(member.name)}</small> {member.html}</p>" for member in members)
    header = f"{rank}. {escape(hit.key)} <small>{hit.score:.4g}</small><br><small>{escape(hit.shard)}</small>"
    return f'<div class="card{bad}"><header>{header}</header>{shown}</div>\n'
