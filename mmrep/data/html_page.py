"""A page of HTML in one file, without scripts or links: its head, its tables, and how it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mmrep.files import replacing

HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --bad: light-dark(#b00020, #ff8a80); }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 24px; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 17px; margin-top: 32px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th.words, td.words {{ text-align: left; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; }}
.card {{ border: 1px solid var(--line); border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }}
.card.bad {{ border-color: var(--bad); }} .why {{ color: var(--bad); }}
.card p {{ margin: 6px 0 0; }} .card header {{ font-weight: 600; }}
.muted, .card small {{ opacity: 0.65; font-weight: normal; }}
img {{ display: block; max-width: 100%; }} audio {{ width: 100%; height: 34px; }}
svg {{ display: block; width: 100%; }} .sparkline {{ height: 40px; }}
.sparkline polyline {{ fill: none; stroke: currentColor; stroke-width: 1; vector-effect: non-scaling-stroke; }}
{style}</style>
</head>
<body>
"""


def write_page(path: Path, title: str, parts: Iterable[str], *, style: str = "") -> Path:
    """Write a page beside and rename it.

    Args:
        path: Of the page.
        title: Plain text.
        parts: The body, HTML; whatever comes from data is escaped in it.
        style: Rules beyond those of every page.
    """
    text = "".join([HEAD.format(title=escape(title), style=style), *parts, "</body>\n</html>\n"])
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")  # a name from index.json may hold what UTF-8 cannot
    return path


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int]) -> str:
    """A table of plain texts; ``words``: the columns that hold words, not figures."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = [' class="words"' if column in words else "" for column in range(len(texts))]
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    lines = [f"<tr>{cells('th', headings)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n"


def evenly_spaced(total: int, most: int) -> list[int]:
    """At most so many of the numbers below ``total``."""
    count = min(total, most)
    return [number * total // count for number in range(count)]
