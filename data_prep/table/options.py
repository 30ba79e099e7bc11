"""The options of the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from data_prep.table.sources import Source, parse_modality, parse_values
from mmrep.cli.ray_options import ENGINES, add_engine_options
from mmrep.data.decode import KINDS
from mmrep.errors import ConfigError, check_choice


def make_parser() -> argparse.ArgumentParser:
    """All of them."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.table",
        description="A table of paths, values or bytes (CSV, TSV, JSONL, Parquet) -> shards. Run it again after an "
        "interruption: finished shards are kept.",
    )
    add = parser.add_argument
    add(
        "--table",
        "--csv",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files that end in .csv, .tsv, .jsonl or .parquet, folders of them, or patterns",
    )
    add("--out", type=Path, required=True, help="folder for the shards and their index.json")
    for kind in KINDS:
        holds = "the text itself" if kind == "text" else f"paths of {kind} files, or what they hold"
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
    add("--root", type=Path, help="where relative paths begin (default: the folder of the table's first file)")
    add("--image-size", type=int, metavar="N", help="shrink pictures until the shorter side has at most N pixels")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="default 1000")
    add(
        "--max-rejects", type=float, default=0.1, metavar="F", help="fraction of rows that may be dropped (default 0.1)"
    )
    add("--seed", type=int, default=0, help="of the order and the splits")
    add("--workers", type=int, default=2, help="processes (default 2)")
    add("--overwrite", action="store_true", help="replace shards that this command wrote, also unfinished ones")
    add_engine_options(parser)
    parser.set_defaults(sources=[])
    return parser


def _source(kind: str) -> Callable[[str], Source]:
    return lambda column: Source(kind, kind, (column,))


def check(args: argparse.Namespace) -> None:
    """Refuse what is impossible, and fill in what depends on other options.

    Raises:
        ConfigError: With the first such option.
    """
    if args.split is not None and (args.val_fraction, args.test_fraction) != (None, None):
        raise ConfigError("--split contradicts --val-fraction and --test-fraction", fix="give one or the other")
    args.val_fraction = 0.1 if args.val_fraction is None else args.val_fraction
    args.test_fraction = 0.1 if args.test_fraction is None else args.test_fraction
    if not (args.val_fraction >= 0 and args.test_fraction >= 0 and args.val_fraction + args.test_fraction < 1):
        raise ConfigError("--val-fraction and --test-fraction leave nothing to train on", fix="keep their sum below 1")
    if not 0 <= args.max_rejects <= 1:
        raise ConfigError(f"--max-rejects {args.max_rejects} is no fraction", fix="give a number from 0 to 1")
    check_choice("--engine", args.engine, ENGINES)
    for option in ("samples_per_shard", "workers", "image_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}", fix="give at least 1")
