"""A page that shows what is in a set of shards: figures, and samples of each split as a person sees and hears them.

One file without scripts or links. Whatever comes from the shards is escaped, and decoded by `mmrep.data.decode` alone.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from mmrep.data.html_members import read_members
from mmrep.data.html_page import evenly_spaced, table, write_page
from mmrep.data.index import Index
from mmrep.data.locations import is_url
from mmrep.data.reader import Samples
from mmrep.data.stats import HEADINGS, share, split_stats, stats_rows, summary


def write_contact_sheet(index: Index, path: Path, *, per_split: int = 24) -> Path:
    """Write the page: the same shards give the same bytes.

    Args:
        index: Of the shards.
        path: The page. It is written beside and renamed.
        per_split: Samples of each split, evenly spaced.

    Raises:
        DataError: If a shard is not there, or is not the one that was indexed. A sample that cannot be used is shown as such.
    """
    root = index.root if is_url(index.root) else str(Path(index.root).resolve())
    title = f"Shards of {root.rstrip('/').rpartition('/')[2]}"
    parts = [
        f"<h1>{escape(title)}</h1>\n",
        table(HEADINGS, stats_rows(index), (0, 4)),
        f'<p class="muted">{escape(summary(index))}</p>\n',
        "<h2>Which modalities come together</h2>\n",
        _sets(index),
    ]
    for split in index.splits:
        samples = Samples(index, split)
        numbers = evenly_spaced(len(samples), per_split)
        shown = f"{len(numbers)} of {len(samples)} samples"
        parts.append(f'<h2>{escape(split)} <small class="muted">{shown}</small></h2>\n<div class="grid">\n')
        parts += [_card(samples, number) for number in numbers]
        parts.append("</div>\n")
    return write_page(path, title, parts)


def _sets(index: Index) -> str:
    """A row for each set of modalities, a column for each split."""
    figures = {split: split_stats(index, split) for split in index.splits}
    known = {modalities for each in figures.values() for modalities in each["sets"]}
    total = {modalities: sum(each["sets"].get(modalities, 0) for each in figures.values()) for modalities in known}
    rows = [
        (
            " + ".join(modalities) or "none",
            *(share(each["sets"].get(modalities, 0), each["samples"]) for each in figures.values()),
        )
        for modalities in sorted(known, key=lambda modalities: (-total[modalities], modalities))
    ]
    return table(("modalities", *index.splits), rows, (0,))


def _card(samples: Samples, number: int) -> str:
    members = read_members(samples, number, list(samples.index.modalities))
    bad = " bad" if any(member.broken for member in members) else ""
    shown = "".join(f"<p><small>{escape(member.name)}</small> {member.html}</p>" for member in members)
    key, shard = escape(samples.key(number)), escape(samples.shard(number).name)
    return f'<div class="card{bad}"><header>{key}<br><small>{shard}</small></header>{shown}</div>\n'
