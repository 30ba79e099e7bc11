"""``mmrep search``: the samples of an index that fit a text, a picture, a sound, or several at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrep.devices import choose_device
from mmrep.errors import ConfigError, DataError, did_you_mean
from mmrep.printing import print_table, printable

if TYPE_CHECKING:
    from mmrep.search import Answers, EmbeddingIndex
    from mmrep.search.originals import Originals


def run(arguments: list[str]) -> int:
    """Run ``search ...``."""
    options = _parser().parse_args(arguments[1:])
    for option in ("html", "out"):
        place = getattr(options, option)
        if place and Path(place).exists() and not options.overwrite:
            raise ConfigError("the file exists", where=place, fix=f"add --overwrite, or another --{option}")
    return _search(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrep search",
        description="Find samples that fit what is given; several at once are scored by the rule of the model's loss.",
    )
    parser.add_argument("--index", required=True, metavar="DIR", help="folder that `mmrep embed` wrote")
    parser.add_argument("--text", help="a text: of the model's one text modality")
    parser.add_argument("--image", metavar="FILE", help="a picture")
    parser.add_argument("--audio", metavar="FILE", help="a sound")
    parser.add_argument(
        "--array", action="append", default=[], metavar="NAME=FILE", help="an array (.npy) of modality NAME"
    )
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a text or a file of modality NAME, as caption_en='a dog'; may be repeated",
    )
    parser.add_argument("--target", help="modality of the answers (default: a picture, or the only one not given)")
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--data", metavar="DIR", help="where the embedded shards are now, if they were moved")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures, captions and sounds")
    parser.add_argument("--out", metavar="FILE.json", help="write the answers as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace existing --html and --out")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--copies", action="store_true", help="show all copies of the same content, not one for all")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--exact", action="store_true", help="score every candidate (default up to a million)")
    method.add_argument("--approximate", action="store_true", help="score only what a faiss index chooses; built once")
    return parser


def _search(options: argparse.Namespace) -> int:
    from mmrep.search import EmbeddingIndex

    index = EmbeddingIndex.load(options.index, device=choose_device(options.device))
    kinds = {name: encoder.kind for name, encoder in index.model.by_modality.items()}
    query = parse_query(options, kinds)
    target = options.target or default_target({name: kinds[name] for name in index.modalities}, query)
    items: dict[str, Any] = {name: [value] for name, value in query.items()}
    rows = index.model.encode(**items)
    method = "exact" if options.exact else "approximate" if options.approximate else "auto"
    answers = index.search(rows, target=target, k=options.k, method=method, copies=options.copies)
    originals = _originals(options, index)
    about = f"{'+'.join(sorted(query))}->{target} in {options.index}, by {type(index.model.loss).__name__}, {answers.method}"
    texts = [originals.texts(hit) if originals else {} for hit in answers.hits[0]]
    _print_table(about, answers, texts)
    if answers.note:
        print(f"note: {answers.note}", file=sys.stderr)
    if options.out:
        _write_json(Path(options.out), options, query, target, answers, texts)
    if options.html and originals:
        from mmrep.search.page import write_results

        shown = {name: (kinds[name], value) for name, value in query.items()}
        title = f"{target} by {' and '.join(query)}"
        page = write_results(
            Path(options.html), title=title, about=about, query=shown, hits=answers.hits[0], originals=originals
        )
        print(f"page in {page}")
    return 0


def parse_query(options: argparse.Namespace, kinds: Mapping[str, str]) -> dict[str, str]:
    """Modality -> text or file, from ``--text``, ``--image``, ``--audio``, ``--array`` and ``--query``.

    Args:
        options: Of the command line.
        kinds: Modality -> kind, of the model.

    Raises:
        ConfigError: If an option names no modality or several, one is given twice, or nothing is given.
    """
    found = []
    for kind in ("text", "image", "audio"):
        value = getattr(options, kind)
        if value is not None:
            found.append((_single(kind, kinds), value))
    for option, texts in (("array", options.array), ("query", options.query)):
        found += [_named(option, text, kinds) for text in texts]
    query = dict(found)
    if len(query) < len(found):
        raise ConfigError(f"a modality is given twice: {', '.join(name for name, _ in found)}", fix="give each once")
    if not query:
        raise ConfigError("nothing is given to search by", fix="add --text, --image, --audio or --query NAME=VALUE")
    return query


def _single(kind: str, kinds: Mapping[str, str]) -> str:
    names = [name for name, its in kinds.items() if its == kind]
    if not names:
        have = ", ".join(f"{name} ({its})" for name, its in kinds.items())
        raise ConfigError(f"--{kind}: the model has no modality of that kind; it has {have}")
    if len(names) > 1:
        raise ConfigError(f"--{kind} could be any of {', '.join(names)}", fix=f"name one: --query {names[0]}=VALUE")
    return names[0]


def _named(option: str, text: str, kinds: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise ConfigError(f"--{option} {text}", fix="write it as NAME=VALUE")
    if name not in kinds:
        raise ConfigError(f"--{option}: the model has no modality '{name}'", fix=did_you_mean(name, kinds))
    if option == "array" and kinds[name] != "array":
        raise ConfigError(f"--array: '{name}' is {kinds[name]}", fix=f"write --query {name}=VALUE")
    return name, value


def default_target(kinds: Mapping[str, str], query: Mapping[str, str]) -> str:
    """The modality that is most likely meant: the only one that is not given, or else the only picture.

    Raises:
        ConfigError: If there is no such.
    """
    free = [name for name in kinds if name not in query]
    pictures = [name for name in free if kinds[name] == "image"]
    for names in (free, pictures):
        if len(names) == 1:
            return names[0]
    raise ConfigError("which modality is searched for?", fix=f"add --target {'|'.join(free) or '...'}")


def _originals(options: argparse.Namespace, index: EmbeddingIndex) -> Originals | None:
    """The embedded data; a search does without it, a page or a place that was named does not."""
    from mmrep.search.originals import Originals

    try:
        return Originals(index.folder, index.manifest, options.data)
    except DataError as error:
        if options.html or options.data:
            raise
        print(f"note: no captions: {printable(error)}", file=sys.stderr)
        return None


def _print_table(title: str, answers: Answers, texts: Sequence[Mapping[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    names = sorted({name for each in texts for name in each})
    table = Table(title=Text(title))
    for heading in ("rank", "score"):
        table.add_column(heading, justify="right")
    for heading in ("key", "shard", *names):
        table.add_column(Text(heading), overflow="fold")
    for rank, (hit, captions) in enumerate(zip(answers.hits[0], texts, strict=True), 1):
        cells = (hit.key, hit.shard, *(captions.get(name, "") for name in names))
        table.add_row(str(rank), f"{hit.score:.4g}", *(Text(cell) for cell in cells))  # Text: brackets are no markup
    print_table(table)


def _write_json(
    path: Path,
    options: argparse.Namespace,
    query: Mapping[str, str],
    target: str,
    answers: Answers,
    texts: Sequence[Mapping[str, str]],
) -> None:
    results: list[dict[str, Any]] = [
        {"rank": rank, "score": hit.score, "key": hit.key, "shard": hit.shard, "texts": dict(captions)}
        for rank, (hit, captions) in enumerate(zip(answers.hits[0], texts, strict=True), 1)
    ]
    content = {
        "task": "search",
        "index": str(options.index),
        "given": dict(query),
        "target": target,
        "method": answers.method,
        "note": answers.note,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
