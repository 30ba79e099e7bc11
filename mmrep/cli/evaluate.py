"""``mmrep eval``: a checkpoint on held-out shards, by zero-shot retrieval or classification, by a probe, or as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmrep.cli import classification, probe, report
from mmrep.devices import choose_device
from mmrep.errors import ConfigError
from mmrep.progress import progress


def run(arguments: list[str]) -> int:
    """Run ``eval ...``."""
    options = _parser().parse_args(arguments[1:])
    theirs = getattr(options, "out_clip_benchmark", None)
    picture = getattr(options, "picture", None)
    out, out_clip_benchmark, drawn = (Path(file) if file else None for file in (options.out, theirs, picture))
    for path in (out, out_clip_benchmark, drawn):
        if path is not None and path.exists() and not options.overwrite:
            raise ConfigError("the result exists", where=path, fix="add --overwrite, or name another file")
    if options.batch_size < 1 or options.num_workers < 0:
        raise ConfigError(f"--batch-size {options.batch_size}, --num-workers {options.num_workers}")
    draw = None
    if options.task == "retrieval":
        result, draw = evaluate_retrieval(options)
    else:
        evaluate = {
            "classification": classification.evaluate_classification,
            "probe": probe.evaluate_probe,
            "report": report.evaluate_report,
        }[options.task]
        result = evaluate(options)
    if out is not None and options.task != "report":  # whose --out is a page
        _write(out, result)
    if out_clip_benchmark is not None:
        from mmrep.evaluation.clip_benchmark_json import clip_benchmark_json

        _write(out_clip_benchmark, clip_benchmark_json(result))
    if draw is not None:
        draw()
    return 0


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep eval", description="Evaluate a checkpoint on held-out shards.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="retrieval|classification|probe|report")
    retrieval = tasks.add_parser("retrieval", help="recall@k in every direction, by the model's own score")
    _add_common(retrieval)
    retrieval.add_argument(
        "--direction", action="append", metavar="audio+text->image", help="only this one; may be repeated"
    )
    retrieval.add_argument("--picture", help="draw some queries with their best five answers (PNG)")
    retrieval.add_argument(
        "--picture-direction", metavar="audio+text->image", help="of the picture (default: the last of the table)"
    )
    retrieval.add_argument(
        "--modality", help="what takes the pictures of a folder of CLIP_benchmark's (default: image)"
    )
    retrieval.add_argument("--text-modality", help="and what takes its captions (default: text)")
    retrieval.add_argument(
        "--out-clip-benchmark", metavar="FILE", help="the figures as `clip_benchmark build` reads them"
    )
    classes = tasks.add_parser("classification", help="zero-shot accuracy by prompts")
    _add_common(classes)
    classification.add_options(classes)
    probing = tasks.add_parser("probe", help="what is read off frozen features, beside random weights")
    _add_common(probing)
    probe.add_options(probing)
    page = tasks.add_parser("report", help="one page (--out FILE.html) with tables, curves, examples and a projection")
    _add_common(page)
    report.add_options(page)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="run folder, model folder, .ckpt, or a name: see mmrep.load"
    )
    parser.add_argument("--data", required=True, help="folder of shards with an index.json, or of CLIP_benchmark's")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--out", help="write the figures as JSON; of a report, the page")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results and pictures")
    parser.add_argument("--batch-size", type=int, default=256, help="samples embedded at once")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")


def evaluate_retrieval(options: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """Embed the split, rank, print the table; returns the JSON's content, and what draws the picture that was asked for.

    Drawing comes last: whatever may be wrong with a picture, the figures are there.
    """
    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.evaluation.report import check_drawing, draw_examples, print_table
    from mmrep.evaluation.retrieval import Direction
    from mmrep.evaluation.sources import open_source, retrieval_encoders
    from mmrep.evaluation.zero_shot import Split, zero_shot_retrieval
    from mmrep.interop import load

    source = open_source(options.data)
    if options.picture:
        check_drawing(Path(options.picture))
        if not isinstance(source, Index):
            raise ConfigError("--picture draws samples of shards with an index.json", where=options.data)
    model = load(options.checkpoint).to(choose_device(options.device))
    if isinstance(source, Index) and (options.modality or options.text_modality):
        raise ConfigError("--modality and --text-modality are for folders of CLIP_benchmark's", fix="use --direction")
    names = {"image": options.modality or "image", "text": options.text_modality or "text"}
    known = list(retrieval_encoders(source, model.by_modality, **names))
    directions = [Direction.parse(text, known) for text in options.direction or []] or None
    shown = Direction.parse(options.picture_direction, known) if options.picture_direction else None
    split = Split(source, options.split, options.batch_size, options.num_workers, progress)
    figures, embeddings = zero_shot_retrieval(model, split, directions, **names)
    result = report.retrieval_result(options, len(embeddings), figures)
    print_table(result)
    if not options.picture or not isinstance(source, Index):
        return result, None
    samples = Samples(source, options.split)

    def draw() -> None:
        if shown is None and not figures:
            raise ConfigError("the loss can score no direction: there is nothing to draw", where=options.picture)
        direction = shown or Direction.parse(list(figures)[-1], known)
        draw_examples(Path(options.picture), embeddings.to("cpu"), model.cpu(), samples, direction)

    return result, draw
