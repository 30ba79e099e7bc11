"""``mmrep eval report``: one page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmrep.errors import ConfigError
from mmrep.progress import progress


def add_report_parser(tasks: Any) -> None:
    """Add ``report`` to the tasks of ``mmrep eval``: ``tasks`` is what ``add_subparsers`` gave."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "report", help="one page (HTML) with tables, curves, examples and a projection"
    )
    parser.add_argument(
        "--checkpoint", required=True, help="run folder, model folder, .ckpt, or a name: see mmrep.load"
    )
    parser.add_argument("--data", required=True, help="folder or URL of shards with an index.json")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    parser.add_argument("--run", metavar="DIR", help="run folder whose metrics.csv is drawn (default: --checkpoint)")
    parser.add_argument("--queries", type=int, default=4, help="examples of each direction (default: 4)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples embedded at once")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")


def evaluate_report(options: argparse.Namespace) -> dict[str, Any]:
    """Embed the split, write the page, print the retrieval table; returns the same as ``mmrep eval retrieval``."""
    import torch

    from mmrep.data.dataset import ShardDataset, make_loader
    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.evaluation.embeddings import embed_loader
    from mmrep.evaluation.html_report import Evaluated, write_report
    from mmrep.evaluation.report import print_table
    from mmrep.interop import load

    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise ConfigError("the page exists", where=out, fix="add --overwrite, or another --out")
    if options.queries < 0 or options.batch_size < 1:
        raise ConfigError(f"--queries {options.queries} --batch-size {options.batch_size}")
    curves = _curves(options)
    model = load(options.checkpoint).to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    samples = Samples(Index.load(options.data), options.split)
    dataset = ShardDataset(samples, model.by_modality, global_batch_size=options.batch_size)
    loader = make_loader(dataset, model.by_modality, num_workers=options.num_workers)
    with progress("embedding", len(dataset)) as advance:
        embeddings = embed_loader(model, loader, advance=advance)
    name = Path(options.checkpoint).name or str(options.checkpoint)
    evaluated = Evaluated(name, model.cpu(), str(options.data), options.split, samples, embeddings)
    figures = write_report(out, evaluated, curves=curves, queries=options.queries)
    result = {
        "task": "retrieval",
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "split": options.split,
        "n": len(embeddings),
        "directions": figures,
    }
    print_table(result)
    print(f"page in {out}")
    return result


def _curves(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    from mmrep.evaluation.curves import read_curves

    run = Path(options.run or options.checkpoint)
    if (run / "metrics.csv").is_file():
        return read_curves(run)
    if options.run:
        raise ConfigError("no metrics.csv", where=run, fix="give a run folder: runs/NAME")
    return {}
