"""The command: arguments -> rows -> shards -> index, built beside the output folder and moved there when whole."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.building.build_folder import BuildFolder, HopelessError
from data_prep.building.command import answer
from data_prep.building.workers import WorkerKilledError, in_processes
from data_prep.table.cell import Reject
from data_prep.table.files import check_columns, find_tables
from data_prep.table.options import check, make_parser
from data_prep.table.pack import Packer, Packing, ShardReport, load_report
from data_prep.table.parquet_files import NAMES
from data_prep.table.plan import Plan, ShardPlan, SplitRule, make_plan
from data_prep.table.report import in_order, reasons, summary, write_rejects
from data_prep.table.sources import Source, with_prefixes
from data_prep.table.spool import Spool, write_spool
from mmrep.cli.ray_options import ray_settings
from mmrep.data.build import build_index, sorted_classes
from mmrep.data.index import Label, Modality
from mmrep.progress import progress
from mmrep.ray_engine import map_shards


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the shards are written, else 2 and one line on stderr."""
    return answer(lambda: _run(_options(argv)))


def _options(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    check(args)
    return args


def _run(args: argparse.Namespace) -> str:
    """Do the work; returns what to print."""
    sources = with_prefixes(args.sources)
    if args.engine == "ray":
        ray_settings(args)  # whether it can be
    kept = _unique([args.group_key, *args.label_key])
    columns = _unique([*(c for source in sources for c in source.columns), *kept, args.split])
    tables = find_tables(args.table)
    for path in tables:
        check_columns(path, _uses(sources, [*kept, *([args.split] if args.split else [])]))
    root = (args.root or tables[0].parent).absolute()
    build = BuildFolder(args.out.resolve(), args.overwrite)
    packing = Packing(
        *(build.path, build.work, tuple(path.name for path in tables), tuple(columns), tuple(sources), root),
        *(tuple(kept), tuple(args.label_key), args.image_size),
    )
    request = _request(args, packing, tables)
    with build.opened(request):
        text = _build(args, packing, tables)
        if _request(args, packing, tables) != request:
            raise HopelessError("the table changed while it was read", where=tables[0].parent, fix="run it again")
        build.publish()
    return f"{text}\n\nnext: mmrep fit --config FILE.yaml --data.path {args.out}"


def _uses(sources: Sequence[Source], names: Sequence[str]) -> dict[str, set[str]]:
    """What each column is used as."""
    uses: dict[str, set[str]] = {}
    for source in sources:
        for column in source.columns:
            uses.setdefault(column, set()).add(source.kind)
    for column in names:
        uses.setdefault(column, set()).add(NAMES)
    return uses


def _request(args: argparse.Namespace, packing: Packing, tables: Sequence[Path]) -> dict[str, Any]:
    """What decides on the bytes of the result; the files of a table count as the same while size and time are."""
    names = (
        "split",
        "group_key",
        "label_key",
        "val_fraction",
        "test_fraction",
        "samples_per_shard",
        "seed",
        "image_size",
    )
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tables]
    return {
        "table": [list(file) for file in files],
        "sources": [asdict(source) for source in packing.sources],
        "root": str(packing.root),
        **{name: getattr(args, name) for name in names},
    }


def _build(args: argparse.Namespace, packing: Packing, tables: Sequence[Path]) -> str:
    plan = Plan.load(packing.work) or _plan(args, packing, tables)
    if not plan.total:
        raise HopelessError("the table has no rows", where=tables[0], fix="it needs a header and at least one row")
    _pack(args, packing, plan.shards)
    reports = [(shard, _reported(packing, shard)) for shard in plan.shards]
    rejects = plan.rejects + [reject for _, report in reports for reject in report.rejects]
    _check_rejects(rejects, plan.total, args, tables)
    write_rejects(packing.folder / "rejects.csv", rejects)
    _write_index(args, packing, reports, tables)
    lines = [summary(reports, packing.sources, rejects)]
    if plan.straddling:
        lines.append(f"warning: {plan.straddling} values of '{args.group_key}' are in more than one split")
    return "\n".join(lines)


