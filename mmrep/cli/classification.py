"""``mmrep eval classification``: zero-shot classification by prompts."""

from __future__ import annotations

import argparse
from typing import Any

from mmrep.devices import choose_device
from mmrep.errors import ConfigError
from mmrep.progress import progress


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this task beside the common ones."""
    parser.add_argument("--modality", default="image", metavar="image|audio+image", help="what is classified")
    parser.add_argument("--text-modality", default="text", help="what takes the prompts (default: text)")
    parser.add_argument("--label", help="a label of the index; needed where there are several")
    parser.add_argument("--templates", metavar="FILE", help="prompt templates with {c}: a line each, or JSON")
    parser.add_argument(
        "--classnames",
        metavar="FILE",
        help="other names of the classes, a line each or JSON, in the order of the label's classes in index.json "
        "(mmrep data index sorts them as text; whole numbers by value: 0, 1, 2, 10)",
    )
    parser.add_argument("--language", help="use mmrep's templates of this language (en, de, zh, ...)")
    parser.add_argument("--out-clip-benchmark", metavar="FILE", help="the figures as `clip_benchmark build` reads them")


def evaluate_classification(options: argparse.Namespace) -> dict[str, Any]:
    """Classify, print the table; returns the JSON's content.

    Raises:
        MmrepError: On an unknown modality, label, split, file or language.
    """
    from mmrep.evaluation.report import print_classification
    from mmrep.evaluation.sources import class_task, open_source
    from mmrep.evaluation.zero_shot import Split, zero_shot_classification
    from mmrep.interop import load

    source = open_source(options.data)
    task = class_task(
        source,
        label=options.label,
        templates=options.templates,
        classnames=options.classnames,
        language=options.language,
    )
    model = load(options.checkpoint).to(choose_device(options.device))
    given = tuple(sorted(set(options.modality.split("+"))))
    if not all(given):
        raise ConfigError(f"--modality {options.modality}", fix="write image, or audio+image")
    split = Split(source, options.split, options.batch_size, options.num_workers, progress)
    figures = zero_shot_classification(model, split, task, given=given, text=options.text_modality)
    result = {
        "task": "classification",
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "split": options.split,
        "modality": "+".join(given),
        "text_modality": options.text_modality,
        "label": task.labels[0] if not task.multilabel else None,
        "language": task.language,
        "prompts": sum(map(len, task.prompts)),
        **figures,
    }
    print_classification(result)
    return result
