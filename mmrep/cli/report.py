"""``mmrep eval report``: one page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrep.devices import choose_device
from mmrep.errors import ConfigError
from mmrep.progress import progress


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this task beside the common ones, of which ``--out`` names the page."""
    parser.add_argument("--run", metavar="DIR", help="run folder whose metrics.csv is drawn (default: --checkpoint)")
    parser.add_argument("--queries", type=int, default=4, help="examples of each direction (default: 4)")


def evaluate_report(options: argparse.Namespace) -> dict[str, Any]:
    """Embed the split, write the page, print the retrieval table; returns the same as ``mmrep eval retrieval``."""
    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.evaluation.html_report import Evaluated, write_report
    from mmrep.evaluation.report import print_table
    from mmrep.evaluation.zero_shot import Split
    from mmrep.interop import load

    if not options.out:
        raise ConfigError("no page is named", fix="add --out FILE.html")
    if options.queries < 0:
        raise ConfigError(f"--queries {options.queries}")
    curves = _curves(options)
    model = load(options.checkpoint).to(choose_device(options.device))
    index = Index.load(options.data)
    split = Split(index, options.split, options.batch_size, options.num_workers, progress)
    embeddings = split.embed(model, model.by_modality)
    name = Path(options.checkpoint).name or str(options.checkpoint)
    samples = Samples(index, options.split)
    evaluated = Evaluated(name, model, str(options.data), options.split, samples, embeddings)
    figures = write_report(Path(options.out), evaluated, curves=curves, queries=options.queries)
    result = retrieval_result(options, len(embeddings), figures)
    print_table(result)
    print(f"page in {options.out}")
    return result


def retrieval_result(options: argparse.Namespace, n: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON's content of ``mmrep eval retrieval``."""
    return {
        "task": "retrieval",
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "split": options.split,
        "n": n,
        "directions": dict(figures),
    }


def _curves(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    from mmrep.evaluation.curves import read_curves

    run = Path(options.run or options.checkpoint)
    if (run / "metrics.csv").is_file():
        return read_curves(run)
    if options.run:
        raise ConfigError("no metrics.csv", where=run, fix="give a run folder: runs/NAME")
    return {}
