"""``mmrep eval probe``: a probe of one modality, beside the same probe of random weights and of the raw input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mmrep.devices import choose_device
from mmrep.errors import ConfigError, did_you_mean
from mmrep.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from mmrep.data.index import Index
    from mmrep.encoders import Encoder
    from mmrep.evaluation.probe import Labelled


METHODS = ("ridge", "sgd", "knn")
MOST_RAW = 20_000
"""Numbers of a raw input up to which it is probed too: the solution holds a matrix of samples x numbers in float64."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this task beside the common ones."""
    parser.add_argument("--modality", required=True, help="whose encoder")
    parser.add_argument("--label", required=True, help="a label of the index")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="ridge",
        help="ridge: a linear map in closed form; sgd: logistic regression; knn: nearest neighbours (default: ridge)",
    )
    parser.add_argument("--train-split", default="train", help="where it is fitted (default: train)")
    parser.add_argument("--val-split", default="val", help="where its penalty, or k, is chosen (default: val)")


def evaluate_probe(options: argparse.Namespace) -> dict[str, Any]:
    """Probe, print the table; returns the JSON's content.

    Raises:
        MmrepError: On an unknown modality, label or split.
    """
    import torch

    from mmrep.data.index import Index
    from mmrep.evaluation.clip_benchmark import ClipBenchmark
    from mmrep.evaluation.knn import knn_probe
    from mmrep.evaluation.probe import linear_probe
    from mmrep.evaluation.report import print_probe
    from mmrep.evaluation.sgd_probe import sgd_probe
    from mmrep.interop import load
    from mmrep.model import MultimodalModel

    fit = {"ridge": linear_probe, "sgd": sgd_probe, "knn": knn_probe}[options.method]
    model = load(options.checkpoint)
    if ClipBenchmark.found_in(options.data):
        raise ConfigError("a folder of CLIP_benchmark's; a probe wants shards with an index.json", where=options.data)
    index = Index.load(options.data)
    if options.modality not in model.by_modality:
        raise ConfigError(
            f"the model has no modality '{options.modality}'", fix=did_you_mean(options.modality, model.modalities)
        )
    if options.label not in index.labels:
        raise ConfigError(
            f"the shards have no label '{options.label}'",
            where=options.data,
            fix=did_you_mean(options.label, index.labels),
        )
    torch.manual_seed(0)
    classes = {type(part).__name__: type(part) for part in [*model.encoders.values(), model.loss]}
    untrained = MultimodalModel.from_config(model.config(), classes, model.files()).eval()
    device = choose_device(options.device)
    encoder, random = (source.by_modality[options.modality].to(device) for source in (model, untrained))
    features = {"trained": encoder.features, "random weights": random.features}
    width = encoder.empty(1).numel()
    if encoder.kind != "text" and width <= MOST_RAW:  # a text's numbers are names of tokens
        features["raw input"] = _flat
    elif encoder.kind != "text":
        print(f"raw input is left out: {width} numbers a sample are more than {MOST_RAW}", file=sys.stderr)
    splits = {
        name: _collect(options, index, encoder, features, split)
        for name, split in (("train", options.train_split), ("val", options.val_split), ("test", options.split))
    }
    result = {
        "task": "probe",
        "method": options.method,
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "modality": options.modality,
        "label": options.label,
        "split": options.split,
        "features": {kind: fit(**{name: found[kind] for name, found in splits.items()}) for kind in features},
    }
    print_probe(result)
    return result


def _collect(
    options: argparse.Namespace,
    index: Index,
    encoder: Encoder,
    features: Mapping[str, Callable[[Tensor], Tensor]],
    split: str,
) -> dict[str, Labelled]:
    """All kinds of features of one split."""
    from mmrep.data.dataset import ShardDataset, make_loader
    from mmrep.data.reader import Samples
    from mmrep.evaluation.probe import collect

    encoders = {options.modality: encoder}
    dataset = ShardDataset(Samples(index, split), encoders, global_batch_size=options.batch_size)
    loader = make_loader(dataset, encoders, num_workers=options.num_workers)
    device = next(encoder.parameters()).device
    with progress(f"features of {split}", len(dataset)) as advance:
        return collect(features, loader, options.modality, options.label, device=device, advance=advance)


def _flat(inputs: Tensor) -> Tensor:
    """What the transform gives, as one vector a sample."""
    return inputs.flatten(1).float().nan_to_num()
