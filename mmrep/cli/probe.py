"""``mmrep eval probe``: a linear probe of one modality, beside the same probe of random weights and of the raw input."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mmrep.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from mmrep.data.index import Index
    from mmrep.encoders import Encoder
    from mmrep.evaluation.probe import Labelled


def evaluate_probe(options: argparse.Namespace) -> dict[str, Any]:
    """Probe, print the table; returns the JSON's content.

    Raises:
        MmrepError: On an unknown modality, label or split.
    """
    import torch

    from mmrep.data.index import Index
    from mmrep.evaluation.probe import linear_probe
    from mmrep.evaluation.report import print_probe
    from mmrep.interop import load
    from mmrep.model import MultimodalModel

    model = load(options.checkpoint)
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
    untrained = MultimodalModel.from_config(model.config(), classes).eval()
    features = {"trained": model, "random weights": untrained}
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {}
    for name, source in features.items():
        encoder = source.by_modality[options.modality].to(device)
        figures[name] = linear_probe(**_splits(options, index, encoder, encoder.features, name))
    if model.by_modality[options.modality].kind != "text":  # whose numbers are names of tokens
        encoder = model.by_modality[options.modality]
        figures["raw input"] = linear_probe(**_splits(options, index, encoder, _flat, "raw input"))
    result = {
        "task": "probe",
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "modality": options.modality,
        "label": options.label,
        "split": options.split,
        "features": figures,
    }
    print_probe(result)
    return result


def _splits(
    options: argparse.Namespace, index: Index, encoder: Encoder, features: Callable[[Tensor], Tensor], title: str
) -> Mapping[str, Labelled]:
    """Features of the three splits, by the names of `linear_probe`'s arguments."""
    from mmrep.data.dataset import ShardDataset, make_loader
    from mmrep.data.reader import Samples
    from mmrep.evaluation.probe import collect
    from mmrep.evaluation.report import progress

    device = next(encoder.parameters()).device
    found = {}
    for name, split in (("train", options.train_split), ("val", options.val_split), ("test", options.split)):
        dataset = ShardDataset(Samples(index, split), {options.modality: encoder}, train=False, seed=0)
        loader = make_loader(dataset, {options.modality: encoder}, options.batch_size, num_workers=options.num_workers)
        with progress(f"{title}, {split}", len(dataset)) as advance:
            found[name] = collect(features, loader, options.modality, options.label, device=device, advance=advance)
    return found


def _flat(inputs: Tensor) -> Tensor:
    """What the transform gives, as one vector a sample."""
    return inputs.flatten(1).float().nan_to_num()
