"""The command: arguments -> rows -> shards -> index, built beside the output folder and moved there when whole."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.table.pack import Packing, ShardReport, pack_shards
from data_prep.table.report import reasons, summary, write_rejects
from data_prep.table.rows import Reject, SplitRule, plan_shards, read_table, straddling_groups
from data_prep.table.sources import Source, parse_modality, parse_values, with_prefixes
from mmrep.data.build import build_index
from mmrep.data.decode import KINDS
from mmrep.data.index import Label, Modality, remove_arrays
from mmrep.errors import ConfigError, DataError, MmrepError

OWN_FILES = ("*.tar", "*.tar.part", "index.json", "index.json.part", "rejects.csv")
"""What this command writes, and therefore may remove."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the shards are written, else 2 and one line on stderr."""
    try:
        args = _parser().parse_args(argv)
        _check(args)
        print(_run(args))
    except (MmrepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.table", description="A CSV or TSV of paths and values -> shards."
    )
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="the table; its first row names the columns")
    add("--out", type=Path, required=True, help="folder for the shards and their index.json")
    for kind in KINDS:
        holds = "the text itself" if kind == "text" else f"paths of {kind} files"
        add(
            f"--{kind}",
            dest="sources",
            action="append",
            type=_source(kind),
            metavar="COLUMN",
            help=f"a column of {holds}",
        )
    add(
        "--values",
        dest="sources",
        action="append",
        type=parse_values,
        metavar="NAME=COLUMN,...",
        help="numbers, as one vector",
    )
    add(
        "--modality",
        dest="sources",
        action="append",
        type=parse_modality,
        metavar="NAME=KIND:COLUMN",
        help="one more modality",
    )
    add("--group-key", metavar="COLUMN", help="rows with equal values answer each other, and stay in one split")
    add("--label-key", action="append", default=[], metavar="COLUMN", help="a column of classes (repeatable)")
    add("--split", metavar="COLUMN", help="a column that names the split; else splits are drawn")
    add("--val-fraction", type=float, metavar="F", help="0.1 unless told")
    add("--test-fraction", type=float, metavar="F", help="0.1 unless told")
    add("--root", type=Path, help="where relative paths begin (default: the table's folder)")
    add("--image-size", type=int, metavar="N", help="shrink pictures until the shorter side has at most N pixels")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="default 1000")
    add(
        "--max-rejects", type=float, default=0.1, metavar="F", help="fraction of rows that may be dropped (default 0.1)"
    )
    add("--seed", type=int, default=0, help="of the order and the splits")
    add("--workers", type=int, default=2, help="processes (default 2)")
    add("--overwrite", action="store_true", help="replace shards that this command wrote")
    parser.set_defaults(sources=[])
    return parser


def _source(kind: str) -> Callable[[str], Source]:
    return lambda column: Source(kind, kind, (column,))


def _check(args: argparse.Namespace) -> None:
    if args.split is not None and (args.val_fraction, args.test_fraction) != (None, None):
        raise ConfigError("--split contradicts --val-fraction and --test-fraction", fix="give one or the other")
    args.val_fraction = 0.1 if args.val_fraction is None else args.val_fraction
    args.test_fraction = 0.1 if args.test_fraction is None else args.test_fraction
    if min(args.val_fraction, args.test_fraction) < 0 or args.val_fraction + args.test_fraction >= 1:
        raise ConfigError("--val-fraction and --test-fraction leave nothing to train on", fix="keep their sum below 1")
    if not 0 <= args.max_rejects <= 1:
        raise ConfigError(f"--max-rejects {args.max_rejects} is no fraction", fix="give a number from 0 to 1")
    for option in ("samples_per_shard", "workers", "image_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}", fix="give at least 1")


