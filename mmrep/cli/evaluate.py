"""``mmrep eval``: a checkpoint on held-out shards, by zero-shot retrieval or a linear probe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmrep.errors import ConfigError
from mmrep.progress import progress


def run(arguments: list[str]) -> int:
    """Run ``eval ...``."""
    options = _parser().parse_args(arguments[1:])
    out = Path(options.out) if options.out else None
    if out is not None and out.exists() and not options.overwrite:
        raise ConfigError("the result exists", where=out, fix="add --overwrite, or another --out")
    if options.task == "probe":
        from mmrep.cli.probe import evaluate_probe

        result = evaluate_probe(options)
    else:
        result = evaluate_retrieval(options)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep eval", description="Evaluate a checkpoint on held-out shards.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="retrieval|probe")
    retrieval = tasks.add_parser("retrieval", help="recall@k in every direction, by the model's own score")
    _add_common(retrieval)
    retrieval.add_argument(
        "--direction", action="append", metavar="audio+text->image", help="only this one; may be repeated"
    )
    retrieval.add_argument("--picture", help="draw some queries with their best five answers (PNG)")
    retrieval.add_argument(
        "--picture-direction", metavar="audio+text->image", help="of the picture (default: the last)"
    )
    probe = tasks.add_parser("probe", help="what a linear map reads off frozen features, beside random weights")
    _add_common(probe)
    probe.add_argument("--modality", required=True, help="whose encoder")
    probe.add_argument("--label", required=True, help="a label of the index")
    probe.add_argument("--train-split", default="train", help="where the map is fitted (default: train)")
    probe.add_argument("--val-split", default="val", help="where its penalty is chosen (default: val)")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder, or .ckpt")
    parser.add_argument("--data", required=True, help="folder of shards with an index.json")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.add_argument("--batch-size", type=int, default=256, help="samples embedded at once")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")


def evaluate_retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """Embed the split, rank, print the table, draw what was asked for; returns the JSON's content."""
    import torch

    from mmrep.data.dataset import ShardDataset, make_loader
    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.evaluation.embeddings import embed_loader
    from mmrep.evaluation.report import draw_examples, print_table
    from mmrep.evaluation.retrieval import Direction, all_directions, retrieve
    from mmrep.interop import load

    model = load(options.checkpoint).to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directions = [Direction.parse(text, model.modalities) for text in options.direction or []] or None
    samples = Samples(Index.load(options.data), options.split)
    dataset = ShardDataset(samples, model.by_modality, global_batch_size=options.batch_size)
    loader = make_loader(dataset, model.by_modality, num_workers=options.num_workers)
    with progress("embedding", len(dataset)) as advance:
        embeddings = embed_loader(model, loader, advance=advance)
    model.cpu()
    result = {
        "task": "retrieval",
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "split": options.split,
        "n": len(embeddings),
        "directions": retrieve(embeddings, model, directions),
    }
    print_table(result)
    if options.picture:
        shown = options.picture_direction
        direction = (
            Direction.parse(shown, model.modalities) if shown else (directions or all_directions(model.modalities))[-1]
        )
        draw_examples(Path(options.picture), embeddings, model, samples, direction)
    return result