def _plan(args: argparse.Namespace, packing: Packing, tables: Sequence[Path]) -> Plan:
    """Copy the tables that are not yet copied, and plan the shards."""
    paths = [packing.spool_path(file) for file in range(len(tables))]
    missing = [str(file) for file, path in enumerate(paths) if not path.is_file()]
    copies = in_processes(partial(_copier, packing, tables), missing, min(args.workers, len(missing)))
    with progress("reading the table", len(missing), "files") as advance:
        for _ in copies:
            advance(1)
    rule = SplitRule(args.split, args.group_key, args.val_fraction, args.test_fraction, args.seed)
    return make_plan(Spool(paths, packing.tables, packing.columns), rule, args.samples_per_shard, packing.work)


def _copier(packing: Packing, tables: Sequence[Path]) -> Callable[[str], None]:
    return lambda file: write_spool(tables[int(file)], packing.columns, packing.spool_path(int(file)))


def _pack(args: argparse.Namespace, packing: Packing, plans: list[ShardPlan]) -> None:
    """Write the shards that are not finished."""
    todo = {plan.name: plan.size for plan in plans if load_report(packing, plan) is None}
    if len(todo) < len(plans):
        print(f"{len(plans) - len(todo)} of {len(plans)} shards were there", file=sys.stderr)
    make = partial(Packer, packing, plans)
    if args.engine == "ray":
        done = map_shards(make, list(todo), ray_settings(args))
    else:
        done = in_processes(make, list(todo), min(args.workers, len(todo)))
    with progress("shards", sum(todo.values()), "rows") as advance:
        for name, _ in done:
            advance(todo[name])


def _reported(packing: Packing, plan: ShardPlan) -> ShardReport:
    report = load_report(packing, plan)
    if report is None:
        raise WorkerKilledError("a shard was damaged after it was written", where=plan.name, fix="run the same again")
    return report


def _unique(columns: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(column for column in columns if column is not None))


def _check_rejects(rejects: Sequence[Reject], total: int, args: argparse.Namespace, tables: Sequence[Path]) -> None:
    """Raises: HopelessError: If too many rows are rejects, or all of them."""
    rejected = len({(reject.file, reject.row) for reject in rejects})
    if rejected < total and rejected <= args.max_rejects * total:
        return
    reason, count = reasons(rejects)[0]
    first = min((reject for reject in rejects if reject.reason.startswith(reason)), key=in_order)
    raise HopelessError(
        f"{rejected} of {total} rows are rejects; most often ({count}): {reason}, as in row {first.row}, "
        f"column '{first.column}': {first.value[:200]!r}",
        where=tables[0].with_name(first.file) if first.file else tables[0],
        fix=f"mend them or allow more than --max-rejects {args.max_rejects}" if rejected < total else "no row is left",
    )


def _write_index(
    args: argparse.Namespace,
    packing: Packing,
    reports: Sequence[tuple[ShardPlan, ShardReport]],
    tables: Sequence[Path],
) -> None:
    splits: dict[str, list[str]] = {}
    for plan, report in reports:
        if report.samples:
            splits.setdefault(plan.split, []).append(plan.name)
    named = [{"name": path.name, "sha256": _sha256(path)} for path in tables]
    table = {"table": named[0]} if len(named) == 1 else {"tables": named}
    build_index(
        packing.folder,
        {source.name: _modality(source, [report for _, report in reports]) for source in packing.sources},
        splits=splits,
        group_key=args.group_key,
        labels={
            name: Label(sorted_classes(set().union(*(report.labels.get(name, ()) for _, report in reports))))
            for name in args.label_key
        },
        provenance={"command": "data_prep.table", **table, "seed": args.seed, "image_size": args.image_size},
        workers=args.workers,
    ).save()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modality(source: Source, reports: Sequence[ShardReport]) -> Modality:
    extensions = sorted(set().union(*(report.extensions.get(source.name, ()) for report in reports)))
    if not extensions:
        raise HopelessError(f"no row has modality '{source.name}'", where=", ".join(source.columns), fix="leave it out")
    return Modality(tuple(extensions), source.stored_kind)