def _run(args: argparse.Namespace) -> str:
    """Do the work; returns what to print."""
    sources = with_prefixes(args.sources)
    out, part = _make_part(args.out.resolve(), args.overwrite)
    try:
        text = _build(args, sources, part)
        _publish(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{text}\n\nnext: mmrep fit --config FILE.yaml --data.path {args.out}"


def _build(args: argparse.Namespace, sources: Sequence[Source], part: Path) -> str:
    kept = _unique([args.group_key, *args.label_key])
    rows, rejects = read_table(
        args.csv, _unique([*(c for source in sources for c in source.columns), *kept, args.split])
    )
    total = len(rows) + len(rejects)
    rule = SplitRule(args.split, args.group_key, args.val_fraction, args.test_fraction, args.seed)
    plans, unplanned = plan_shards(rows, rule, args.samples_per_shard)
    packing = Packing(part, tuple(sources), (args.root or args.csv.parent).absolute(), tuple(kept), args.image_size)
    reports = pack_shards(plans, packing, args.workers)
    rejects += unplanned + [reject for report in reports for reject in report.rejects]
    _check_rejects(rejects, total, args)
    write_rejects(part / "rejects.csv", rejects)
    _write_index(args, sources, part, reports)
    lines = [summary(reports, sources, rejects)]
    if args.group_key and (straddling := straddling_groups(plans, args.group_key)):
        lines.append(f"warning: {straddling} values of '{args.group_key}' are in more than one split")
    return "\n".join(lines)


def _unique(columns: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(column for column in columns if column is not None))


def _make_part(out: Path, overwrite: bool) -> tuple[Path, Path]:
    """The output folder and an empty one beside it to build in.

    Raises:
        DataError: If either holds what must not be lost.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise DataError(
            "the output folder is not empty", where=out, fix="give another --out, or --overwrite to replace shards"
        )
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    _remove_own(part)  # what a killed run left
    if any(part.iterdir()):
        raise DataError("the folder to build in holds files of others", where=part, fix="move them away")
    return out, part


def _remove_own(folder: Path) -> None:
    for pattern in OWN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    remove_arrays(folder)


def _publish(part: Path, out: Path) -> None:
    """Put the whole result in place: by one rename, or file by file beside files of others, the index last."""
    if out.is_dir():
        _remove_own(out)
    if not out.exists() or not any(out.iterdir()):
        part.replace(out)
        return
    for path in sorted(part.iterdir(), key=lambda path: path.name == "index.json"):
        path.replace(out / path.name)


def _check_rejects(rejects: Sequence[Reject], total: int, args: argparse.Namespace) -> None:
    """Raises: DataError: If too many rows are rejects, or all of them."""
    rejected = len({reject.row for reject in rejects})
    if rejected < total and rejected <= args.max_rejects * total:
        return
    reason, count = reasons(rejects)[0]
    first = min(reject for reject in rejects if reject.reason.startswith(reason))
    raise DataError(
        f"{rejected} of {total} rows are rejects; most often ({count}): {reason}, as in row {first.row}, "
        f"column '{first.column}': {first.value[:200]!r}",
        where=args.csv,
        fix=f"mend them or allow more than --max-rejects {args.max_rejects}" if rejected < total else "no row is left",
    )


def _write_index(
    args: argparse.Namespace, sources: Sequence[Source], part: Path, reports: Sequence[ShardReport]
) -> None:
    splits: dict[str, list[str]] = {}
    for report in reports:
        if report.samples:
            splits.setdefault(report.plan.split, []).append(report.plan.name)
    with args.csv.open("rb") as file:
        table = {"name": args.csv.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    build_index(
        part,
        {source.name: _modality(source, reports) for source in sources},
        splits=splits,
        group_key=args.group_key,
        labels={
            name: Label(sorted(set().union(*(report.kept[name] for report in reports)))) for name in args.label_key
        },
        provenance={"command": "data_prep.table", "table": table, "seed": args.seed, "image_size": args.image_size},
    ).save()


def _modality(source: Source, reports: Sequence[ShardReport]) -> Modality:
    extensions = sorted(set().union(*(report.extensions[source.name] for report in reports)))
    if not extensions:
        raise DataError(f"no row has modality '{source.name}'", where=", ".join(source.columns), fix="leave it out")
    return Modality(tuple(extensions), source.stored_kind)
